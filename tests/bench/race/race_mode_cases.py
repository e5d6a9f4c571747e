"""Every way in which a server runs forwards and asks for writes: nothing races, and each fence is needed.

Run by test_race.py, as race_cases.py is. `hicache-io race --mode all` runs 200 seeds of each.
"""

from __future__ import annotations

from typing import Any

import pytest
from race_cases import REDUNDANT as EVERYWHERE
from race_cases import (
    Fence,
    cache,
    experiment,
    facts_of,
    is_found,
    keep_all,
    own_fences,
    result_of,
    without,
)

from sglang_hicache.bench.race.kept_fences import KeptFences
from sglang_hicache.bench.race.simulation import setups
from sglang_hicache.bench.race.simulation.experiment import Experiment, left_out
from sglang_hicache.bench.race.simulation.modes import MODES
from sglang_hicache.io_backends.policy_files import policy_in_force
from sglang_hicache.io_backends.registry import AUTO
from sglang_hicache.io_backends.sglang.scheduler import fences, scheduler_hooks
from sglang_hicache.policy.decide import decide

pytestmark = pytest.mark.usefixtures("libcuda")

NEW = [name for name in MODES if name != "overlap"]
BACKENDS = ["fenced_kernel", "copy_engine", "hybrid", AUTO]
SEEDS = range(15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", NEW)
def test_nothing_races(mode: str, backend: str) -> None:
    found = result_of(experiment(backend, mode=mode), SEEDS, keep_all)
    assert found.good, found.to_dict()
    assert found.writes > 2 * len(SEEDS)


@pytest.mark.parametrize("backend", ["fenced_kernel", "hybrid"])
@pytest.mark.parametrize("mode", [name for name in NEW if name != "synchronize"])
def test_whoever_waits_for_a_write(mode: str, backend: str) -> None:
    found = result_of(experiment(backend, mode=mode, callers=True), SEEDS, keep_all)
    assert found.good, found.to_dict()


LACKS = {
    "pipeline": {"sm_overlap"},
    "synchronize": {"sm_overlap"},
    "offload": {"sm_overlap"},
    "retraction": {"read_before_write", "sm_overlap"},
    "no-overlap": {"sm_overlap"},
    "speculative": {"sm_overlap"},
    "states": {"sm_overlap"},
}
"""What SGLang 0.5.23 by itself does not order beside fa3 on sm90.

A retraction is written past the write fence: it takes whole pages, and the last one may have the row that the
forward in flight writes.
"""


@pytest.mark.parametrize("mode", NEW)
def test_what_sglang_lacks(mode: str) -> None:
    found = result_of(experiment(None, mode=mode), SEEDS, keep_all)
    assert set(found.kinds) == LACKS[mode], found.to_dict()
    assert not found.corrupted


@pytest.mark.parametrize("mode", NEW)
def test_each_kind_of_fence_is_needed(mode: str) -> None:
    """Without any, indices are read before they are made, and in most modes rows before they are written."""
    made = experiment("fenced_kernel", KeptFences.producer, mode=mode)
    assert set(result_of(made, SEEDS, left_out(KeptFences.none)).kinds) == {"read_before_write", "sm_overlap"}
    # An offload is waited for before the next forward.
    left = set() if mode == "offload" else {"sm_overlap"}
    assert set(result_of(made, SEEDS, left_out(KeptFences.producer)).kinds) == left


# --- every fence of ours, one at a time ---

REDUNDANT: dict[Fence, str] = {fence: why for (name, fence), why in EVERYWHERE.items() if name == "hybrid"}
"""Waits that another one covers, as in the overlap loop, and which."""

REDUNDANT_IN: dict[str, dict[Fence, str]] = {
    "offload": {
        ("forward", "gather", "before_forward"): "the host waits for every write before the next forward",
    },
    "synchronize": {
        ("schedule", "transfer", "wait"): "the caller asked for it, and needs it for itself",
        ("forward", "transfer", "wait"): "the same",
        ("load", "transfer", "wait"): "the same",
        ("gather", "load", "advance"): "the stream that is current there makes neither rows nor indices",
    },
    "no-overlap": {
        ("forward", "gather", "before_forward"): "nothing runs on the forward stream",
        ("gather", "forward", "submit"): "the same",
        ("gather", "forward", "advance"): "the same",
    },
}
"""In a mode alone."""


@pytest.mark.parametrize("mode", NEW)
def test_each_fence_is_needed(mode: str) -> None:
    """Of ``hybrid``, which has those of every backend."""
    made = experiment("hybrid", mode=mode)
    needed = own_fences(made)
    assert needed
    missed = {fence for fence in needed if is_found(made, without(fence), SEEDS) is None}
    redundant = REDUNDANT.keys() | REDUNDANT_IN.get(mode, {}).keys()
    assert missed == redundant & needed


# --- faults that these modes are there to see ---


def flushes_without_fresh_events(active: scheduler_hooks.Active) -> None:
    """Who waits for a write gets the rest of it behind the events of its beginning only."""
    writeback, flush = active.writeback, active.writeback._flush

    def stale(write: Any) -> None:
        ready = writeback.fences.ready
        writeback.fences.ready = lambda: ()  # type: ignore[method-assign]
        try:
            flush(write)
        finally:
            writeback.fences.ready = ready  # type: ignore[method-assign]

    writeback._flush = stale  # type: ignore[method-assign]


@pytest.mark.parametrize("mode", ["pipeline", "synchronize"])
def test_a_flush_beside_a_forward_is_found(mode: str) -> None:
    made = experiment("hybrid", mode=mode)
    # 17 and 25 of 120 seeds show it: nothing is left to flush where a gap takes all of a write.
    run = is_found(made, keep_all, range(60), mutate=flushes_without_fresh_events)
    assert run is not None
    assert {race.kind for race in run.races} == {"sm_overlap"}


PREFILL_FA3 = {
    "prefill_attention_backend": "fa3",
    "decode_attention_backend": "flashinfer",
    "gpu_arch": "sm90",
}


def speculative(backend: str) -> Experiment:
    """fa3 for prefill alone: verification and draft extension of a decode step use it."""
    facts = facts_of(**PREFILL_FA3)
    mode = MODES["speculative"]
    decision = decide(policy_in_force(None), facts, backend=backend)
    setup = mode.setup_of(setups.setup_of(facts, "kernel"))
    return Experiment(cache(setup), decision, setups.exclusive_forwards(facts), mode.scheduler)


def test_a_verification_uses_the_prefill_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    made = speculative("hybrid")
    found = result_of(made, SEEDS, keep_all)
    assert found.good, found.to_dict()
    of = fences.forwards_of
    monkeypatch.setattr(
        scheduler_hooks, "forwards_of", lambda mode, *, speculative: of(mode, speculative=False)
    )
    run = is_found(made, keep_all)
    assert run is not None
    assert {race.kind for race in run.races} == {"sm_overlap"}


def test_without_overlap_the_stream_that_is_current_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = experiment("hybrid", mode="no-overlap")
    monkeypatch.setattr(fences.Fences, "_launch_streams", lambda self: (self._scheduler.forward_stream,))
    run = is_found(made, keep_all)
    assert run is not None
    assert {race.kind for race in run.races} == {"sm_overlap"}


# --- a retraction is written past SGLang's own fence, by the same engine ---


@pytest.mark.parametrize("backend", ["fenced_kernel", "copy_engine", "hybrid"])
def test_a_retraction_passes_the_hook(backend: str) -> None:
    """Every one of them, also where the host pool is for that alone, and the controller has no fence."""
    made = experiment(backend, mode="retraction")
    backups: list[bool] = []
    counted: list[scheduler_hooks.Active] = []

    def watch(active: scheduler_hooks.Active) -> None:
        engine = made.cache.controller.l2_transfer_engine
        backup = type(made.cache.tree).backup_kv_cache

        def backup_kv_cache(request: Any) -> Any:
            before = active.writeback.counters.writes, active.writeback.counters.producer_fences
            saved = backup(made.cache.tree, request)
            after = active.writeback.counters.writes, active.writeback.counters.producer_fences
            if saved is not None:
                assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1]
                backups.append(made.cache.controller.write_fence_stream is None)
            return saved

        made.cache.tree.backup_kv_cache = backup_kv_cache
        assert made.cache.controller.l2_transfer_engine is engine
        counted.append(active)

    try:
        for seed in range(12):
            run = made.run(seed, keep_all, mutate=watch)
            assert not run.races
            assert not run.wrong_rows
    finally:
        vars(made.cache.tree).pop("backup_kv_cache", None)
    # Both servers: with a write fence that this path does not ask, and with none.
    assert set(backups) == {True, False}
    # What is written otherwise has a fence of SGLang's; a server without one wrote nothing else.
    assert len(backups) > 10
    # The thread's time is counted where the hook is passed.
    assert all(active.writeback.counters.submit_seconds > 0 for active in counted)


def past_the_hook(made: Experiment) -> Any:
    """A plug-in that hooks ``start_writing`` only: retractions go as SGLang sends them."""

    def mutate(active: scheduler_hooks.Active) -> None:
        tree, writeback = made.cache.tree, active.writeback
        submit, backup = writeback.submit, type(tree).backup_kv_cache

        def backup_kv_cache(request: Any) -> Any:
            writeback.submit = lambda original, *rest: original(*rest)  # type: ignore[method-assign]
            try:
                return backup(tree, request)
            finally:
                writeback.submit = submit  # type: ignore[method-assign]

        tree.backup_kv_cache = backup_kv_cache

    return mutate


def test_a_retraction_past_the_hook_is_found() -> None:
    made = experiment("fenced_kernel", mode="retraction")
    try:
        run = is_found(made, keep_all, mutate=past_the_hook(made))
    finally:
        vars(made.cache.tree).pop("backup_kv_cache", None)
    assert run is not None
    assert {race.kind for race in run.races} & {"read_before_write", "sm_overlap"}
