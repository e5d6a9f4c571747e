"""The race checker: which accesses to the same bytes does nothing order?

An access is ordered before another when a chain of streams, events and waits of the host leads from one to
the other (happens-before). That is kept in vector clocks: each stream numbers its operations, and a clock
says for each stream up to which number everything is known to be done first. Two accesses of which one
writes, that meet in at least one byte and have no such order, are a race, in whatever order they ran this
time.

Everything is told in the order in which the one host thread asked for it. So an access can only race with
earlier ones, and of those only the latest must be kept: once another access to the same bytes is ordered
behind it and conflicts with at least as much, whoever races with the earlier one races with the later one
too, and the fence that orders the later one orders both. See :class:`~.shadow.Shadow`.

Nothing here knows of torch, of memory that is really there, or of SGLang.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .ranges import NOTHING, ByteRanges
from .shadow import HOST_THREAD, Access, AccessMode, Shadow

RaceKind = Literal[
    "read_before_write", "write_after_read", "write_after_write", "sm_overlap", "use_after_free"
]

KINDS: tuple[RaceKind, ...] = (
    "read_before_write",
    "write_after_read",
    "write_after_write",
    "sm_overlap",
    "use_after_free",
)

VectorClock = tuple[int, ...]
"""For each stream, by number: how many of its operations are ordered before. Streams beyond its end: none."""

SmUse = Literal["d2h", "exclusive"]
"""Work on the SMs that moves rows to the host, and forwards that must not share the SMs with it."""

_KIND_OF: Mapping[tuple[AccessMode, AccessMode], RaceKind] = {
    ("write", "read"): "read_before_write",
    ("read", "write"): "write_after_read",
    ("write", "write"): "write_after_write",
}

HOST = "host"
"""The stream's name in reports for what the host thread does."""


@dataclass(frozen=True, slots=True)
class Side:
    """One access of a race.

    Attributes:
        operation: its name.
        stream: the stream's name, or :data:`HOST`.
        issued: ``package/module.py:line in function``.
        mode: ``read``, ``write``, or ``runs`` (on the SMs), ``uses`` or ``frees`` (an object).
    """

    operation: str
    stream: str
    issued: str
    mode: str


@dataclass(slots=True)
class Race:
    """Two accesses that nothing orders; ``first`` was asked for earlier.

    Attributes:
        bytes: ``[start, stop)`` of the first bytes in which they meet; None where it is not about bytes.
        fence: a sentence with the fence that would have ordered them.
        count: how many pairs of operations from these two places raced like this.
    """

    kind: RaceKind
    first: Side
    second: Side
    bytes: tuple[int, int] | None
    fence: str
    count: int = 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind,
            "first": _side_dict(self.first),
            "second": _side_dict(self.second),
            "bytes": None if self.bytes is None else list(self.bytes),
            "fence": self.fence,
            "count": self.count,
        }

    def __str__(self) -> str:
        def text(side: Side) -> str:
            return f"'{side.operation}' on stream '{side.stream}' {side.mode} ({side.issued})"

        times = f", {self.count} times" if self.count > 1 else ""
        return f"{self.kind}: {text(self.first)} and {text(self.second)}{times}: {self.fence}"


