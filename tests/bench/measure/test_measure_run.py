"""Measurements on the CPU: a row for everything that was asked for, and no figure without the right bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_hicache.bench.measure import contenders, interference, suite
from sglang_hicache.bench.measure.cases import Case
from sglang_hicache.bench.measure.contenders import names
from sglang_hicache.bench.measure.devices import TimedCpu
from sglang_hicache.bench.measure.one_write import Setting, bandwidth
from sglang_hicache.bench.measure.patterns import PATTERNS
from sglang_hicache.bench.measure.results import METRICS, WRONG, Results, Row, Spread, load, save
from sglang_hicache.bench.measure.stand_ins import StandIn
from sglang_hicache.bench.measure.suite import GRIDS, WEIGHTS, MeasureOptions, measure
from sglang_hicache.bench.measure.sustained import CONTENDERS
from sglang_hicache.bench.measure.timing import interleaved
from sglang_hicache.io_backends import Submission, direct_copies, register_backend
from sglang_hicache.io_backends.device.cpu import CpuStream
from sglang_hicache.io_backends.policy_files import default_policy
from sglang_hicache.io_backends.registry import OWN_NAMES, unregister_backend


class Mutant:
    """Copies everything, then damages what was copied, or leaves something out."""

    def __init__(self, how: str) -> None:
        self.name = "mutant"
        self.how = how

    def __call__(self, device: Any, options: Any) -> Mutant:
        self.device = device
        return self

    def supports(self, geometry: Any) -> str | None:
        return None

    def prepare(self, geometry: Any) -> None:
        if self.how == "prepare fails":
            raise MemoryError("no staging left")

    def submit(self, transfer: Any, stream: Any) -> Submission:
        slots = self.device.host_values(transfer.device_slots, transfer.indices_ready)
        batch = direct_copies(transfer.geometry, transfer.host_slots, slots)
        if self.how == "submit fails":
            raise RuntimeError("the driver said no\nand more")
        if self.how == "last row left out":
            batch.nbytes[-1] = 0
        if self.how == "one row twice":
            batch.src[0] = batch.src[-1]
        if self.how == "one byte too far":
            ends = batch.dst + batch.nbytes  # one behind which no row of the write begins, inside the memory
            batch.nbytes[np.flatnonzero(~np.isin(ends, batch.dst) & (ends < ends.max()))[0]] += 1
        self.device.copy(batch, stream)
        return Submission(len(batch), batch.total_bytes)


@pytest.fixture
def mutant(request: pytest.FixtureRequest) -> Iterator[str]:
    register_backend("mutant", Mutant(request.param))
    yield request.param
    unregister_backend("mutant")


def only(*wanted: str, repeats: int = 2) -> Setting:
    return Setting(TimedCpu(), default_policy(), repeats, wanted or None)


CASE = Case("tiny", "layer_first", 4, 64, True)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("mutant", ["last row left out", "one row twice", "one byte too far"], indirect=True)
def test_wrong_bytes_are_noticed_and_not_measured(mutant: str) -> None:
    by_name = {row.contender: row for row in bandwidth(only("mutant", "hybrid"), CASE)}
    assert by_name["hybrid"].checked
    assert by_name["hybrid"].metrics
    bad = by_name["mutant"]
    assert str(bad.reason).startswith(WRONG)
    assert not bad.checked
    assert not bad.metrics
    assert Results({}, [bad]).wrong() == [bad]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("mutant", "why"),
    [
        ("prepare fails", "MemoryError: no staging left"),
        ("submit fails", "RuntimeError: the driver said no"),
    ],
    indirect=["mutant"],
)
def test_a_contender_that_fails_is_a_row_with_its_reason_and_the_others_go_on(mutant: str, why: str) -> None:
    by_name = {row.contender: row for row in bandwidth(only("mutant", "copy_engine"), CASE)}
    assert by_name["mutant"].reason == why
    assert not by_name["mutant"].metrics
    assert by_name["copy_engine"].checked


@pytest.mark.usefixtures("tiny")
def test_every_measurement_has_a_row_for_every_contender() -> None:
    small = {"models": ("tiny",), "tokens": (32,), "page_sizes": (4,)}
    asked = MeasureOptions(
        tuple(name for name in GRIDS if name != "submit"), cpu=True, only=small, repeats=2, quick=True
    )
    said: list[str] = []
    run = measure(asked, lambda text, done, total: said.append(text))
    assert run.watermark
    for name in asked.measurements:
        rows = run.of(name)
        assert {row.contender for row in rows} == set(CONTENDERS if name == "sustained" else names())
        for row in rows:
            assert bool(row.metrics) != bool(row.reason), row
            assert set(row.metrics) <= set(METRICS)
            assert row.metrics or "SGLang" in str(row.reason)
        for own in {"auto", *OWN_NAMES} & {row.contender for row in rows}:
            mine = [row for row in rows if row.contender == own]
            assert all(row.checked and row.metrics for row in mine)
        assert any(text.startswith(name) for text in said)
    auto = next(row for row in run.of("bandwidth") if row.contender == "auto")
    assert auto.backend in OWN_NAMES
    assert auto.fastest_safe is not None
    assert "link_share" in auto.metrics
    assert {row.forward for row in run.of("interference")} >= {
        "gemm",
        "memory",
        "memory, half",
        "decode steps",
    }
    assert all("stall_ms" in row.metrics for row in run.of("fence") if row.metrics)
    sustained = [row for row in run.of("sustained") if row.metrics]
    assert {row.forward for row in sustained} == set(PATTERNS)
    assert all({"kept_gb_per_s", "slow_down", "fence_ms", "held_mb"} <= set(row.metrics) for row in sustained)
    assert all(row.series and len(row.series[0]) == 2 for row in sustained)
    assert Results.from_dict(run.to_dict()).to_dict() == run.to_dict()
    assert all("ack_us" in row.metrics for row in run.of("latency") if row.metrics)


@pytest.mark.usefixtures("tiny")
def test_cases_beyond_the_time_budget_are_rows_that_say_so() -> None:
    small = {"models": ("tiny",), "tokens": (32,), "page_sizes": (4, 8), "layouts": ("layer_first",)}
    run = measure(MeasureOptions(("latency",), cpu=True, only=small, budget_s=0), lambda *_: None)
    assert len(run.rows) == 4
    assert all(row.reason == "the time budget was spent" for row in run.rows)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A clock, and parts that take seconds of it: by pattern, else 10."""
    now, takes = [0.0], {"mixed": 10.0}

    def part(ask: MeasureOptions, setting: Setting, name: str, case: Case, forward: str | None) -> list[Row]:
        now[0] += takes.get(str(forward), 10.0)
        if now[0] > takes.get("killed at", math.inf):
            raise KeyboardInterrupt
        return [Row(name, case, "auto", forward=forward, metrics={"kept_gb_per_s": Spread.of([1.0])})]

    monkeypatch.setattr(suite, "_part", part)
    monkeypatch.setattr(suite.time, "monotonic", lambda: now[0])
    return takes


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", [name for name in GRIDS if name != "submit"])
def test_who_is_killed_loses_the_part_that_ran(name: str, parts: dict[str, float], tmp_path: Path) -> None:
    parts["killed at"] = 35  # in the fourth
    small = {"models": ("tiny",), "tokens": (32,), "page_sizes": (1, 2, 4, 8)}
    with pytest.raises(KeyboardInterrupt):
        measure(
            MeasureOptions((name,), cpu=True, only=small),
            lambda *_: None,
            lambda run: save(run, tmp_path) and None,
        )
    saved = load(tmp_path / "bench.json")
    assert [bool(row.metrics) for row in saved.rows] == [True] * 3


