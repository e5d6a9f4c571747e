"""What the race checker remembers of memory: for each byte, the accesses that a later one may race with."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Literal

AccessMode = Literal["read", "write"]

HOST_THREAD = -1
"""Instead of a stream's number."""


class Access:
    """One operation, as an access to memory.

    Attributes:
        stream: its stream's number, or :data:`HOST_THREAD`.
        number: its place among that stream's operations, from 1.
        operation: its name.
        issued: where it was asked for.
    """

    __slots__ = ("issued", "number", "operation", "stream")

    def __init__(self, stream: int, number: int, operation: str, issued: str) -> None:
        self.stream = stream
        self.number = number
        self.operation = operation
        self.issued = issued


Met = tuple[Access, AccessMode, int, int]
"""An earlier access that races, how it accessed, and ``[start, stop)`` of the bytes."""


class _Segment:
    """Bytes ``[start, stop)`` with one history: by stream, the last write and the last read that count."""

    __slots__ = ("reads", "start", "stop", "writes")

    def __init__(
        self,
        start: int,
        stop: int,
        writes: dict[int, Access] | None = None,
        reads: dict[int, Access] | None = None,
    ) -> None:
        self.start = start
        self.stop = stop
        self.writes = {} if writes is None else writes
        self.reads = {} if reads is None else reads

    def cut(self, start: int, stop: int) -> _Segment:
        return _Segment(start, stop, self.writes.copy(), self.reads.copy())


class Shadow:
    """A sorted map of segments.

    An access is forgotten when one of these covers its bytes: a write that is ordered behind it; a later
    access of the same mode on the same stream; or the host's knowledge that it is done, because whatever the
    host asks for later is ordered behind it.

    Args:
        host: by stream, up to which operation the host knows them to be done; looked at, never changed.
    """

    def __init__(self, host: Sequence[int]) -> None:
        self._host = host
        self._starts: list[int] = []
        self._segments: list[_Segment] = []
        self._sweep_at = _FIRST_SWEEP
        self.work = 0

    def live(self) -> int:
        return sum(len(segment.writes) + len(segment.reads) for segment in self._segments)

    def access(
        self, access: Access, mode: AccessMode, start: int, stop: int, clock: Sequence[int]
    ) -> list[Met]:
        """Put in an access to ``[start, stop)`` which everything in ``clock`` is ordered before.

        Returns:
            Those that it races with.
        """
        met: list[Met] = []
        if access.stream == HOST_THREAD:
            # The host's own accesses need no memory: whatever comes later is ordered behind them.
            for segment in self._over(start, stop):
                low, high = max(start, segment.start), min(stop, segment.stop)
                self._compare(segment, mode, low, high, clock, met)
            return met
        nth = self._first(start)
        if nth < len(self._segments):
            segment = self._segments[nth]
            if segment.start == start and segment.stop == stop:
                self._compare(segment, mode, start, stop, clock, met)
                self._enter(segment, access, mode, clock)
                return met
        end, position = nth, start
        pieces: list[_Segment] = []
        while end < len(self._segments) and self._segments[end].start < stop:
            segment = self._segments[end]
            if segment.start < start:
                pieces.append(segment.cut(segment.start, start))
            elif position < segment.start:
                self._add(pieces, _Segment(position, segment.start), access, mode, clock)
            low, high = max(start, segment.start), min(stop, segment.stop)
            self._compare(segment, mode, low, high, clock, met)
            self._add(pieces, segment.cut(low, high), access, mode, clock)
            if stop < segment.stop:
                pieces.append(segment.cut(stop, segment.stop))
            position = high
            end += 1
        if position < stop:
            self._add(pieces, _Segment(position, stop), access, mode, clock)
        self._replace(nth, end, pieces)
        return met

    def forget(self, start: int, stop: int) -> None:
        """What was at these bytes is gone; other memory may come to lie there."""
        nth = self._first(start)
        end = nth
        pieces = []
        while end < len(self._segments) and self._segments[end].start < stop:
            segment = self._segments[end]
            if segment.start < start:
                pieces.append(segment.cut(segment.start, start))
            if stop < segment.stop:
                pieces.append(segment.cut(stop, segment.stop))
            end += 1
        self._replace(nth, end, pieces)

    def _first(self, start: int) -> int:
        """The first segment that ends behind ``start``."""
        nth = bisect_right(self._starts, start) - 1
        return nth if nth >= 0 and self._segments[nth].stop > start else nth + 1

    def _over(self, start: int, stop: int) -> Iterator[_Segment]:
        nth = self._first(start)
        while nth < len(self._segments) and self._segments[nth].start < stop:
            yield self._segments[nth]
            nth += 1

    def _compare(
        self, segment: _Segment, mode: AccessMode, start: int, stop: int, clock: Sequence[int], met: list[Met]
    ) -> None:
        self.work += 1 + len(segment.writes)
        for stream, earlier in segment.writes.items():
            if earlier.number > clock[stream]:
                met.append((earlier, "write", start, stop))
        if mode == "write":
            self.work += len(segment.reads)
            for stream, earlier in segment.reads.items():
                if earlier.number > clock[stream]:
                    met.append((earlier, "read", start, stop))

    def _enter(self, segment: _Segment, access: Access, mode: AccessMode, clock: Sequence[int]) -> None:
        stream = access.stream
        if mode == "read":
            segment.reads[stream] = access
            return
        segment.writes = {s: a for s, a in segment.writes.items() if a.number > clock[s]}
        segment.reads = {s: a for s, a in segment.reads.items() if a.number > clock[s]}
        segment.writes[stream] = access

    def _add(
        self,
        pieces: list[_Segment],
        segment: _Segment,
        access: Access,
        mode: AccessMode,
        clock: Sequence[int],
    ) -> None:
        """Enter the access, and join what then has the same history as the piece just before it."""
        self._enter(segment, access, mode, clock)
        last = pieces[-1] if pieces else None
        if last is not None and last.writes == segment.writes and last.reads == segment.reads:
            last.stop = segment.stop
        else:
            pieces.append(segment)

    def _replace(self, nth: int, end: int, pieces: list[_Segment]) -> None:
        self._segments[nth:end] = pieces
        self._starts[nth:end] = [piece.start for piece in pieces]
        if len(self._segments) > self._sweep_at:
            self._sweep()

    def _sweep(self) -> None:
        """Leave out what the host knows to be done. Seldom enough to cost little for each access."""
        host = self._host
        self.work += len(self._segments)
        for segment in self._segments:
            segment.writes = {s: a for s, a in segment.writes.items() if a.number > host[s]}
            segment.reads = {s: a for s, a in segment.reads.items() if a.number > host[s]}
        self._segments = [segment for segment in self._segments if segment.writes or segment.reads]
        self._starts = [segment.start for segment in self._segments]
        self._sweep_at = max(_FIRST_SWEEP, 2 * len(self._segments))


_FIRST_SWEEP = 1024
"""Segments; below that there is nothing to gain."""
