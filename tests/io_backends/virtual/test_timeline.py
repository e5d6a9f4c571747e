"""Model time: what runs when, what waits and for whom, as numbers, as a trace and as a picture."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.io_backends.virtual import gpu as cuda
from sglang_hicache.io_backends.virtual.gpu import Event, Stream
from sglang_hicache.io_backends.virtual.model import CostModel
from sglang_hicache.io_backends.virtual.operations import Operation
from sglang_hicache.io_backends.virtual.timeline import HOST, ModelOrder, Timeline, write_chrome_trace

MB = 10**6
FREE = CostModel(link_d2h_gb_per_s=50.0, sm_link_gb_per_s=50.0, call_us=0.0, event_us=0.0, copy_us=0.0)
"""The host takes no time, the link moves 50 MB in a millisecond."""


def run(program: Callable[[], None], model: CostModel = FREE) -> Timeline:
    order = ModelOrder(model)
    device = cuda.reset(order=order)
    program()
    device.finish()
    return order.timeline


def named(name: str) -> Stream:
    stream = Stream()
    stream.name = name
    return stream


def when(timeline: Timeline, name: str) -> tuple[float, float]:
    (found,) = [slice for slice in timeline.slices if slice.name == name and slice.track != HOST]
    return pytest.approx(found.start), pytest.approx(found.end)  # type: ignore[return-value]


def step(backend: str) -> Timeline:
    """Two forwards of 4 ms; the first one's rows (100 MB) are written back, the second must not share the
    SMs."""

    def program() -> None:
        forward, transfer, gather = named("forward"), named("transfer"), named("gather")
        forward.launch(Operation("forward 0", ms=4.0))
        made = forward.record_event()
        if backend == "fenced_kernel":
            transfer.wait_event(made)
            transfer.launch(Operation("SM copy", d2h_on_sms=True, crosses_link=True, nbytes=100 * MB))
            forward.wait_stream(transfer)
        elif backend == "hybrid":
            gather.wait_event(made)
            gather.launch(Operation("gather", d2h_on_sms=True, nbytes=100 * MB))
            transfer.wait_stream(gather)
            transfer.launch(Operation("drain", engine="copy_d2h", nbytes=100 * MB))
            forward.wait_stream(gather)
        else:
            transfer.wait_event(made)
            transfer.launch(Operation("copies", engine="copy_d2h", nbytes=100 * MB))
        forward.launch(Operation("forward 1", ms=4.0))

    return run(program)


class TestSimulation:
    def test_a_forward_waits_for_the_whole_kernel(self) -> None:
        timeline = step("fenced_kernel")
        assert when(timeline, "SM copy") == (4.0, 6.0)
        assert when(timeline, "forward 1") == (6.0, 10.0)
        assert timeline.waited("forward", on="transfer") == pytest.approx(2.0)
        (wait,) = [slice for slice in timeline.slices if (slice.track, slice.category) == ("forward", "wait")]
        assert wait.name == "waits for SM copy on transfer"
        assert wait.source == ("transfer", pytest.approx(6.0))
        assert wait.issued.endswith("in program")

    def test_a_forward_waits_for_the_gather_only(self) -> None:
        timeline = step("hybrid")
        gathered = 2 * 100 / 4172
        assert when(timeline, "gather") == (4.0, 4.0 + gathered)
        assert when(timeline, "drain") == (4.0 + gathered, 6.0 + gathered)
        assert timeline.waited("forward", on="gather") == pytest.approx(gathered)
        assert timeline.waited("forward") == pytest.approx(gathered)

    def test_no_forward_waits_for_copies(self) -> None:
        timeline = step("copy_engine")
        assert when(timeline, "copies") == (4.0, 6.0)
        assert when(timeline, "forward 1") == (4.0, 8.0)
        assert timeline.waited("forward") == 0

    def test_one_link_serves_one_at_a_time_and_says_who_waits(self) -> None:
        def program() -> None:
            for name in ("one", "other"):
                named(name).launch(Operation(f"copies of {name}", engine="copy_d2h", nbytes=50 * MB))
            named("third").launch(Operation("SM copy", d2h_on_sms=True, crosses_link=True, nbytes=50 * MB))
            named("back").launch(Operation("load", engine="copy_h2d", nbytes=55 * MB))

        timeline = run(program)
        assert when(timeline, "copies of one") == (0.0, 1.0)
        assert when(timeline, "copies of other") == (1.0, 2.0)
        assert when(timeline, "SM copy") == (2.0, 3.0)
        assert when(timeline, "load") == (0.0, 1.0), "the other direction"
        assert {slice.name for slice in timeline.slices if slice.category == "wait"} == {
            "waits for the link to the host"
        }

    def test_the_host_pays_for_calls_and_copies(self) -> None:
        model = CostModel(call_us=5.0, copy_us=0.6, event_us=0.0)
        timeline = run(
            lambda: named("transfer").launch(
                Operation("copies", engine="copy_d2h", copies=1000, nbytes=55_000)
            ),
            model,
        )
        (launch,) = [slice for slice in timeline.slices if slice.track == HOST]
        assert (launch.name, launch.start, launch.end) == ("launch copies", 0.0, pytest.approx(0.605))
        assert when(timeline, "copies") == (0.605, 0.606)

    def test_decisions_of_the_program_meet_model_time(self) -> None:
        """A poll is answered by the clock: each takes 10 us, and the work takes 1 ms."""
        polls = []

        def program() -> None:
            stream = named("transfer")
            stream.launch(Operation("work", ms=1.0))
            done = stream.record_event()
            while not done.query():
                polls.append(1)

        run(program)
        assert len(polls) == pytest.approx(99, abs=1)

    def test_work_that_has_begun_is_not_done(self) -> None:
        def program() -> None:
            stream = named("transfer")
            stream.launch(Operation("work", ms=1.0))
            assert not stream.query()
            cuda.gpu.host_work("schedule", 1.0)
            assert stream.query()

        run(program)

    def test_the_host_waits_in_model_time(self) -> None:
        begin, end = Event(enable_timing=True), Event(enable_timing=True)

        def program() -> None:
            cuda.gpu.host_work("schedule", 0.5)
            stream = named("forward")
            begin.record(stream)
            stream.launch(Operation("work", ms=1.0))
            end.record(stream)
            end.synchronize()
            assert cuda.gpu.clock == pytest.approx(1.5)
            assert begin.elapsed_time(end) == pytest.approx(1.0)

        timeline = run(program)
        assert timeline.waited(HOST, on="forward") == pytest.approx(1.0)

    def test_it_moves_the_bytes_too(self) -> None:
        done: list[int] = []
        run(
            lambda: named("forward").launch(
                Operation("work", [lambda: done.append(1), lambda: done.append(2)])
            )
        )
        assert done == [1, 2]

    def test_a_small_pool_can_stand_for_a_large_one(self) -> None:
        model = CostModel(link_d2h_gb_per_s=50.0, call_us=0.0, copy_us=0.0, bytes_scale=1000)
        timeline = run(
            lambda: named("transfer").launch(Operation("copies", engine="copy_d2h", nbytes=50_000)), model
        )
        assert when(timeline, "copies") == (0.0, 1.0)
        assert [slice.nbytes for slice in timeline.slices] == [50 * MB]

    @pytest.mark.parametrize("name", ["link_d2h_gb_per_s", "hbm_gb_per_s"])
    def test_a_rate_must_be_positive(self, name: str) -> None:
        with pytest.raises(ValueError, match=name):
            CostModel(**{name: 0.0})


RUNS = ("fenced_kernel", "hybrid", "copy_engine")


class TestChromeTrace:
    @pytest.fixture
    def trace(self, tmp_path: Path) -> Any:
        write_chrome_trace(tmp_path / "trace.json", {name: step(name) for name in RUNS})
        return json.loads((tmp_path / "trace.json").read_text())

    def test_processes_are_runs_and_threads_are_streams(self, trace: Any) -> None:
        named = {
            (event["pid"], event["tid"], event["name"]): event["args"]["name"]
            for event in trace["traceEvents"]
            if event["ph"] == "M" and "name" in event["args"]
        }
        processes = [name for (_, _, kind), name in named.items() if kind == "process_name"]
        assert processes == [f"{name} (model, not a measurement)" for name in RUNS]
        hybrid = [name for (pid, _, kind), name in named.items() if pid == 2 and kind == "thread_name"]
        assert set(hybrid) == {"host thread", "forward", "gather", "transfer"}
        assert hybrid[0] == "host thread"

    def test_slices_lie_within_their_thread_and_do_not_overlap(self, trace: Any) -> None:
        by_thread: dict[Any, list[tuple[float, float]]] = {}
        for event in trace["traceEvents"]:
            if event["ph"] == "X":
                assert event["dur"] > 0
                by_thread.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["dur"]))
        for slices in by_thread.values():
            slices.sort()
            for (start, lasts), (following, _) in itertools.pairwise(slices):
                assert start + lasts <= following + 1e-6

    def test_an_arrow_leads_from_what_was_waited_for_to_who_waited(self, trace: Any) -> None:
        events = trace["traceEvents"]
        slices = [event for event in events if event["ph"] == "X"]

        def at(flow: Any) -> Any:
            (found,) = [
                event["name"]
                for event in slices
                if (event["pid"], event["tid"]) == (flow["pid"], flow["tid"])
                and event["ts"] <= flow["ts"] < event["ts"] + event["dur"]
            ]
            return found

        ends = {event["id"]: event for event in events if event["ph"] == "f"}
        arrows = {(at(event), at(ends[event["id"]])) for event in events if event["ph"] == "s"}
        assert ("SM copy", "waits for SM copy on transfer") in arrows
        assert ("gather", "waits for gather on gather") in arrows
        assert len(ends) == len([event for event in events if event["ph"] == "s"])

    def test_it_says_that_it_is_a_model_and_which(self, trace: Any) -> None:
        assert trace["otherData"]["note"] == "model, not a measurement"
        assert json.loads(trace["otherData"]["model"])["hybrid"]["link_d2h_gb_per_s"] == 50.0


class TestPlot:
    def test_it_shows_runs_under_each_other_and_says_that_it_is_a_model(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        from sglang_hicache.io_backends.virtual.plot import plot

        plot(tmp_path / "streams.svg", {name: step(name) for name in RUNS})
        # matplotlib writes each text as a comment beside its outlines.
        picture = (tmp_path / "streams.svg").read_text()
        assert "model, not a measurement" in picture
        assert "fenced_kernel: forwards wait 2.00 ms for write-back" in picture
        assert "hybrid: forwards wait 0.05 ms for write-back" in picture
        assert "copy_engine: no forward waits for write-back" in picture
        assert "waits for SM copy on transfer" in picture
        plot(tmp_path / "streams.png", {"hybrid": step("hybrid")})
        assert (tmp_path / "streams.png").read_bytes().startswith(b"\x89PNG")

    def test_there_must_be_something_to_draw(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        from sglang_hicache.io_backends.virtual.plot import plot

        with pytest.raises(ValueError, match="nothing happened"):
            plot(tmp_path / "streams.png", {"hybrid": Timeline(CostModel())})
