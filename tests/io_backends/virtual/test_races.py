"""The race checker: what it finds, what it says of it, and what that costs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from naive_races import Command, HostAccess, HostWait, Launch, Naive, Record, Wait
from programs import STREAMS, Pairs, programs, ranges

from sglang_hicache.bench.lab import checker_speed
from sglang_hicache.io_backends.virtual.races import Checker
from sglang_hicache.io_backends.virtual.ranges import ByteRanges


def check(program: list[Command]) -> Pairs:
    checker = Pairs()
    streams = [checker.add_stream(f"stream {nth}") for nth in range(STREAMS)]
    recorded: dict[int, Any] = {}
    for nth, command in enumerate(program):
        match command:
            case Launch(stream, reads, writes, sm_work):
                checker.launch(
                    streams[stream],
                    str(nth),
                    "program.py:1",
                    reads=ranges(reads),
                    writes=ranges(writes),
                    sm_work=sm_work,
                )
            case Record(event, stream):
                recorded[event] = checker.record(streams[stream])
            case Wait(stream, event) if event in recorded:
                checker.wait(streams[stream], recorded[event])
            case HostWait(event) if event in recorded:
                checker.host_waits(recorded[event])
            case HostAccess(reads, writes):
                checker.host_access(str(nth), "program.py:1", reads=ranges(reads), writes=ranges(writes))
    return checker


@settings(max_examples=400, deadline=None)
@given(programs)
@example([Launch(0, frozenset(), frozenset({1, 2}), None), Launch(1, frozenset({2, 3}), frozenset(), None)])
def test_it_finds_what_the_graph_says(program: list[Command]) -> None:
    """The same pairs as looking at all of them; of a stream's accesses to a byte, the one a fence must
    cover."""
    found = check(program).pairs
    assert len(found) == len(set(found)), "a pair is found once"
    assert set(found) == set(Naive(program).latest())


@settings(max_examples=200, deadline=None)
@given(programs)
def test_the_fences_it_asks_for_order_every_pair_that_races(program: list[Command]) -> None:
    naive = Naive(program)
    found = check(program).pairs
    assert set(found) <= set(naive.pairs)
    for pair in naive.pairs:
        assert any(
            reported.second == pair.second
            and (reported.first == pair.first or naive.ordered(pair.first, reported.first))
            for reported in found
        ), pair


@settings(max_examples=100, deadline=None)
@given(programs)
def test_sweeping_loses_nothing(program: list[Command]) -> None:
    from sglang_hicache.io_backends.virtual import shadow

    expected = check(program).pairs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shadow, "_FIRST_SWEEP", 0)
        assert check(program).pairs == expected


class Streams:
    """A checker with a forward and a transfer stream."""

    def __init__(self) -> None:
        self.checker = Checker()
        self.forward, self.transfer = (self.checker.add_stream(name) for name in ("forward", "transfer"))

    def launch(self, stream: int, name: str, issued: str = "here.py:1 in f", **accesses: Any) -> Any:
        return self.checker.launch(stream, name, issued, **accesses)

    def kinds(self) -> list[str]:
        return [race.kind for race in self.checker.races]


ROWS = ByteRanges.at(0x1000, 64)


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ({"writes": ROWS}, {"reads": ROWS}, "read_before_write"),
        ({"reads": ROWS}, {"writes": ROWS}, "write_after_read"),
        ({"writes": ROWS}, {"writes": ROWS}, "write_after_write"),
        ({"sm_work": "exclusive"}, {"sm_work": "d2h"}, "sm_overlap"),
        ({"sm_work": "d2h"}, {"sm_work": "exclusive"}, "sm_overlap"),
    ],
)
@pytest.mark.parametrize("fence", [False, True])
def test_kinds_and_the_fence_that_cures_them(first: Any, second: Any, kind: str, fence: bool) -> None:
    streams = Streams()
    streams.launch(streams.forward, "first", **first)
    if fence:
        streams.checker.wait(streams.transfer, streams.checker.record(streams.forward))
    streams.launch(streams.transfer, "second", **second)
    assert streams.kinds() == ([] if fence else [kind])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"reads": ROWS}, {"reads": ROWS}),
        ({"sm_work": "d2h"}, {"sm_work": "d2h"}),
        ({"sm_work": "exclusive"}, {"sm_work": "exclusive"}),
        ({"writes": ROWS}, {"writes": ByteRanges.at(0x1040, 64)}),
        ({"writes": ROWS}, {"reads": ByteRanges.of([(0xFC0, 0x1000), (0x1040, 0x1080)])}),
    ],
)
def test_what_may_run_side_by_side(first: Any, second: Any) -> None:
    streams = Streams()
    streams.launch(streams.forward, "first", **first)
    streams.launch(streams.transfer, "second", **second)
    assert streams.kinds() == []


def test_one_common_byte_of_large_ranges_is_enough() -> None:
    streams = Streams()
    streams.launch(streams.forward, "first", writes=ByteRanges.at(0, 1 << 30))
    streams.launch(
        streams.transfer, "second", reads=ByteRanges.of([((1 << 30) - 1, 1 << 31), (1 << 32, 1 << 33)])
    )
    (race,) = streams.checker.races
    assert race.bytes == ((1 << 30) - 1, 1 << 30)


def test_a_report_names_both_sides_and_the_fence() -> None:
    streams = Streams()
    streams.launch(streams.forward, "forward extend 7", "scheduler.py:10 in run_batch", writes=ROWS)
    streams.launch(streams.transfer, "gather", "hybrid.py:20 in submit", reads=ByteRanges.at(0x1020, 4))
    (race,) = streams.checker.races
    assert race.to_dict() == {
        "kind": "read_before_write",
        "first": {
            "operation": "forward extend 7",
            "stream": "forward",
            "issued": "scheduler.py:10 in run_batch",
            "mode": "write",
        },
        "second": {
            "operation": "gather",
            "stream": "transfer",
            "issued": "hybrid.py:20 in submit",
            "mode": "read",
        },
        "bytes": [0x1020, 0x1024],
        "fence": "stream 'transfer' must wait for an event recorded on stream 'forward' after "
        "'forward extend 7', before 'gather'",
        "count": 1,
    }


def test_the_same_two_places_are_one_report_with_a_count() -> None:
    streams = Streams()
    for nth in range(100):
        streams.launch(streams.forward, f"forward {nth}", "a.py:1", writes=ROWS)
        streams.launch(streams.transfer, f"gather {nth}", "b.py:1", reads=ROWS)
    reports = {race.kind: race for race in streams.checker.races}
    # A gather races with the forward before it; a forward with the gather before it.
    assert reports.keys() == {"read_before_write", "write_after_read"}
    assert reports["read_before_write"].count == 100
    assert reports["write_after_read"].count == 99
    assert reports["read_before_write"].first.operation == "forward 0"


class TestFree:
    """Index tensors and staging go to the next owner."""

    @pytest.mark.parametrize("known", [False, True])
    def test_memory_that_anybody_gets_must_be_done_with(self, known: bool) -> None:
        streams = Streams()
        used = streams.launch(streams.transfer, "gather", "hybrid.py:20 in submit")
        if known:
            streams.checker.host_waits(streams.checker.record(streams.transfer))
        assert streams.checker.free("index tensor", "node.py:3 in drop", [used]) is known
        if known:
            assert streams.checker.races == []
        else:
            (race,) = streams.checker.races
            assert race.kind == "use_after_free"
            assert (race.first.operation, race.first.mode) == ("gather", "uses")
            assert (race.second.operation, race.second.issued) == ("free index tensor", "node.py:3 in drop")
            assert race.fence == (
                "keep it until an event recorded on stream 'transfer' after 'gather' is complete, or call "
                "record_stream on it with stream 'transfer'"
            )

    @pytest.mark.parametrize("fence", [False, True])
    def test_torchs_allocator_gives_it_to_the_stream_it_was_taken_on(self, fence: bool) -> None:
        streams = Streams()
        used = streams.launch(streams.transfer, "gather")
        if fence:
            streams.checker.wait(streams.forward, streams.checker.record(streams.transfer))
        assert streams.checker.free("index tensor", "", [used], stream=streams.forward) is fence

    def test_its_own_stream_is_in_order(self) -> None:
        streams = Streams()
        used = streams.launch(streams.transfer, "gather")
        assert streams.checker.free("index tensor", "", [used], stream=streams.transfer)

    def test_record_stream_protects_on_that_stream_only(self) -> None:
        streams = Streams()
        uses = [streams.launch(streams.transfer, "gather"), streams.launch(streams.forward, "forward")]
        assert not streams.checker.free("index tensor", "", uses, protected=[streams.transfer])
        assert [race.first.operation for race in streams.checker.races] == ["forward"]
        assert streams.checker.free("index tensor", "", uses, protected=[streams.transfer, streams.forward])

    def test_whoever_gets_the_bytes_next_does_not_race_with_the_past(self) -> None:
        streams = Streams()
        streams.launch(streams.transfer, "gather", reads=ROWS)
        streams.checker.free("index tensor", "", [], memory=ByteRanges.at(0x1010, 16))
        streams.launch(streams.forward, "forward", writes=ByteRanges.at(0x1010, 16))
        assert streams.kinds() == []
        streams.launch(streams.forward, "forward", writes=ByteRanges.at(0x1020, 16))
        assert streams.kinds() == ["write_after_read"]


class TestCost:
    """Counted, not timed: checker_speed prints seconds."""

    def test_grows_with_the_number_of_operations_and_no_faster(self) -> None:
        small, large = checker_speed.serving(1_000), checker_speed.serving(8_000)
        assert small.races == large.races == []
        assert large.work < 8 * small.work * 1.2

    def test_is_bounded_by_the_memory_even_if_the_host_never_waits(self) -> None:
        small, large = (checker_speed.tangle(operations, rows=256) for operations in (1_000, 8_000))
        assert large.work < 8 * small.work * 1.5
        assert large.live < 2 * small.live

    def test_what_everything_later_is_ordered_behind_is_forgotten(self) -> None:
        """Rows that are never touched again, in a program whose host waits now and then."""
        checker = Checker()
        stream = checker.add_stream("forward")
        kept = []
        for nth in range(20_000):
            checker.launch(stream, "forward", "", writes=ByteRanges.at(nth * 128, 64))
            if nth % 100 == 99:
                checker.host_waits(checker.record(stream))
                kept.append(checker.live)
        assert max(kept) < 2_000
