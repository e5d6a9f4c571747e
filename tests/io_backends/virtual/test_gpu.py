"""The virtual torch.cuda keeps CUDA's promises, and only those."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sglang_hicache.io_backends.virtual import gpu as cuda
from sglang_hicache.io_backends.virtual import sites
from sglang_hicache.io_backends.virtual.gpu import Event, Hang, Stream
from sglang_hicache.io_backends.virtual.operations import Operation
from sglang_hicache.io_backends.virtual.ranges import ByteRanges

SEEDS = range(50)


def do(stream: Stream, *work: Callable[[], object], name: str = "work") -> None:
    stream.launch(Operation(name, work))


def orders(program: Callable[[list[str]], None]) -> set[str]:
    """What a program writes down, over many seeds, until all of it has run."""
    seen = set()
    for seed in SEEDS:
        device = cuda.reset(seed)
        log: list[str] = []
        program(log)
        device.finish()
        seen.add("".join(log))
    return seen


def test_streams_run_in_order_and_beside_each_other() -> None:
    def program(log: list[str]) -> None:
        one, other = Stream(), Stream()
        do(one, lambda: log.append("a"))
        do(other, lambda: log.append("b"))
        do(one, lambda: log.append("c"))

    assert orders(program) == {"abc", "bac", "acb"}


def test_a_fence_orders_what_follows_it() -> None:
    def program(log: list[str]) -> None:
        one, other = Stream(), Stream()
        do(one, lambda: log.append("a"))
        other.wait_stream(one)
        do(other, lambda: log.append("b"))
        do(one, lambda: log.append("c"))

    assert orders(program) == {"abc", "acb"}


def test_operations_in_flight_interleave() -> None:
    def program(log: list[str]) -> None:
        for stream, name in ((Stream(), "a"), (Stream(), "b")):
            do(stream, *[lambda name=name: log.append(name)] * 2)

    assert orders(program) == {"aabb", "abab", "abba", "bbaa", "baba", "baab"}


def test_in_some_seeds_a_stream_is_starved() -> None:
    def program(log: list[str]) -> None:
        one, other = Stream(), Stream()
        one.held = other.held = True
        do(one, *[lambda: log.append("a")] * 30)
        do(other, lambda: log.append("b"))
        one.held = other.held = False

    assert {"a" * 30 + "b", "b" + "a" * 30} < orders(program)


class TestLegacyDefaultStream:
    """Handle 0: what is enqueued there comes after, and before, the work of blocking streams."""

    @staticmethod
    def around_the_default(blocking: bool) -> set[str]:
        def program(log: list[str]) -> None:
            stream = Stream(blocking=blocking)
            do(stream, lambda: log.append("a"))
            do(cuda.default_stream(), lambda: log.append("b"))
            do(stream, lambda: log.append("c"))

        return orders(program)

    def test_it_orders_blocking_streams(self) -> None:
        assert self.around_the_default(blocking=True) == {"abc"}

    def test_it_does_not_order_torchs_streams(self) -> None:
        assert self.around_the_default(blocking=False) == {"abc", "bac", "acb"}

    def test_blocking_streams_are_not_ordered_among_themselves(self) -> None:
        def program(log: list[str]) -> None:
            for name in "ab":
                do(Stream(blocking=True), lambda name=name: log.append(name))

        assert orders(program) == {"ab", "ba"}

    def test_an_event_recorded_on_it_follows_blocking_streams(self) -> None:
        def program(log: list[str]) -> None:
            do(Stream(blocking=True), lambda: log.append("a"))
            event = cuda.default_stream().record_event()
            waiting = Stream()
            waiting.wait_event(event)
            do(waiting, lambda: log.append("b"))

        assert orders(program) == {"ab"}

    @pytest.mark.parametrize("blocking", [True, False])
    def test_the_race_checker_knows(self, blocking: bool) -> None:
        device = cuda.reset(0)
        rows = ByteRanges.at(0, 16)
        before, after = Stream(blocking=blocking), Stream(blocking=blocking)
        before.launch(Operation("before", writes=rows))
        cuda.default_stream().launch(Operation("default", reads=rows))
        after.launch(Operation("after", writes=rows))
        found = {(race.first.operation, race.second.operation) for race in device.races()}
        assert found == (
            set() if blocking else {("before", "default"), ("default", "after"), ("before", "after")}
        )

    def test_it_is_current_at_first_and_has_handle_0(self) -> None:
        cuda.reset(0)
        assert cuda.current_stream() is cuda.default_stream()
        assert cuda.current_stream().cuda_stream == 0
        with cuda.stream(chosen := Stream()):
            assert cuda.current_stream() is chosen
            with cuda.stream(None):
                assert cuda.current_stream() is chosen
        assert cuda.current_stream() is cuda.default_stream()


@pytest.mark.parametrize("seed", SEEDS)
class TestEvent:
    def test_never_recorded_is_complete_and_nothing_to_wait_for(self, seed: int) -> None:
        cuda.reset(seed)
        stream, event = Stream(), Event()
        assert event.query()
        stream.wait_event(event)
        event.record(held := Stream())
        held.held = True
        stream.synchronize()

    def test_recorded_again_it_means_the_new_place(self, seed: int) -> None:
        cuda.reset(seed)
        first, second, waiting = Stream(), Stream(), Stream()
        second.held = True
        event = first.record_event()
        waiting.wait_event(event)
        event.record(second)
        # Who waited before waits for the first place only.
        waiting.synchronize()
        assert not event.query()
        waiting.wait_event(event)
        with pytest.raises(Hang):
            waiting.synchronize()

    def test_it_is_complete_when_its_place_is_reached(self, seed: int) -> None:
        cuda.reset(seed)
        stream, done = Stream(), []
        do(stream, lambda: done.append(1))
        event = stream.record_event()
        do(stream, lambda: done.append(2))
        while not event.query():
            pass
        assert 1 in done

    def test_the_host_waits_for_streams_and_events(self, seed: int) -> None:
        cuda.reset(seed)
        one, other, done = Stream(), Stream(), []
        do(one, lambda: done.append(1))
        one.record_event().synchronize()
        assert done == [1]
        do(other, lambda: done.append(2))
        while not other.query():
            pass
        assert done == [1, 2]
        do(one, lambda: done.append(3))
        cuda.synchronize()
        assert done == [1, 2, 3]

    def test_time(self, seed: int) -> None:
        cuda.reset(seed)
        stream, begin, end = Stream(), Event(enable_timing=True), Event(enable_timing=True)
        begin.record(stream)
        do(stream, lambda: None)
        with pytest.raises(ValueError, match="must be recorded"):
            begin.elapsed_time(end)
        stream.held = True
        end.record(stream)
        with pytest.raises(ValueError, match="must be completed"):
            begin.elapsed_time(end)
        stream.held = False
        end.synchronize()
        assert begin.elapsed_time(end) == 2
        with pytest.raises(ValueError, match="enable_timing"):
            begin.elapsed_time(Event())


def test_a_seed_is_an_order() -> None:
    def order(seed: int) -> list[int]:
        device = cuda.reset(seed)
        log: list[int] = []
        streams = [Stream() for _ in range(4)]
        for nth, stream in enumerate(streams * 3):
            do(stream, lambda nth=nth: log.append(nth))
        device.finish()
        return log

    assert order(7) == order(7)
    assert len({tuple(order(seed)) for seed in SEEDS}) > 10


class TestBytesAndReports:
    """Two streams, one array: what is wrong is seen in the bytes of some seed, and reported in every one."""

    def run(self, seed: int, *, fence: bool, leave_out: bool = False) -> tuple[bool, list[str]]:
        device = cuda.reset(seed)
        if leave_out:
            device.leave_out = lambda waiting, recorded_on, site: (
                (waiting.name, recorded_on.name) == ("transfer", "forward") and "in run" in site
            )
        forward, transfer = Stream(), Stream()
        forward.name, transfer.name = "forward", "transfer"
        rows, host = np.zeros(8, dtype=np.uint8), np.zeros(8, dtype=np.uint8)
        where = ByteRanges.at(rows.ctypes.data, 8)
        made = [lambda at=at: rows.__setitem__(at, 1) for at in range(8)]
        moved = [lambda at=at: host.__setitem__(at, rows[at]) for at in range(8)]
        forward.launch(Operation("forward extend 7", made, writes=where))
        if fence:
            transfer.wait_stream(forward)
        transfer.launch(Operation("copy", moved, reads=where, engine="copy_d2h"))
        transfer.synchronize()
        return bool(host.all()), [str(race) for race in device.races()]

    def test_with_the_fence_all_is_right(self) -> None:
        assert [self.run(seed, fence=True) for seed in SEEDS] == [(True, [])] * len(SEEDS)

    @pytest.mark.parametrize("leave_out", [False, True])
    def test_without_it_bytes_are_wrong_in_some_seeds_and_all_report_it(self, leave_out: bool) -> None:
        results = [self.run(seed, fence=leave_out, leave_out=leave_out) for seed in SEEDS]
        assert {right for right, _ in results} == {True, False}
        reports = {tuple(races) for _, races in results}
        assert len(reports) == 1
        (report,) = reports.pop()
        assert report.startswith(
            "read_before_write: 'forward extend 7' on stream 'forward' write (test_gpu.py:"
        )
        assert "in run) and 'copy' on stream 'transfer' read (test_gpu.py:" in report
        assert report.endswith(
            "stream 'transfer' must wait for an event recorded on stream 'forward' after 'forward extend 7', "
            "before 'copy'"
        )

    def test_what_the_host_saw_complete_is_before_all_it_asks_for_later(self) -> None:
        for seed in SEEDS:
            device = cuda.reset(seed)
            rows = ByteRanges.at(0, 8)
            forward, transfer = Stream(), Stream()
            forward.launch(Operation("forward", writes=rows))
            event = forward.record_event()
            while not event.query():
                pass
            transfer.launch(Operation("copy", reads=rows))
            device.host_access("read results", reads=rows)
            assert device.races() == []

    def test_the_host_races_too(self) -> None:
        device = cuda.reset(0)
        rows = ByteRanges.at(0, 8)
        Stream().launch(Operation("copy", writes=rows))
        device.host_access("read results", reads=rows)
        (race,) = device.races()
        assert race.kind == "read_before_write"
        assert race.second.stream == "host"
        assert race.fence.startswith(
            "the host must wait for an event recorded on stream 'stream 1' after 'copy'"
        )


def test_who_launches_for_others_is_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "HIDDEN", {*sites.HIDDEN})
    monkeypatch.setattr(sites, "_shown", {})
    source = "def launch(site):\n    return site()\n"
    stand_in: dict[str, object] = {"__name__": "stand_in.kernels"}
    exec(source, stand_in)

    def ask() -> str:
        return str(stand_in["launch"](sites.caller))  # type: ignore[operator]

    assert ask().endswith("stand_in/kernels.py:2 in launch")
    sites.hide("stand_in")
    assert ask().endswith("in ask")


def test_an_old_device_runs_no_more() -> None:
    cuda.reset(0)
    done: list[int] = []
    stream = Stream()
    stream.held = True
    do(stream, lambda: done.append(1))
    stream.held = False
    cuda.reset(1).finish()
    assert done == []
