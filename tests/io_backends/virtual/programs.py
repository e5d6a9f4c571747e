"""Random programs of streams, events and accesses, and what the race checker finds in one."""

from __future__ import annotations

from typing import Any

import naive_races
from hypothesis import strategies as st
from naive_races import HostAccess, HostWait, Launch, Pair, Record, Wait

from sglang_hicache.io_backends.virtual.races import Checker
from sglang_hicache.io_backends.virtual.ranges import ByteRanges

STREAMS, EVENTS, MEMORY = 4, 3, 12


class Pairs(Checker):
    """Writes down each pair. Operations' names are their places in the program."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[Pair] = []

    def found(
        self, kind: Any, first: Any, first_mode: str, second: Any, second_mode: str, where: Any
    ) -> None:
        self.pairs.append(Pair(int(first.operation), first_mode, int(second.operation), second_mode))
        super().found(kind, first, first_mode, second, second_mode, where)


def ranges(touched: naive_races.Bytes) -> ByteRanges:
    return ByteRanges.of([(byte, byte + 1) for byte in touched])


_bytes = st.frozensets(st.integers(0, MEMORY - 1), max_size=6)
_stream = st.integers(0, STREAMS - 1)
_event = st.integers(0, EVENTS - 1)
_launch = st.builds(Launch, _stream, _bytes, _bytes, st.sampled_from([None, None, None, "d2h", "exclusive"]))
programs = st.lists(
    st.one_of(
        _launch,
        _launch,
        st.builds(Record, _event, _stream),
        st.builds(Wait, _stream, _event),
        st.builds(HostWait, _event),
        st.builds(HostAccess, _bytes, _bytes),
    ),
    max_size=40,
)
