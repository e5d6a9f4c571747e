"""The race checker's specification: a graph of who is before whom, and every pair of accesses looked at.

Nodes are what the host asks for, edges what CUDA promises, order is reachability. Slow, and short enough to
be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Bytes = frozenset[int]


@dataclass(frozen=True)
class Launch:
    stream: int
    reads: Bytes
    writes: Bytes
    sm_work: Literal["d2h", "exclusive"] | None


@dataclass(frozen=True)
class Record:
    event: int
    stream: int


@dataclass(frozen=True)
class Wait:
    stream: int
    event: int


@dataclass(frozen=True)
class HostWait:
    event: int


@dataclass(frozen=True)
class HostAccess:
    reads: Bytes
    writes: Bytes


Command = Launch | Record | Wait | HostWait | HostAccess


class Pair(NamedTuple):
    """Two commands, by place in the program, that race, and how each accesses."""

    first: int
    first_mode: str
    second: int
    second_mode: str


class Naive:
    """All races of a program.

    Args:
        blocking: streams that synchronize with stream 0, which is the legacy default stream if there are any.

    Attributes:
        pairs: of each pair, the bytes (none for SM work).
    """

    def __init__(self, program: list[Command], blocking: frozenset[int] = frozenset()) -> None:
        self.program = program
        self.blocking = blocking
        self.before = self._order()
        self.pairs: dict[Pair, set[int]] = {}
        for second, late in enumerate(program):
            for first, early in enumerate(program[:second]):
                if isinstance(early, Launch) and not self.ordered(first, second):
                    self._compare(first, early, second, late)

    def ordered(self, first: int, second: int) -> bool:
        return bool(self.before[second] >> first & 1)

    def latest(self) -> dict[Pair, set[int]]:
        """Pairs and bytes without those where a later access than the first stands for it.

        It does if it is ordered behind the first, touches the byte, and conflicts with all that the first
        does.
        """
        left = {}
        for pair, where in self.pairs.items():
            kept = {byte for byte in where if not self._stood_for(pair, byte)}
            if kept or (not where and not self._sm_stood_for(pair)):
                left[pair] = kept
        return left

    def _order(self) -> list[int]:
        """For each command, the set of those before it as bits."""
        before = [0] * len(self.program)
        last: dict[int, int] = {}
        recorded: dict[int, int] = {}
        host = 0
        for nth, command in enumerate(self.program):
            mine = host
            if isinstance(command, Wait) and command.event not in recorded:
                continue  # nothing is enqueued
            if isinstance(command, Launch | Record | Wait):
                for stream in {command.stream} | self._implicit(command.stream):
                    if stream in last:
                        mine |= before[last[stream]] | 1 << last[stream]
            if isinstance(command, Wait | HostWait) and command.event in recorded:
                at = recorded[command.event]
                mine |= before[at] | 1 << at
            before[nth] = mine
            if isinstance(command, HostWait | HostAccess):
                host = mine | 1 << nth
            else:
                last[command.stream] = nth
            if isinstance(command, Record):
                recorded[command.event] = nth
        return before

    def _implicit(self, stream: int) -> frozenset[int]:
        """Streams that what is enqueued on ``stream`` now comes after, whatever is recorded."""
        if stream == 0:
            return self.blocking
        return frozenset({0}) if stream in self.blocking else frozenset()

    def _compare(self, first: int, early: Launch, second: int, late: Command) -> None:
        if not isinstance(late, Launch | HostAccess):
            return
        for modes, where in {
            ("write", "read"): early.writes & late.reads,
            ("write", "write"): early.writes & late.writes,
            ("read", "write"): early.reads & late.writes,
        }.items():
            if where:
                self.pairs[Pair(first, modes[0], second, modes[1])] = set(where)
        if isinstance(late, Launch) and {early.sm_work, late.sm_work} == {"d2h", "exclusive"}:
            self.pairs[Pair(first, "runs", second, "runs")] = set()

    def _stood_for(self, pair: Pair, byte: int) -> bool:
        early = self.program[pair.first]
        assert isinstance(early, Launch)
        if pair.first_mode == "read" and byte in early.writes:
            return True  # by its own write
        for nth in range(pair.first + 1, pair.second):
            later = self.program[nth]
            if not isinstance(later, Launch) or not self.ordered(pair.first, nth):
                continue
            if byte in later.writes:
                return True
            if pair.first_mode == "read" and later.stream == early.stream and byte in later.reads:
                return True
        return False

    def _sm_stood_for(self, pair: Pair) -> bool:
        early = self.program[pair.first]
        assert isinstance(early, Launch)
        between = self.program[pair.first + 1 : pair.second]
        return any(
            isinstance(later, Launch) and (later.stream, later.sm_work) == (early.stream, early.sm_work)
            for later in between
        )
