"""SGLang's cache on the virtual device: which fences are needed, and that ours are there.

Run by test_race.py, in a process that SGLang is changed in for good (bench/race/simulation/machine.py).
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from sglang_hicache.bench.race.kept_fences import KeptFences
from sglang_hicache.bench.race.result import RaceResult
from sglang_hicache.bench.race.simulation import setups
from sglang_hicache.bench.race.simulation.cache import Cache, Setup
from sglang_hicache.bench.race.simulation.experiment import (
    D2H_STREAMS,
    PRODUCERS,
    Experiment,
    LeaveOut,
    Run,
    left_out,
)
from sglang_hicache.bench.race.simulation.modes import MODES
from sglang_hicache.bench.race.simulation.published import published
from sglang_hicache.io_backends.policy_files import policy_in_force
from sglang_hicache.io_backends.registry import AUTO
from sglang_hicache.io_backends.sglang.handover.machine_facts import detect
from sglang_hicache.io_backends.sglang.scheduler import kernels, scheduler_hooks, writeback
from sglang_hicache.io_backends.virtual import gpu
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts

pytestmark = pytest.mark.usefixtures("libcuda")

SEEDS = range(60)
FEW_SEEDS = range(25)
"""As many as it takes to find a mutant; most are found in the first."""

FA3 = {"attention_backend": "fa3", "gpu_arch": "sm90"}
TRITON = {"attention_backend": "triton", "gpu_arch": "sm90"}
"""No forward waits, so that chunks of a long write are a pipeline."""


def keep_all(waiting: Any, recorded_on: Any, site: str) -> bool:
    return False


@functools.cache
def cache(setup: Setup) -> Cache:
    return Cache(setup)


def facts_of(**given: Any) -> Facts:
    known = {"device": "cuda", "kv_kind": "mha", "mem_layout": "page_first", "page_size": 4, **given}
    return detect(known)


def experiment(
    backend: str | None,
    fences: KeptFences = KeptFences.auto,
    mode: str = "overlap",
    *,
    callers: bool = False,
    **given: Any,
) -> Experiment:
    """``backend`` None: SGLang's own ``kernel``."""
    facts = facts_of(**{**FA3, **given})
    decision = None if backend is None else decide(policy_in_force(None), facts, backend=backend)
    chosen = MODES[mode]
    return Experiment(
        cache(chosen.setup_of(setups.setup_of(facts, "kernel"))),
        None if decision is None else setups.fenced(decision, fences),
        setups.exclusive_forwards(facts),
        chosen.with_callers if callers else chosen.scheduler,
    )


def result_of(made: Experiment, seeds: range, leave_out: LeaveOut) -> RaceResult:
    result = RaceResult()
    for seed in seeds:
        result.add(made.run(seed, leave_out))
    return result


class TestTheCrash:
    """#20611: the SM copy kernel beside FA3 on Hopper."""

    @pytest.mark.parametrize(
        ("fences", "kinds", "corrupts"),
        [
            (KeptFences.none, ["read_before_write", "sm_overlap"], True),
            (KeptFences.producer, ["sm_overlap"], False),
            (KeptFences.both, [], False),
        ],
    )
    def test_two_fences_cure_two_races(self, fences: KeptFences, kinds: list[str], corrupts: bool) -> None:
        found = result_of(experiment("fenced_kernel", fences), SEEDS, left_out(fences))
        assert found.kinds == kinds
        assert bool(found.corrupted) == corrupts
        # It was a workload: long prompts, loads from the host.
        assert found.writes > 5 * len(SEEDS)
        assert found.loads

    def test_what_the_installed_sglang_has_and_lacks(self) -> None:
        found = result_of(experiment(None), SEEDS, keep_all)
        assert published().write_fence == ("read_before_write" not in found.kinds)
        assert published().forward_fence == ("sm_overlap" not in found.kinds)
        assert set(found.kinds) <= {"read_before_write", "sm_overlap"}

    @pytest.mark.parametrize("backend", ["copy_engine", "hybrid", AUTO])
    def test_by_the_policy_there_is_none(self, backend: str) -> None:
        found = result_of(experiment(backend), SEEDS, keep_all)
        assert found.good, found.to_dict()


LAYOUTS = [
    ("mha", "layer_first", 1),
    ("mha", "layer_first", 16),
    ("mha", "page_first", 1),
    ("mha", "page_first_direct", 16),
    ("mla", "layer_first", 4),
    ("mla", "page_first", 16),
    ("mla", "page_first_direct", 4),
]