class Checker:
    """Takes in what the host asks for, in that order, and finds the races in it.

    Attributes:
        work: how often a piece of memory was compared with an access; what the checker's time is made of.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._clocks: list[list[int]] = []
        self._counts: list[int] = []
        # What the host knows to be done.
        self._host: list[int] = []
        self._shadow = Shadow(self._host)
        # The last operation of each stream that runs on the SMs, by what must not run beside it.
        self._on_sms: dict[SmUse, dict[int, Access]] = {"d2h": {}, "exclusive": {}}
        self._races: dict[tuple[Any, ...], Race] = {}

    @property
    def races(self) -> list[Race]:
        """What was found, each pair of places in the program once."""
        return list(self._races.values())

    @property
    def work(self) -> int:
        """Accesses compared so far: the cost of checking, whatever the machine's speed."""
        return self._shadow.work

    @property
    def live(self) -> int:
        """Accesses that are kept because a later one may still race with them."""
        return self._shadow.live()

    def add_stream(self, name: str) -> int:
        """A new stream; returns its number."""
        number = len(self._names)
        self._names.append(name)
        for clock in self._clocks:
            clock.append(0)
        self._host.append(0)
        self._counts.append(0)
        self._clocks.append([0] * len(self._names))
        return number

    def rename(self, stream: int, name: str) -> None:
        """Call a stream, by its number, ``name`` in reports from now on."""
        self._names[stream] = name

    def launch(
        self,
        stream: int,
        operation: str,
        issued: str,
        *,
        reads: ByteRanges = NOTHING,
        writes: ByteRanges = NOTHING,
        sm_work: SmUse | None = None,
    ) -> Access:
        """The host enqueues an operation. Returns what :meth:`free` wants to know of it."""
        clock = self._clocks[stream]
        # What the host knew when it asked; that is why neither events nor new streams need to carry it.
        _join(clock, self._host)
        self._counts[stream] += 1
        clock[stream] = self._counts[stream]
        access = Access(stream, self._counts[stream], operation, issued)
        self._check_bytes(access, clock, reads, writes)
        if sm_work is not None:
            other: SmUse = "exclusive" if sm_work == "d2h" else "d2h"
            for earlier in self._on_sms[other].values():
                if earlier.number > clock[earlier.stream]:
                    self.found("sm_overlap", earlier, "runs", access, "runs", None)
            self._on_sms[sm_work][stream] = access
        return access

    def record(self, stream: int) -> VectorClock:
        """An event is recorded: what its waiters wait for."""
        return tuple(self._clocks[stream])

    def wait(self, stream: int, recorded: VectorClock) -> None:
        """``stream`` goes on only behind what was recorded."""
        _join(self._clocks[stream], recorded)

    def host_waits(self, recorded: VectorClock) -> None:
        """The host has waited for, or has seen complete, what was recorded."""
        _join(self._host, recorded)

    def host_access(
        self, operation: str, issued: str, *, reads: ByteRanges = NOTHING, writes: ByteRanges = NOTHING
    ) -> None:
        """The host thread reads or writes memory, now. Everything it asks for later is ordered behind
        that.
        """
        self._check_bytes(Access(HOST_THREAD, 0, operation, issued), self._host, reads, writes)

    def free(
        self,
        what: str,
        issued: str,
        users: Iterable[Access],
        *,
        memory: ByteRanges = NOTHING,
        stream: int | None = None,
        protected: Iterable[int] = (),
    ) -> bool:
        """The last owner of memory lets go.

        Args:
            what: the memory's name, for reports.
            issued: where it was let go, for reports.
            users: the last operation of each stream that uses it.
            memory: where it is; whoever gets those bytes next does not race with the accesses so far.
            stream: the memory goes only to work that follows on this stream (torch's caching allocator);
                None: to anybody, at once.
            protected: streams whose work it outlives in any case (``record_stream``).

        Returns:
            Whether no operation can still run on it.
        """
        clock = list(self._host)
        if stream is not None:
            _join(clock, self._clocks[stream])
        kept = set(protected)
        safe = True
        freed = Access(HOST_THREAD, 0, f"free {what}", issued)
        for user in users:
            if user.number > clock[user.stream] and user.stream not in kept:
                self.found("use_after_free", user, "uses", freed, "frees", None)
                safe = False
        for start, stop in memory.spans.tolist():
            self._shadow.forget(start, stop)
        return safe

    def found(
        self,
        kind: RaceKind,
        first: Access,
        first_mode: str,
        second: Access,
        second_mode: str,
        where: tuple[int, int] | None,
    ) -> None:
        """Keep a race; called once for each pair of operations and kind."""
        key = (kind, first.stream, first.issued, second.stream, second.issued)
        known = self._races.get(key)
        if known is not None:
            known.count += 1
            return
        one = Side(first.operation, self._name(first), first.issued, first_mode)
        other = Side(second.operation, self._name(second), second.issued, second_mode)
        self._races[key] = Race(kind, one, other, where, _fence(kind, one, other))

    def _check_bytes(self, access: Access, clock: list[int], reads: ByteRanges, writes: ByteRanges) -> None:
        met: dict[tuple[int, RaceKind], tuple[Access, AccessMode, AccessMode, int, int]] = {}
        modes: tuple[tuple[AccessMode, ByteRanges], ...] = (("read", reads), ("write", writes))
        for mode, ranges in modes:
            for start, stop in ranges.spans.tolist():
                for earlier, before, low, high in self._shadow.access(access, mode, start, stop, clock):
                    met.setdefault((id(earlier), _KIND_OF[before, mode]), (earlier, before, mode, low, high))
        for (_, kind), (earlier, before, mode, low, high) in met.items():
            self.found(kind, earlier, before, access, mode, (low, high))

    def _name(self, access: Access) -> str:
        return HOST if access.stream == HOST_THREAD else self._names[access.stream]


def _join(clock: list[int], other: Iterable[int]) -> None:
    """Pointwise maximum, in place; ``other`` may know fewer streams."""
    for stream, number in enumerate(other):
        if number > clock[stream]:
            clock[stream] = number


def _side_dict(side: Side) -> dict[str, str]:
    return {
        "operation": side.operation,
        "stream": side.stream,
        "issued": side.issued,
        "mode": side.mode,
    }


def _fence(kind: RaceKind, first: Side, second: Side) -> str:
    event = f"an event recorded on stream '{first.stream}' after '{first.operation}'"
    if kind == "use_after_free":
        return f"keep it until {event} is complete, or call record_stream on it with stream '{first.stream}'"
    if second.stream == HOST:
        return f"the host must wait for {event} before '{second.operation}'"
    return f"stream '{second.stream}' must wait for {event}, before '{second.operation}'"
