"""The seam on virtual streams: real bytes, moved when a stream gets there, and declared to the race
checker.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..device.cpu import rows_view, strided_rows
from ..device.driver import CopyRefusedError
from ..plan.chunks import STAGING_ALIGNMENT, Chunk, Staged
from ..plan.copies import CopyBatch
from ..plan.geometry import Component, PoolGeometry
from . import gpu as torch_cuda
from .gpu import Event, Gpu, Stream
from .memory import POISON, Block, Borrowed
from .operations import Operation
from .ranges import ByteRanges

STALE = 0xEE
"""What memory holds that nobody wrote yet."""

_PIECES = 8
"""Parts of a batch of copies between which other streams may go on."""


class VirtualStaging:
    """Ordinary memory standing for device staging, as long as this object lives.

    Attributes:
        address: of its first byte, aligned as cudaMalloc does.
        nbytes: its length.
    """

    def __init__(self, nbytes: int) -> None:
        self._memory = np.full(nbytes + STAGING_ALIGNMENT - 1, STALE, dtype=np.uint8)
        self.address = -(-int(self._memory.ctypes.data) // STAGING_ALIGNMENT) * STAGING_ALIGNMENT
        self.nbytes = nbytes


class VirtualDevice:
    """:class:`~sglang_hicache.io_backends.device.base.Device` on the virtual GPU that is current now.

    Args:
        stream_names: names, for reports, of the streams in the order in which a backend makes them.
    """

    name = "virtual"

    def __init__(self, stream_names: Iterable[str] = ("gather", "drain")) -> None:
        self._gpu: Gpu = torch_cuda.gpu
        self._names = itertools.chain(stream_names, itertools.repeat("background"))
        self._staging: list[Block] = []
        self._reader: Stream | None = None

    def new_stream(self) -> Stream:
        stream = Stream(of=self._gpu)
        stream.name = next(self._names)
        return stream

    def current_stream(self) -> Stream:
        return self._gpu.current

    def use_stream(self, stream: Stream) -> AbstractContextManager[object]:
        return torch_cuda.stream(stream)

    def record(self, stream: Stream) -> Event:
        event = Event()
        event.record(stream)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        stream.wait_event(event)

    def query(self, event: Event) -> bool:
        return event.query()

    def prepare_copies(self, geometry: PoolGeometry, registered: Sequence[tuple[int, int]] = ()) -> None:
        """Ordinary memory can always be written."""

    def prepare_gather(self, geometry: PoolGeometry) -> None:
        """Nothing to build."""

    def host_values(self, indices: Any, after: Event | None = None) -> npt.NDArray[np.int64]:
        """As on CUDA: a copy on a stream of its own, for which the host waits."""
        if self._reader is None:
            self._reader = Stream(of=self._gpu)
            self._reader.name = "indices"
        if after is None:
            self._reader.wait_stream(self._gpu.current)
        else:
            self._reader.wait_event(after)
        borrowed = self._gpu.memory.borrow(indices)
        values: list[npt.NDArray[np.int64]] = []
        self._reader.launch(
            Operation(
                "read indices",
                (lambda: values.append(borrowed.values().astype(np.int64).reshape(-1)),),
                reads=borrowed.bytes,
                engine="copy_d2h",
                uses=(borrowed,),
                nbytes=borrowed.bytes.nbytes,
            )
        )
        self._reader.synchronize()
        return values[0]

    def small_reads(self) -> None:
        """The host reads its memory itself."""

    def memory_free(self) -> None:
        """It is ordinary memory."""

    def allocate_staging(self, nbytes: int) -> VirtualStaging:
        staging = VirtualStaging(nbytes)
        self._staging.append(self._gpu.memory.block(staging._memory, "staging"))
        return staging

    def gather(
        self,
        staged: Staged,
        base: int,
        device_slots: Any,
        chunk: Chunk,
        stream: Stream,
        ctas: int,
    ) -> None:
        """As the seam says. The rows that it reads are declared by what ``device_slots`` holds now."""
        geometry = staged.geometry
        slots = self._gpu.memory.borrow(device_slots, "index tensor")
        staging = self._staging_at(base)
        work: list[Callable[[], None]] = []
        reads, writes = [slots.bytes], []
        now = geometry.slots_of(slots.values().reshape(-1))[chunk.start : chunk.stop]
        now = now[(now >= 0) & (now < geometry.device_slots)]
        page, offset = np.divmod(np.arange(chunk.tokens, dtype=np.int64), geometry.page_size)
        for part, to in zip(geometry.components, staged.parts, strict=True):
            to = replace(to, base=base + to.base)
            for layer in range(geometry.layers):
                reads.append(
                    ByteRanges.rows(part.device_rows[layer], part.device_row_stride, part.row_bytes, now)
                )
                for piece in range(to.pieces):
                    first = to.base + layer * to.layer + piece * to.piece
                    starts = first + page * to.page + offset * to.token
                    writes.append(ByteRanges.rows(0, 1, part.piece_bytes, starts))

                    def move(
                        part: Component = part, to: Any = to, layer: int = layer, piece: int = piece
                    ) -> None:
                        there = to if staging is None else replace(to, base=to.base + staging.shift)
                        rows = strided_rows(
                            there, staged.slots, geometry.page_size, part.piece_bytes, layer, piece
                        )
                        rows[page, offset] = _rows(geometry, part, layer, piece, slots, chunk)

                    work.append(move)
        stream.launch(
            Operation(
                "gather",
                work,
                reads=ByteRanges.union(reads),
                writes=ByteRanges.union(writes),
                d2h_on_sms=True,
                uses=(slots,) if staging is None else (slots, staging),
                nbytes=chunk.tokens * geometry.bytes_per_token,
            )
        )

    def copy(self, batch: CopyBatch, stream: Stream) -> None:
        """As the seam says. The driver has read the batch when it returns, so nothing of it is borrowed.

        Raises:
            CopyRefusedError: the legacy NULL stream.
        """
        if stream.cuda_stream == 0:
            raise CopyRefusedError("the legacy NULL stream takes no batched copies")
        if not len(batch):
            return
        dst, src, nbytes = (array.astype(np.int64) for array in (batch.dst, batch.src, batch.nbytes))
        staging = self._staging_at(int(src[0]))

        def move(part: slice) -> None:
            shift = 0 if staging is None else staging.shift
            for to, start, length in zip(
                dst[part].tolist(), (src[part] + shift).tolist(), nbytes[part].tolist(), strict=True
            ):
                ctypes.memmove(to, start, length)

        step = -(-len(batch) // _PIECES)
        stream.launch(
            Operation(
                "drain" if staging is not None else "copy",
                [partial(move, slice(start, start + step)) for start in range(0, len(batch), step)],
                reads=ByteRanges.of(np.stack([src, src + nbytes], axis=1)),
                writes=ByteRanges.of(np.stack([dst, dst + nbytes], axis=1)),
                engine="copy_d2h",
                uses=() if staging is None else (staging,),
                copies=len(batch),
                nbytes=batch.total_bytes,
            )
        )

    def _staging_at(self, address: int) -> Block | None:
        # The newest first: it may lie where one was that is gone.
        for block in reversed(self._staging):
            if block.start <= address < block.start + block.nbytes:
                return block
        return None


def _rows(
    geometry: PoolGeometry, part: Component, layer: int, piece: int, slots: Borrowed, chunk: Chunk
) -> npt.NDArray[np.uint8]:
    """Device rows of the chunk's tokens as uint8 [tokens, piece_bytes].

    An index that is out of range, as freed memory holds, reads poison: a GPU would read elsewhere or stop.
    """
    wanted = geometry.slots_of(slots.values().reshape(-1))[chunk.start : chunk.stop]
    inside = (wanted >= 0) & (wanted < geometry.device_slots)
    rows = np.full((chunk.tokens, part.piece_bytes), POISON, dtype=np.uint8)
    rows[inside] = rows_view(geometry, part, layer, piece)[wanted[inside]]
    return rows