@pytest.mark.parametrize("backend", ["fenced_kernel", "copy_engine", "hybrid", AUTO])
@pytest.mark.parametrize(("kind", "layout", "page"), LAYOUTS)
def test_every_pool_and_layout(kind: str, layout: str, page: int, backend: str) -> None:
    made = experiment(backend, kv_kind=kind, mem_layout=layout, page_size=page)
    found = result_of(made, range(5), keep_all)
    assert found.good, found.to_dict()


def test_a_write_by_host_slot_is_the_same_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows of long writes go to SGLang's kernel sorted; here all do."""
    sorted_there = []

    def note(*pairs: Any) -> Any:
        sorted_there.append(pairs)
        return in_host_order(*pairs)

    in_host_order = kernels.in_host_order
    monkeypatch.setattr(kernels, "in_host_order", note)
    monkeypatch.setattr(kernels, "host_order_pays", lambda *_: True)
    for page in (1, 4):
        sorted_there.clear()
        made = experiment("fenced_kernel", mem_layout="layer_first", page_size=page)
        found = result_of(made, FEW_SEEDS, keep_all)
        assert found.good, found.to_dict()
        assert sorted_there


@pytest.mark.parametrize("waits", [False, True])
def test_a_sort_outside_of_the_fences_is_found(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """On a stream of its own: before the indices are there, or at least beside a forward."""
    in_host_order = kernels.in_host_order

    def elsewhere(host: Any, device: Any) -> Any:
        other = gpu.Stream()
        if waits:
            other.wait_stream(gpu.default_stream())
        with gpu.stream(other):
            pairs = in_host_order(host, device)
        gpu.current_stream().wait_stream(other)
        return pairs

    monkeypatch.setattr(kernels, "in_host_order", elsewhere)
    monkeypatch.setattr(kernels, "host_order_pays", lambda *_: True)
    made = experiment("fenced_kernel", mem_layout="layer_first", page_size=1)
    found = result_of(made, FEW_SEEDS, keep_all)
    assert not found.good
    assert ("sm_overlap" in found.kinds) or not waits


@pytest.mark.parametrize("backend", ["fenced_kernel", "copy_engine", "hybrid", AUTO])
def test_where_no_forward_waits(backend: str) -> None:
    found = result_of(experiment(backend, **TRITON), FEW_SEEDS, keep_all)
    assert found.good, found.to_dict()


def test_only_the_forwards_that_crash_need_a_fence() -> None:
    """fa3 for prefill alone: decodes run beside the kernel, as the policy lets them."""
    given = {"prefill_attention_backend": "fa3", "decode_attention_backend": "flashinfer", "gpu_arch": "sm90"}
    facts = facts_of(**given)
    assert setups.exclusive_forwards(facts) == ("extend",)
    decision = decide(policy_in_force(None), facts, backend="hybrid")
    made = Experiment(cache(setups.setup_of(facts, "kernel")), decision, setups.exclusive_forwards(facts))
    waits: set[tuple[str, str]] = set()

    def watch(waiting: Any, recorded_on: Any, site: str) -> bool:
        waits.add((waiting.name, recorded_on.name))
        return False

    found = result_of(made, FEW_SEEDS, watch)
    assert found.good, found.to_dict()
    assert ("forward", "gather") in waits
    assert "sm_overlap" in result_of(made, FEW_SEEDS, left_out(KeptFences.producer)).kinds


@pytest.mark.parametrize("given", [FA3, TRITON], ids=["fa3", "triton"])
@pytest.mark.parametrize("backend", ["fenced_kernel", "copy_engine", "hybrid"])
def test_our_fences_are_enough_without_sglangs_own(backend: str, given: dict[str, str]) -> None:
    """SGLang before 0.5.23 has no write fence; where it has one, it hides that ours is gone."""

    def leave_out_sglangs(waiting: Any, recorded_on: Any, site: str) -> bool:
        between = waiting.name in D2H_STREAMS and recorded_on.name in PRODUCERS
        return between and site.startswith("sglang/")

    found = result_of(experiment(backend, **given), FEW_SEEDS, leave_out_sglangs)
    assert found.good, found.to_dict()


# --- every fence of ours, one at a time ---

Fence = tuple[str, str, str]
"""Who waits, on which stream's event, and the function that asked for it."""

REDUNDANT: dict[tuple[str, Fence], str] = {
    (
        "hybrid",
        ("transfer", "forward", "submit"),
    ): "hybrid moves no row on SGLang's transfer stream: its gather waits by itself",
    ("hybrid", ("transfer", "schedule", "submit")): "the same",
    (
        "hybrid",
        ("gather", "schedule", "advance"),
    ): "the gather waited for the indices when the write was submitted",
    (
        "hybrid",
        ("transfer", "drain", "abandon"),
    ): "later writes of one backend drain behind; of another route not (emulated_cases.py)",
    ("hybrid", ("transfer", "gather", "abandon")): "the drain waited for what it drains",
    (
        "copy_engine",
        ("transfer", "schedule", "submit"),
    ): "the host has waited for the indices and planned with them",
}
"""(backend, fence): why another one covers it. They are there for pools that take SGLang's own path."""


def own_fences(made: Experiment) -> set[Fence]:
    """Waits that this project asks for in intact runs, wherever they are in its code."""
    seen: set[Fence] = set()

    def watch(waiting: Any, recorded_on: Any, site: str) -> bool:
        if _is_ours(site):
            seen.add((waiting.name, recorded_on.name, site.rpartition(" ")[2]))
        return False

    assert result_of(made, range(12), watch).good
    return seen


def _is_ours(site: str) -> bool:
    return site.startswith("sglang_hicache/io_backends/")


def without(fence: Fence) -> LeaveOut:
    """Leave out this fence of ours, and SGLang's own between the same streams, which would hide it."""

    def leave_out(waiting: Any, recorded_on: Any, site: str) -> bool:
        if (waiting.name, recorded_on.name) != fence[:2]:
            return False
        return site.startswith("sglang/") or (_is_ours(site) and site.rpartition(" ")[2] == fence[2])

    return leave_out


def is_found(made: Experiment, leave_out: LeaveOut, seeds: range = FEW_SEEDS, **named: Any) -> Run | None:
    for seed in seeds:
        run = made.run(seed, leave_out, **named)
        if run.races or run.wrong_rows or run.wrong_reads:
            return run
    return None


@pytest.mark.parametrize(
    ("backend", "given"),
    [("hybrid", FA3), ("hybrid", TRITON), ("copy_engine", FA3), ("fenced_kernel", FA3)],
    ids=["hybrid", "hybrid without forward fence", "copy_engine", "fenced_kernel"],
)
def test_each_fence_is_needed(backend: str, given: dict[str, str]) -> None:
    made = experiment(backend, **given)
    fences = own_fences(made)
    assert fences
    missed = {fence for fence in fences if is_found(made, without(fence)) is None}
    assert missed == {fence for name, fence in REDUNDANT if name == backend and fence in fences}


def test_the_fences_of_the_staging_ring_are_among_them() -> None:
    """A gather waits for the drain of the memory that it fills, also where forwards wait for the gather."""
    for given in (TRITON, FA3):
        assert ("gather", "drain", "_enqueue_chunk") in own_fences(experiment("hybrid", **given))


# --- what keeps a transfer whole ---


def test_indices_are_kept_until_the_transfer_is_done() -> None:
    def keep_nothing(active: scheduler_hooks.Active) -> None:
        active.writeback._keep = lambda *of_a_write: None  # type: ignore[method-assign]

    run = is_found(experiment("hybrid"), keep_all, mutate=keep_nothing)
    assert run is not None
    assert {race.kind for race in run.races} == {"use_after_free"}


def test_a_write_is_not_done_before_its_last_chunk_is_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that is recorded later must not be handed out as it is: it reads as complete."""
    made = experiment("hybrid")
    monkeypatch.setattr(writeback, "deferred", lambda native, *rest: native)
    run = is_found(made, keep_all)
    assert run is not None
    assert run.wrong_rows


def test_a_seed_is_one_run() -> None:
    made = experiment("fenced_kernel", KeptFences.none)

    def again(seed: int) -> tuple[Any, ...]:
        run = made.run(seed, left_out(KeptFences.none))
        races = sorted((race.kind, race.first.issued, race.second.issued, race.count) for race in run.races)
        return races, run.wrong_rows, run.wrong_reads, run.writes, run.counts

    assert again(3) == again(3)
    assert again(3) != again(4)


# --- what it looks like ---


def test_a_timeline_shows_who_waits() -> None:
    """By the model: a forward waits for a whole transfer by kernel, for a gather only, or for nothing."""
    from sglang_hicache.bench.race.timeline import timelines

    runs = timelines(facts_of(**FA3, page_size=16))
    waits = {name: timeline.waited("forward") for name, timeline in runs.items()}
    assert waits["copy_engine"] == 0
    assert 0 < waits["hybrid"] < waits["fenced_kernel"] / 10
    assert runs["fenced_kernel"].waited("forward", on="transfer") == waits["fenced_kernel"]
