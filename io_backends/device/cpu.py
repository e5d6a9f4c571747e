"""The CPU engine: device memory is ordinary memory, and work is done the moment it is enqueued.

It serves tests and demonstrations of a real server without a GPU. Order is program order, so every fence
holds trivially here; that fences are *needed* and *there* is shown elsewhere, by counting them and by the
virtual device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..plan.chunks import Chunk, Staged
from ..plan.copies import CopyBatch
from ..plan.geometry import Component, HostStrides, PoolGeometry


@dataclass(frozen=True, slots=True)
class CpuStream:
    """Names an order that is the program's own."""

    label: str = "cpu"


@dataclass(frozen=True, slots=True)
class CpuEvent:
    """Always complete: what precedes it ran before it was made."""


class CpuStaging:
    """Ordinary memory standing for device staging."""

    def __init__(self, nbytes: int) -> None:
        self._memory = np.zeros(nbytes, dtype=np.uint8)
        self.address = int(self._memory.ctypes.data)
        self.nbytes = nbytes


class CpuDevice:
    """:class:`~sglang_hicache.io_backends.device.base.Device` on ordinary memory."""

    name = "cpu"

    def __init__(self) -> None:
        self._current: CpuStream = CpuStream()

    def new_stream(self) -> CpuStream:
        return CpuStream("background")

    def current_stream(self) -> CpuStream:
        return self._current

    @contextmanager
    def use_stream(self, stream: CpuStream) -> Iterator[None]:
        previous, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = previous

    def record(self, stream: CpuStream) -> CpuEvent:
        return CpuEvent()

    def wait(self, stream: CpuStream, event: CpuEvent) -> None:
        """Nothing to do: the work before ``event`` is done."""

    def query(self, event: CpuEvent) -> bool:
        return True

    def prepare_copies(self, geometry: PoolGeometry, registered: Sequence[tuple[int, int]] = ()) -> None:
        """Ordinary memory can always be written."""

    def prepare_gather(self, geometry: PoolGeometry) -> None:
        """Nothing to build."""

    def host_values(self, indices: npt.ArrayLike, after: CpuEvent | None = None) -> npt.NDArray[np.int64]:
        return np.asarray(indices, dtype=np.int64)

    def small_reads(self) -> None:
        """Nothing here is read by a copy."""

    def memory_free(self) -> None:
        """Ordinary memory is not SGLang's to run out of."""

    def allocate_staging(self, nbytes: int) -> CpuStaging:
        return CpuStaging(nbytes)

    def gather(
        self,
        staged: Staged,
        base: int,
        device_slots: npt.ArrayLike,
        chunk: Chunk,
        stream: CpuStream,
        ctas: int,
    ) -> None:
        geometry = staged.geometry
        slots = geometry.slots_of(np.asarray(device_slots, dtype=np.int64))
        rows = slots[chunk.start : chunk.stop]
        page, offset = np.divmod(np.arange(chunk.tokens), geometry.page_size)
        for part, strides in zip(geometry.components, staged.parts, strict=True):
            to = replace(strides, base=base + strides.base)
            for layer in range(geometry.layers):
                for piece in range(to.pieces):
                    target = strided_rows(
                        to, staged.slots, geometry.page_size, part.piece_bytes, layer, piece
                    )
                    target[page, offset] = rows_view(geometry, part, layer, piece)[rows]

    def copy(self, batch: CopyBatch, stream: CpuStream) -> None:
        move = ctypes.memmove
        for dst, src, nbytes in zip(
            batch.dst.tolist(), batch.src.tolist(), batch.nbytes.tolist(), strict=True
        ):
            move(dst, src, nbytes)


def rows_view(geometry: PoolGeometry, part: Component, layer: int, piece: int) -> npt.NDArray[np.uint8]:
    """Device rows of one layer and piece as uint8 [device_slots, piece_bytes], in place."""
    return _view(
        part.device_rows[layer] + piece * part.piece_bytes,
        (geometry.device_slots, part.piece_bytes),
        (part.device_row_stride, 1),
    )


def host_view(geometry: PoolGeometry, part: Component, layer: int, piece: int) -> npt.NDArray[np.uint8]:
    """Host rows of one layer and piece as uint8 [pages, page_size, piece_bytes], in place.

    Where the slots are not whole pages, the last page reaches beyond the buffer and must not be indexed
    there.
    """
    return strided_rows(part.host, geometry.host_slots, geometry.page_size, part.piece_bytes, layer, piece)


def strided_rows(
    to: HostStrides, slots: int, page_size: int, piece_bytes: int, layer: int, piece: int
) -> npt.NDArray[np.uint8]:
    """:func:`host_view` of any memory with a host layout's strides."""
    return _view(
        to.base + layer * to.layer + piece * to.piece,
        (-(-slots // page_size), page_size, piece_bytes),
        (to.page, to.token, 1),
    )


def _view(address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * extent).from_address(address))
    return np.lib.stride_tricks.as_strided(memory, shape, strides)