@pytest.mark.usefixtures("tiny")
def test_patterns_that_the_time_budget_does_not_hold_are_rows_that_say_so(parts: dict[str, float]) -> None:
    parts["prefill 25 ms"] = 30.0
    small = {"models": ("tiny",), "page_sizes": (4, 8)}
    # 10, 10, 30, 10 s for each page; then the third of page 8 took 30 s: more than is left.
    run = measure(MeasureOptions(("sustained",), cpu=True, only=small, budget_s=115), lambda *_: None)
    assert [row.forward for row in run.rows] == [*PATTERNS, *PATTERNS]
    assert [row.reason for row in run.rows] == [None] * 7 + ["the time budget was spent"]


@pytest.mark.usefixtures("tiny")
def test_a_case_that_cannot_be_set_up_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: Setting, case: Case) -> Any:
        raise MemoryError("out of memory")

    monkeypatch.setattr(Setting, "memory", no_memory)
    small = {"models": ("tiny",), "tokens": (32,), "page_sizes": (4,), "attention": ("fa3",)}
    run = measure(MeasureOptions(("latency",), cpu=True, only=small), lambda *_: None)
    assert [(row.contender, row.reason) for row in run.rows] == [("all", "MemoryError: out of memory")]


@pytest.mark.usefixtures("tiny")
def test_a_fence_is_waited_for_by_what_has_sm_work_and_by_nothing_else() -> None:
    waited: dict[str, int] = {}

    class Counting(TimedCpu):
        who = ""

        def wait(self, stream: Any, event: Any) -> None:
            if stream.label == "forward":
                waited[self.who] = waited.get(self.who, 0) + 1

    device = Counting()
    for name in ("hybrid", "fenced_kernel", "copy_engine", "memcpy_loop"):
        device.who = name
        setting = Setting(device, default_policy(), 3, (name,))
        suite.MEASURED["fence"](setting, CASE)
    # The copy engine's transfers never hold a forward back.
    assert waited == {"hybrid": 4, "fenced_kernel": 4}  # three repeats and one to warm up


