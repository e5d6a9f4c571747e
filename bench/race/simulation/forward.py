"""The model: forwards that write KV rows of their tokens in every layer, and read those of their context.

What a row holds is a function of its token, position, layer and component. So any row, on the device or the
host, says by itself whether it is the right one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ....io_backends.virtual import gpu
from ....io_backends.virtual.operations import Operation
from ....io_backends.virtual.ranges import ByteRanges
from ....io_backends.virtual.sites import hide
from .kernels import StridedRows

# Reports name the scheduler.
hide(__name__)

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

EXCLUSIVE: dict[tuple[str, str], str] = {
    ("fa3", "sm90"): "#20611: FA3 crashed while SM copies to the host ran beside it (8xH100)",
}
"""(attention backend, architecture) whose forwards must not share the SMs with write-back work, and the
report.

Evidence, not policy: what a policy fences beyond this it does on likeness, and the checker must not take its
word.
"""


def is_exclusive(attention_backend: object, gpu_arch: object) -> bool:
    """Whether a crash of such forwards beside SM-side write-back has been reported."""
    return (str(attention_backend), str(gpu_arch).rstrip("af")) in EXCLUSIVE


def contents(tokens: npt.ArrayLike, positions: npt.ArrayLike) -> Words:
    """What makes a token's rows its own: uint64 [n]."""
    return np.asarray(tokens, dtype=np.uint64) << np.uint64(24) | np.asarray(positions, dtype=np.uint64)


class LayerBuffer:
    """One component (K, V or the latent) of one layer, on the device: uint64 [slots, words]."""

    def __init__(self, number: int, tensor: Any) -> None:
        self.rows = StridedRows.of(tensor)
        self._salt = np.uint64(number + 1) << np.uint64(56)
        self._words = np.arange(self.rows.nbytes // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._view = tensor.view(torch.uint8).numpy().reshape(len(tensor), -1).view(np.uint64)

    def expected(self, tags: Words) -> Words:
        """Rows of these contents, uint64 [n, words]."""
        return (tags | self._salt)[:, None] * np.uint64(0xD1342543DE82EF95) + self._words

    def fill(self, value: int) -> None:
        self._view.view(np.uint8).fill(value)

    def write(self, slots: Ints, tags: Words) -> None:
        self._view[slots] = self.expected(tags)

    def clear(self, slots: Ints) -> None:
        self._view[slots] = 0

    def copy(self, to: Ints, source: Ints) -> None:
        self._view[to] = self._view[source]

    def wrong(self, slots: Ints, tags: Words) -> int:
        """How many of these rows hold something else."""
        return int((self._view[slots] != self.expected(tags)).any(axis=1).sum())


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """What a forward works on: slots and contents of the rows that it writes, and of those that it reads.

    Attributes:
        ms: of model time for each layer; None: by its bytes.
    """

    name: str
    written: Ints
    written_tags: Words
    read: Ints
    read_tags: Words
    exclusive: bool
    ms: float | None = None


class Forward:
    """Launches forwards on the current stream.

    Args:
        layers: memories of each layer of the target model, then of the draft's.
        waits: called before each layer's launch, as the attention does when it takes the layer's buffers; it
            makes the current stream wait for loads of that layer.
    """

    def __init__(self, layers: Sequence[Sequence[LayerBuffer]], waits: Sequence[Any]) -> None:
        self._layers = layers
        self._waits = waits
        self.wrong_reads = 0

    def launch_layers(self, batch: ForwardBatch, layers: Iterable[int] | None = None) -> None:
        """``layers``: without it all of them, the draft's behind the target's."""
        for layer in range(len(self._layers)) if layers is None else layers:
            memories = self._layers[layer]
            self._waits[layer]()
            work = [
                *(functools.partial(memory.write, batch.written, batch.written_tags) for memory in memories),
                *(functools.partial(self._read, memory, batch) for memory in memories),
            ]
            gpu.current_stream().launch(
                Operation(
                    f"{batch.name}, layer {layer}",
                    work=work,
                    reads=bytes_of(memories, batch.read),
                    writes=bytes_of(memories, batch.written),
                    engine="sm",
                    exclusive_sms=batch.exclusive,
                    ms=batch.ms,
                )
            )

    def _read(self, memory: LayerBuffer, batch: ForwardBatch) -> None:
        self.wrong_reads += memory.wrong(batch.read, batch.read_tags)


def bytes_of(memories: Sequence[LayerBuffer], slots: Ints) -> ByteRanges:
    """Where these rows of all ``memories`` are."""
    return ByteRanges.of(np.concatenate([memory.rows.spans(slots) for memory in memories]))
