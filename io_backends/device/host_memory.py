"""Batches made fit for the driver: no copy across two registered host ranges (empty ones it leaves out).

SGLang registers a large host buffer in several calls, and a copy that spans two registrations fails. Where
the GPU sees registered memory under another address (WSL2), the same table of ranges translates. Pure
functions of numbers: nothing here calls the driver.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..plan.copies import CopyBatch
from ..plan.geometry import PoolGeometry

SHORT = 16
"""Copies up to which Python goes through a batch faster than numpy."""


class UnknownHostMemoryError(ValueError):
    """A copy would write host memory that nobody has checked."""


@dataclass(frozen=True, slots=True)
class HostRange:
    """Host memory registered in one call.

    Attributes:
        start: address of its first byte.
        nbytes: its length.
        shift: what the GPU adds to a host address in it; 0 wherever host addresses work as they are.
    """

    start: int
    nbytes: int
    shift: int = 0

    @property
    def stop(self) -> int:
        """Address behind its last byte."""
        return self.start + self.nbytes


def drop_empty(batch: CopyBatch) -> CopyBatch:
    """``batch`` without its zero-byte copies, which cuMemcpyBatchAsync rejects; the same object if none."""
    if np.count_nonzero(batch.nbytes) == batch.nbytes.size:
        return batch
    some = batch.nbytes != 0
    return CopyBatch(dst=batch.dst[some], src=batch.src[some], nbytes=batch.nbytes[some])


def split_at(batch: CopyBatch, boundaries: npt.ArrayLike) -> CopyBatch:
    """``batch`` with every copy cut where its destination crosses one of ``boundaries``.

    Args:
        batch: copies without zero-byte ones.
        boundaries: ascending addresses [m]; a copy that starts or ends on one is left whole.

    Returns:
        The same bytes in the same order, and the same object when nothing crosses.
    """
    cuts = np.asarray(boundaries, dtype=np.uint64)
    stops = batch.dst + batch.nbytes
    first = np.searchsorted(cuts, batch.dst, side="right")
    inner = np.searchsorted(cuts, stops, side="left") - first
    if not inner.any():
        return batch
    pieces = inner + 1
    copy = np.repeat(np.arange(len(batch)), pieces)
    # Which piece of its copy each piece is: 0, 1, ... and 0 again.
    nth = np.arange(len(copy)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = batch.dst[copy]
    end = stops[copy]
    later = nth > 0
    begin[later] = cuts[(first[copy] + nth - 1)[later]]
    earlier = nth < inner[copy]
    end[earlier] = cuts[(first[copy] + nth)[earlier]]
    return CopyBatch(dst=begin, src=batch.src[copy] + (begin - batch.dst[copy]), nbytes=end - begin)


def host_extents(geometry: PoolGeometry) -> list[tuple[int, int]]:
    """(address, bytes) of a pool's host memory, as few as possible.

    K and V usually share one buffer; a hint at registered ranges where SGLang gave none.
    """
    extents: list[tuple[int, int]] = []
    size = geometry.layers * geometry.host_slots
    for start, nbytes in sorted((part.host.base, size * part.row_bytes) for part in geometry.components):
        if extents and sum(extents[-1]) == start:
            extents[-1] = (extents[-1][0], extents[-1][1] + nbytes)
        else:
            extents.append((start, nbytes))
    return extents


class HostRanges:
    """The host memory that copies may write, and how copies must be cut and shifted for it."""

    def __init__(self) -> None:
        self._ranges: list[HostRange] = []
        self._starts: list[int] = []
        self._plain_stops: list[int] = []
        self._shifts: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._boundaries: npt.NDArray[np.uint64] = np.empty(0, dtype=np.uint64)

    def add(self, ranges: Iterable[HostRange]) -> None:
        """Take ``ranges`` in; older ones that overlap them are gone (their memory was given back)."""
        new = list(ranges)
        kept = [r for r in self._ranges if not any(r.start < n.stop and n.start < r.stop for n in new)]
        self._ranges = sorted([*kept, *new], key=lambda r: r.start)
        self._starts = [r.start for r in self._ranges]
        # Nothing lies below 0: copies in a range with a shift never fit as they are.
        self._plain_stops = [0 if r.shift else r.stop for r in self._ranges]
        self._shifts = np.array([r.shift for r in self._ranges], dtype=np.int64)
        edges = {edge for r in self._ranges for edge in (r.start, r.stop)}
        self._boundaries = np.array(sorted(edges), dtype=np.uint64)

    def covers(self, extents: Sequence[tuple[int, int]]) -> bool:
        """Whether every byte of these (address, bytes) is in some range."""
        for start, nbytes in extents:
            position, stop = start, start + nbytes
            while position < stop:
                index = self._index(position)
                if index is None:
                    return False
                position = self._ranges[index].stop
        return True

    def place(self, batch: CopyBatch) -> CopyBatch:
        """``batch`` cut at range boundaries, its destinations as the GPU sees them.

        Raises:
            UnknownHostMemoryError: a copy writes outside all ranges; nothing was enqueued.
        """
        if self._fits_as_it_is(batch):
            return batch
        inside = self._inside(batch)
        if not inside.all():
            batch = drop_empty(batch)
            if not len(batch):
                return batch
            # Cut at every boundary, a copy lies in one range as a whole or outside all of them.
            batch = split_at(batch, self._boundaries)
            lost = np.flatnonzero(~self._inside(batch))
            if len(lost):
                raise UnknownHostMemoryError(
                    f"{len(lost)} of {len(batch)} copies write host memory that the device was not told of, "
                    f"the first {int(batch.nbytes[lost[0]])} bytes at {int(batch.dst[lost[0]]):#x}: "
                    "prepare_copies() must see a pool before its first write"
                )
        return self._shifted(batch) if self._shifts.any() else batch

    def _fits_as_it_is(self, batch: CopyBatch) -> bool:
        """Whether every copy of a short batch lies in a range without a shift; for a long one, False.

        A chunk that drains in two copies is the common case; numpy's calls would cost it ten times as much.
        """
        if len(batch) > SHORT:
            return False
        starts, stops = self._starts, self._plain_stops
        for start, nbytes in zip(batch.dst.tolist(), batch.nbytes.tolist(), strict=True):
            index = bisect_right(starts, start) - 1
            if index < 0 or start + nbytes > stops[index]:
                return False
        return True

    def _inside(self, batch: CopyBatch) -> npt.NDArray[np.bool_]:
        """Which copies lie in one range. Compares with each: there are few, and a search costs more."""
        stops = batch.dst + batch.nbytes
        low, high = int(batch.dst.min()), int(stops.max())
        inside = np.zeros(len(batch), dtype=np.bool_)
        for each in self._ranges:
            if each.start <= low and high <= each.stop:
                inside[:] = True
                break
            if each.start < high and low < each.stop:
                inside |= (batch.dst >= each.start) & (stops <= each.stop)
        return inside

    def _shifted(self, batch: CopyBatch) -> CopyBatch:
        starts = np.array(self._starts, dtype=np.uint64)
        shift = self._shifts[np.searchsorted(starts, batch.dst, side="right") - 1]
        dst = (batch.dst.astype(np.int64) + shift).astype(np.uint64)
        return CopyBatch(dst=dst, src=batch.src, nbytes=batch.nbytes)

    def _index(self, address: int) -> int | None:
        index = bisect_right(self._starts, address) - 1
        return index if index >= 0 and address < self._ranges[index].stop else None