@pytest.mark.parametrize("count", range(1, 12))
def test_turns_are_interleaved_and_nobody_mostly_follows_the_same_one(count: int) -> None:
    order: list[int] = []

    def run(name: int) -> dict[str, float]:
        order.append(name)
        return {"ms": float(len(order))}

    repeats = 5
    runs = {name: lambda name=name: run(name) for name in range(count)}  # type: ignore[misc]
    found, failed = interleaved(runs, repeats)  # type: ignore[arg-type]
    assert not failed
    turns = [order[turn : turn + count] for turn in range(0, len(order), count)]
    assert [sorted(turn) for turn in turns] == [list(range(count))] * (repeats + 1)
    counted = [nth + 1 for nth, name in enumerate(order) if name == 0][1:]  # the first turn warms up
    assert found[0]["ms"] == counted  # type: ignore[index]
    if count > 4:
        for name in range(count):
            before = [earlier for earlier, each in pairwise(order[count - 1 :]) if each == name]
            assert max(map(before.count, before)) <= repeats // 2


def test_a_slow_contender_is_repeated_twice_and_one_that_fails_late_has_no_figures() -> None:
    now = [0.0]
    counts = {"slow": 0, "quick": 0, "fails": 0}

    def run(name: str) -> dict[str, float]:
        counts[name] += 1
        now[0] += 10 if name == "slow" else 0.1
        if name == "fails" and counts[name] == 3:
            raise ValueError("late")
        return {"ms": 1.0}

    runs = {name: lambda name=name: run(name) for name in counts}  # type: ignore[misc]
    found, failed = interleaved(runs, 5, clock=lambda: now[0])
    assert counts == {"slow": 3, "quick": 6, "fails": 3}
    assert len(found["slow"]["ms"]) == 2
    assert failed == {"fails": "ValueError: late"}
    assert "fails" not in found


def test_every_measurement_has_a_grid_a_weight_and_a_figure_that_is_shown_first() -> None:
    assert set(GRIDS) == set(WEIGHTS) == set(suite.SHOWN)
    assert all(metric in METRICS for metric, _ in suite.SHOWN.values())
    for name in GRIDS:
        for quick in (False, True):
            for cpu in (False, True):
                assert MeasureOptions((name,), cpu, quick=quick).cases(name), name
        assert len(MeasureOptions((name,), True, quick=True).cases(name)) <= 2


def test_who_is_safe_where_forwards_must_wait() -> None:
    unfenced_kernel = contenders.Contender("sglang_kernel", sm_work=True)
    ours = contenders.Contender("hybrid", sm_work=True, ours=True)
    direct = contenders.Contender("sglang_direct", sm_work=False)
    assert [each.safe(True) for each in (unfenced_kernel, ours, direct)] == [False, True, True]
    assert all(each.safe(False) for each in (unfenced_kernel, ours, direct))


def test_auto_takes_the_route_of_the_write(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(
        "version: 1\nrules:\n"
        "  - name: long\n    when: {write_entry_bytes: '>=2000'}\n"
        "    use: {backend: copy_engine}\n    because: test\n"
        "default: {use: {backend: fenced_kernel, fence_forward: [decode]}, because: test}\n"
    )
    small = {"models": ("tiny",), "layouts": ("layer_first",), "page_sizes": (4,), "tokens": (64,)}
    asked = MeasureOptions(
        ("bandwidth",),
        cpu=True,
        only={**small, "fragmented": (True, False)},
        wanted=("auto", "hybrid"),
        policy=str(file),
        repeats=2,
    )
    rows = [row for row in measure(asked, lambda *_: None).rows if row.contender == "auto"]
    chosen = {row.case.fragmented: row.backend for row in rows}
    assert chosen == {True: "fenced_kernel", False: "copy_engine"}
    assert all(isinstance(row, Row) and row.fenced for row in rows)


def test_decode_steps_run_one_ahead_of_their_ids() -> None:
    """As SGLang's overlap scheduler; while the ids of the step before are not there, writes go on."""
    launched: list[int] = []
    arrived: list[int] = []
    asked: list[tuple[int, int]] = []
    waited: list[tuple[CpuStream, int]] = []

    class Device(TimedCpu):
        """Ids arrive at the third look."""

        def query(self, event: Any) -> bool:
            event.looks = getattr(event, "looks", 0) + 1
            if event.looks == 3:
                arrived.append(len(launched))
            return bool(event.looks >= 3)

        def wait(self, stream: CpuStream, event: Any) -> None:
            waited.append((stream, len(launched)))

    def step() -> None:
        assert len(launched) - len(arrived) < 2, "a step was launched before the ids of the last but one"
        launched.append(len(arrived))

    device, forwards, copies = Device(), CpuStream("forward"), CpuStream("copies")
    stand_in = StandIn("decode steps", True, step, ids=True)
    begin, end = interference._steps(
        device, stand_in, (forwards, copies), 5, lambda: asked.append((len(launched), len(arrived)))
    )
    assert (len(launched), len(arrived)) == (5, 4)
    assert {launches for launches, _ in asked} == {1, 2, 3, 4, 5}
    assert waited == [(copies, launches) for launches in range(1, 6)], "ids are copied before they are there"
    assert begin.elapsed_time(end) >= 0
