"""``--hicache-io-unsafe-fences`` on the virtual device: the fences are gone, and the races are there.

Run by test_stress.py, in a process that SGLang is changed in for good (bench/race/simulation/machine.py).
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from race_cases import FA3, cache, facts_of, keep_all

from sglang_hicache.bench.race.result import RaceResult
from sglang_hicache.bench.race.simulation import setups
from sglang_hicache.bench.race.simulation.experiment import Experiment
from sglang_hicache.io_backends.policy_files import policy_in_force
from sglang_hicache.io_backends.sglang import unsafe
from sglang_hicache.io_backends.sglang.errors import RefusedError
from sglang_hicache.io_backends.sglang.scheduler import scheduler_hooks
from sglang_hicache.io_backends.sglang.scheduler.scheduler_hooks import Active
from sglang_hicache.policy.decide import decide

pytestmark = pytest.mark.usefixtures("libcuda")

SEEDS = range(12)


def run(backend: str, fences: str | None) -> tuple[RaceResult, list[Active]]:
    """As a server with the option does it: the decision is changed, then what routes the writes."""
    facts = facts_of(**FA3)
    decision = unsafe.applied(decide(policy_in_force(None), facts, backend=backend), fences)
    made = Experiment(
        cache(setups.setup_of(facts, "kernel")),
        decision,
        setups.exclusive_forwards(facts),
        unsafe_fences=fences,
    )
    seen: list[Active] = []

    def leave_out(active: Active) -> None:
        unsafe.leave_out_sglangs(made.cache.controller, fences)
        seen.append(active)

    result = RaceResult()
    for seed in SEEDS:
        result.add(made.run(seed, keep_all, mutate=leave_out))
    return result, seen


def counted(seen: list[Active], counter: str) -> int:
    return sum(getattr(active.writeback.counters, counter) for active in seen)


@pytest.mark.parametrize(
    ("backend", "fences", "kinds"),
    [
        ("fenced_kernel", "none", ["read_before_write", "sm_overlap"]),
        ("fenced_kernel", "producer", ["sm_overlap"]),
        ("fenced_kernel", "both", []),
        ("hybrid", "none", ["read_before_write", "sm_overlap"]),
        ("hybrid", "producer", ["sm_overlap"]),
        ("copy_engine", "none", ["read_before_write"]),
        ("copy_engine", "producer", []),
    ],
)
def test_what_is_left_out_is_gone(backend: str, fences: str, kinds: list[str]) -> None:
    result, seen = run(backend, fences)
    assert result.kinds == kinds
    assert bool(result.corrupted) == (fences == "none")
    writes = counted(seen, "writes")
    assert writes > len(SEEDS)
    assert counted(seen, "producer_fences") == (0 if fences == "none" else writes)
    assert bool(counted(seen, "forward_fences")) == (fences == "both")


def test_without_the_option_all_is_as_it_was() -> None:
    decision = decide(policy_in_force(None), facts_of(**FA3), backend="fenced_kernel")
    assert unsafe.applied(decision, None) is decision
    assert unsafe.to_carry(decision, None) == decision.to_dict()
    assert unsafe.carried(decision.to_dict()) is None
    assert unsafe.keeps_producer_fence(None)
    assert unsafe.summary(None) == {}


@pytest.mark.parametrize("fences", unsafe.CHOICES)
def test_it_travels_and_is_said(fences: str, caplog: pytest.LogCaptureFixture) -> None:
    decision = decide(policy_in_force(None), facts_of(**FA3), backend="fenced_kernel")
    experiment = unsafe.applied(decision, fences)
    assert fences in experiment.rule
    assert experiment.because.startswith("UNSAFE EXPERIMENT")
    assert experiment.fences() == (decision.fences() if fences == "both" else ())
    assert unsafe.carried(unsafe.to_carry(experiment, fences)) == fences
    unsafe.warn(fences)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{unsafe.OPTION} {fences}" in caplog.text


def test_a_backend_that_copies_nothing_needs_the_same_confirmation() -> None:
    with pytest.raises(RefusedError, match=r"null copies nothing.*say --i-know-this-corrupts too"):
        unsafe.Request().check(unsafe.NULL, served=True)
    unsafe.Request(confirmed=True).check(unsafe.NULL, served=True)
    # The word alone confirms nothing for any other backend.
    with pytest.raises(RefusedError, match="which is not given"):
        unsafe.Request(confirmed=True).check("hybrid", served=True)


def test_no_policy_chooses_a_backend_that_copies_nothing() -> None:
    decision = decide(policy_in_force(None), facts_of(**FA3), backend="fenced_kernel")
    unsafe.check_decision(decision, "auto")
    routes = tuple(replace(route, backend=unsafe.NULL) for route in decision.routes)
    chosen = replace(decision, routes=(*decision.routes, *routes))
    with pytest.raises(RefusedError, match="chooses backend null, which copies nothing"):
        unsafe.check_decision(chosen, "auto")
    unsafe.check_decision(chosen, unsafe.NULL)


@pytest.mark.parametrize("fences", [None, *unsafe.CHOICES])
def test_a_scheduler_takes_sglangs_own_fence_away_too(
    fences: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = SimpleNamespace(write_fence_stream="forward stream")
    scheduler = SimpleNamespace(
        tree_cache=SimpleNamespace(cache_controller=controller),
        chunked_prefill_size=None,
        max_prefill_tokens=100,
        max_total_num_tokens=200,
    )
    started: list[int] = []
    active: Any = SimpleNamespace(
        unsafe_fences=fences,
        writeback=SimpleNamespace(start=started.append),
        tell_metrics=lambda: None,
    )
    monkeypatch.setattr(scheduler_hooks, "_active", active)
    monkeypatch.setattr(scheduler_hooks, "_prepare", lambda *_: None)
    monkeypatch.setattr(scheduler_hooks, "metrics_of", lambda _: None)
    planned: list[Any] = []
    monkeypatch.setattr(scheduler_hooks, "_plan_past_copies", planned.append)
    scheduler_hooks._make_ready(scheduler)
    assert controller.write_fence_stream == (None if fences == "none" else "forward stream")
    assert started == [100]
    assert planned == [active]


@pytest.mark.parametrize(
    ("chunk", "prefill", "total", "tokens"),
    [
        (8192, 16384, 10**6, 8192),
        (None, 16384, 10**6, 16384),
        (-1, 16384, 10**6, 16384),
        (8192, 16384, 999, 999),
    ],
)
def test_tokens_of_a_step(chunk: int | None, prefill: int, total: int, tokens: int) -> None:
    scheduler = SimpleNamespace(
        chunked_prefill_size=chunk, max_prefill_tokens=prefill, max_total_num_tokens=total
    )
    assert scheduler_hooks._step_tokens(scheduler) == tokens
