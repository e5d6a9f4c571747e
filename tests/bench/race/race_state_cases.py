"""States of linear layers: the slot of a write is SGLang's to keep until it takes the write as done.

A state is written in place, and a part of a write may read it several forwards later. So each case lets
others take what the tree gives up, and write it, at any time. Run by test_race.py, as race_cases.py is, for
each release whose pools of states are served.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import unheld
from race_cases import facts_of, keep_all

from sglang_hicache.bench.race.result import RaceResult
from sglang_hicache.bench.race.simulation import setups
from sglang_hicache.bench.race.simulation.cache import Cache, Setup
from sglang_hicache.bench.race.simulation.experiment import Experiment
from sglang_hicache.bench.race.simulation.states import States, StatesNoOverlap, SynchronizeStates
from sglang_hicache.io_backends.policy_files import policy_in_force
from sglang_hicache.io_backends.sglang import versions
from sglang_hicache.policy.decide import decide

pytestmark = pytest.mark.usefixtures("libcuda")

STRATEGIES = ["extra_buffer", "extra_buffer_lazy", "no_buffer"]
POLICIES = ["write_through", "write_through_selective", "write_back"]
BACKENDS = ["fenced_kernel", "copy_engine", "hybrid"]
CORES = ["rust", "python"]
SEEDS = range(12)
MORE_SEEDS = range(40)


@functools.cache
def cache(states: str, policy: str, core: str, page: int, layout: str, kind: str) -> Cache:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", core)
        io_backend = "direct" if layout == "page_first_direct" else "kernel"
        setup = Setup(kind, layout, page, "sm90", io_backend, draft=False, states=states, write_policy=policy)
        return Cache(setup)


def experiment(
    backend: str | None,
    states: str = "extra_buffer",
    policy: str = "write_through",
    core: str = "rust",
    *,
    callers: bool = False,
    page: int = 1,
    layout: str = "page_first",
    kind: str = "mha",
) -> Experiment:
    facts = facts_of(
        attention_backend="fa3", gpu_arch="sm90", page_size=page, mem_layout=layout, kv_kind=kind
    )
    decision = None if backend is None else decide(policy_in_force(None), facts, backend=backend)
    scheduler = StatesNoOverlap if states == "no_buffer" else SynchronizeStates if callers else States
    return Experiment(
        cache(states, policy, core, page, layout, kind),
        decision,
        setups.exclusive_forwards(facts),
        scheduler,
    )


def result_of(made: Experiment, seeds: range, mutate: Any = lambda active: None) -> RaceResult:
    result = RaceResult()
    for seed in seeds:
        result.add(made.run(seed, keep_all, mutate=mutate))
    return result


def good(made: Experiment, seeds: range = SEEDS) -> RaceResult:
    found = result_of(made, seeds)
    assert found.good, found.to_dict()
    return found


def test_this_release_holds_states() -> None:
    assert versions.current().states_held


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("states", STRATEGIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_races(backend: str, states: str, policy: str) -> None:
    assert good(experiment(backend, states, policy)).served_writes


@pytest.mark.parametrize("core", CORES)
def test_states_are_written_and_loaded(core: str) -> None:
    """By every case: else nothing would be shown."""
    made = experiment("hybrid", core=core)
    assert ("rust" in type(made.cache.tree.tree_core).__module__) is (core == "rust")
    found = good(made, MORE_SEEDS)
    # Two pools of nearly each write.
    assert found.served_writes > 1.8 * found.writes
    assert found.loads > len(MORE_SEEDS) / 4


@pytest.mark.parametrize(
    ("page", "layout", "kind"),
    [(4, "page_first", "mla"), (4, "page_first_direct", "mha"), (16, "page_first", "mha")],
)
def test_other_pools_beside_them(page: int, layout: str, kind: str) -> None:
    backend = "copy_engine" if layout == "page_first_direct" else "hybrid"
    assert good(experiment(backend, page=page, layout=layout, kind=kind)).served_writes


@pytest.mark.parametrize("policy", ["write_through", "write_back"])
def test_whoever_waits_for_a_write(policy: str) -> None:
    assert good(experiment("hybrid", policy=policy, callers=True)).served_writes


@pytest.mark.parametrize("policy", ["write_through", "write_back"])
@pytest.mark.parametrize("states", ["extra_buffer", "no_buffer"])
def test_of_the_other_tree(states: str, policy: str) -> None:
    """SGLang has its tree twice, in Rust and in Python."""
    assert good(experiment("hybrid", states, policy, "python")).served_writes


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("states", ["extra_buffer", "no_buffer"])
@pytest.mark.parametrize("backend", ["copy_engine", "hybrid"])
def test_the_lock_of_a_write_is_what_holds_its_state(
    backend: str, states: str, core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a state is given to others, who write it before it is read."""
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

    made = experiment(backend, states, core=core)
    unheld.without_lock(monkeypatch, made.cache.tree, ComponentType.MAMBA)
    found = result_of(made, MORE_SEEDS)
    assert "write_after_read" in found.kinds
    assert found.corrupted


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("backend", ["copy_engine", "hybrid"])
def test_a_write_back_holds_its_state_by_waiting(
    backend: str, core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eviction that writes back takes no lock: it gives slots away once the write is done."""
    made = experiment(backend, policy="write_back", core=core)
    unheld.without_wait(monkeypatch, made.cache.tree, made.cache.controller)
    found = result_of(made, MORE_SEEDS)
    assert "write_after_read" in found.kinds
    assert found.corrupted


def test_a_request_that_is_over_tracks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that verifies drafts may still have it (grammars): it may not write the state it gave away."""
    import torch
    from sglang.srt.managers import schedule_batch

    made = experiment("copy_engine")
    requests = made.cache.requests
    monkeypatch.setattr(
        requests, "req_index_to_mamba_ping_pong_track_buffer_mapping", torch.tensor([[0, 0], [5, 6], [7, 8]])
    )
    over, runs = (
        type("Request", (), {"kv": type("Kv", (), {"mamba_next_track_idx": at})}) for at in (None, 1)
    )
    batch: Any = type("Batch", (), {"req_to_token_pool": requests, "reqs": [over, runs]})
    batch.req_pool_indices = torch.tensor([1, 2])
    schedule_batch.set_mamba_track_indices_from_reqs(batch)
    assert batch.mamba_track_indices.tolist() == [-1, 8]
