"""The staging ring: a bounded piece of device memory that gathers fill and copies drain, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .chunks import STAGING_ALIGNMENT, RingRoom

DrainEvent = Any
"""Whatever the ring's ``done`` understands."""


@dataclass(slots=True)
class Region:
    """Bytes ``[start, stop)`` of the ring, in use until ``drained``; None: not even enqueued.

    ``gap`` is that of the gather which fills it.
    """

    start: int
    stop: int
    gap: int
    drained: DrainEvent | None = None


ANY_GAP = 1 << 62
"""Later than every gap."""


class Ring:
    """Hands out regions first in, first out, to writers that run on one stream.

    What one of them has waited for, the later ones have too: the rest of a region that was handed out again
    in part needs no event.

    Args:
        nbytes: size of the ring.
        done: whether an event is complete.
    """

    def __init__(self, nbytes: int, done: Callable[[DrainEvent], bool]) -> None:
        self.nbytes = nbytes
        self._done = done
        self._regions: deque[Region] = deque()

    @property
    def used(self) -> int:
        """Bytes that are not drained yet."""
        self._retire()
        return sum(region.stop - region.start for region in self._regions)

    def take(self, nbytes: int, *, gap: int, before: int) -> tuple[Region, tuple[DrainEvent, ...]] | None:
        """A region of ``nbytes``, and the events its writer must wait for first.

        Args:
            nbytes: size of the region, rounded up to :data:`~.chunks.STAGING_ALIGNMENT`.
            gap: the present one.
            before: memory that is still being drained may be handed out, with its event to wait for, if it
                was taken in a gap before this one. None is returned where that is not so.

        Raises:
            ValueError: the ring is smaller than that.
            RuntimeError: memory comes round again whose drain was never enqueued (a mistake of the caller).
        """
        start, stop, last = self._place(nbytes)
        events: tuple[DrainEvent, ...] = ()
        if last is not None:
            if last.gap >= before:
                return None
            while True:
                oldest = self._regions.popleft()
                if oldest.drained is None:
                    raise RuntimeError("a region was handed out again before its drain was enqueued")
                if oldest is last:
                    break
            # Drains run in order on one stream: the last event covers the others.
            events = (last.drained,)
        region = Region(start, stop, gap)
        self._regions.append(region)
        return region, events

    def room(self, least: int, *, before: int) -> RingRoom | None:
        """What :meth:`take` would hand out now where it would put ``least`` bytes; None if it would not."""
        start, _, last = self._place(least)
        if last is not None and last.gap >= before:
            return None
        free = first = most = self.nbytes - start
        for region in self._regions:
            begin = region.start - start
            if 0 <= begin < free:
                free, first = begin, region.stop - start
            if 0 <= begin < most and region.gap >= before:
                most = begin
        return RingRoom(free, first, most)

    def _place(self, nbytes: int) -> tuple[int, int, Region | None]:
        """Where a region would begin and end, and the last of those in use that it would lie on."""
        size = -(-nbytes // STAGING_ALIGNMENT) * STAGING_ALIGNMENT
        if size > self.nbytes:
            raise ValueError(f"a region of {size} bytes does not fit a ring of {self.nbytes} bytes")
        self._retire()
        regions = self._regions
        start = regions[-1].stop if regions else 0
        if start + size > self.nbytes:
            start = 0
        stop, last = start + size, None
        # Regions are retired in order, so whatever overlaps is at the old end.
        for region in regions:
            if region.start < stop and start < region.stop:
                last = region
        return start, stop, last

    def _retire(self) -> None:
        """Forget what is drained, oldest first."""
        regions = self._regions
        while regions and (drained := regions[0].drained) is not None and self._done(drained):
            regions.popleft()
