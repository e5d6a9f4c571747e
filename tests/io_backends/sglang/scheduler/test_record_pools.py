"""Pools of pages and states: the right bytes by SGLang's own views, whatever a write is like."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from record_pools import CASES, DCP, STEPPED, build
from stand_in_scheduler import fences

from sglang_hicache.io_backends import get_backend
from sglang_hicache.io_backends.device.cpu import CpuDevice
from sglang_hicache.io_backends.plan.staged_write import is_whole
from sglang_hicache.io_backends.registry import OWN_NAMES
from sglang_hicache.io_backends.routes import one_route
from sglang_hicache.io_backends.sglang import versions
from sglang_hicache.io_backends.sglang.errors import RefusedError
from sglang_hicache.io_backends.sglang.pools.errors import ShortHostRowsError, UnsupportedPoolError
from sglang_hicache.io_backends.sglang.pools.geometry import describe_pool
from sglang_hicache.io_backends.sglang.scheduler.writeback import WriteBack

pytestmark = pytest.mark.usefixtures("cpu_sglang")


def write_back(name: str) -> WriteBack:
    device = CpuDevice()
    return WriteBack(device, one_route(get_backend(name)(device, {"staging_mb": 1}), ()), fences(device))


def submit(writeback: WriteBack, pool: Any, host: Any, device: Any) -> Any:
    from sglang.srt.mem_cache.l2_transfer import L2Transfer, L2TransferEngine

    engine = L2TransferEngine("direct" if pool.host.layout == "page_first_direct" else "kernel")
    transfers = [L2Transfer(pool.host, pool.device, host, device)]
    return writeback.submit(L2TransferEngine.submit_device_to_host, engine, transfers)


@pytest.mark.parametrize("records", [1, 7, 12])
@pytest.mark.parametrize(("kind", "layout"), CASES)
@pytest.mark.parametrize("name", OWN_NAMES)
def test_records_byte_for_byte(name: str, kind: str, layout: str, records: int) -> None:
    pool = build(kind, layout)
    host, device = pool.slots(records, seed=records)
    writeback = write_back(name)
    completion = submit(writeback, pool, host, device)
    pool.assert_copied(host, device)
    assert completion.finish_event.query()
    assert writeback.pools.fallbacks() == []
    assert writeback.counters.bytes == pool.bytes_of(records)
    assert writeback.counters.by_backend == {name: 1}


@pytest.mark.parametrize("name", OWN_NAMES)
def test_states_whose_device_slots_are_apart(name: str) -> None:
    """Unified memory keeps a slot's states together, so that one array's are not."""
    pool = build("states", "page_first", strided=True)
    assert not pool.rows[0][1].is_contiguous()
    host, device = pool.slots(9)
    submit(write_back(name), pool, host, device)
    pool.assert_copied(host, device)


@pytest.mark.parametrize("kind", ["index_pages", "packed_pages", "page_rows", "dcp"])
def test_half_a_page_is_left_to_sglang(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page holds keys, then their scales: some of its bytes are no token's own."""
    pool = build(kind, "page_first")
    geometry = describe_pool(pool.host)
    host, device = pool.slots(2)
    assert is_whole(geometry, host)
    for wrong in (host[:-1], host[1:], host.flip(0)):
        assert not is_whole(geometry, wrong)
    calls: list[int] = []
    monkeypatch.setattr(
        type(pool.host), "backup_from_device_all_layer", lambda *args, **named: calls.append(1)
    )
    writeback = write_back("copy_engine")
    submit(writeback, pool, host[:-1], device[:-1])
    assert calls == [1]
    assert writeback.counters.by_backend == {"upstream": 1}


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
@pytest.mark.parametrize("kind", STEPPED)
def test_several_indices_for_a_row_are_served_where_a_gpu_has_compared(
    kind: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = build(kind, layout).host
    served = []
    for release in versions.RELEASES:
        monkeypatch.setattr(versions, "installed", lambda number=release.version: number)
        if release.index_steps and (kind, layout) in CASES:
            assert describe_pool(pool).index_step > 1
            served.append(release.version)
        elif release.index_steps:
            with pytest.raises(UnsupportedPoolError, match=r"\(layer_first\)"):
                describe_pool(pool)
        else:
            with pytest.raises(
                UnsupportedPoolError, match=r"compared with ours on a GPU in SGLang 0\.5\.23 only$"
            ):
                describe_pool(pool)
    assert served == (["0.5.23"] if (kind, layout) in CASES else [])


def test_what_the_gpu_tests_compared_are_the_steps_that_are_served() -> None:
    """90 of them passed, for two backends and three numbers of records: no case is left out."""
    compared = [case for case in CASES if case[0] in STEPPED]
    assert len(CASES) * 2 * 3 == 90
    assert [case for case in compared if describe_pool(build(*case).host).index_step == 1] == []
    assert len(compared) * 2 * 3 == 30


def test_pages_in_which_a_draft_has_more_rows_are_written_by_the_index_all_the_same() -> None:
    """Heads of DeepSeek-V4 lie behind the target's sliding layers, in the same pool."""
    import torch

    pool = build("page_rows", "page_first")
    longer = torch.randint(0, 256, (20, pool.host.item_bytes), dtype=torch.uint8)
    pool.host.device_buffers[-1] = longer
    pool.rows[-1] = (pool.rows[-1][0], longer)
    host, device = pool.slots(9)
    submit(write_back("hybrid"), pool, host, device)
    pool.assert_copied(host, device)


def test_pages_that_differ_between_layers_are_served_by_nobody() -> None:
    """SGLang's copy takes one number of bytes for all of them."""
    pool = build("page_rows", "page_first")
    pool.host.device_buffers[-1] = pool.host.device_buffers[-1].repeat(1, 2)
    with pytest.raises(ShortHostRowsError, match=r"a host row has 224 bytes, and the device row .* 448"):
        describe_pool(pool.host)


def test_a_draft_whose_rows_are_not_shared_among_ranks_is_left_to_sglang() -> None:
    """With decode context parallelism a draft has all rows, and an index is one of them. SGLang keeps such a
    draft in a pool of its own; packed with the target's it would be read at a part of its indices."""
    import torch

    pool = build("dcp", "page_first").host
    *target, last = pool.device_kv_buffers
    pool.device_kv_buffers = (*target, torch.cat([last] * DCP))
    with pytest.raises(UnsupportedPoolError, match="not all of its layers share their rows among ranks"):
        describe_pool(pool)


def test_the_hosts_of_hisparse_are_left_alone() -> None:
    """Of DeepSeek-V4 they are of the same class, and copied on streams of its own."""
    with pytest.raises(UnsupportedPoolError, match=r"\(layer_first\)"):
        describe_pool(build("page_rows", "layer_first").host)


@pytest.mark.parametrize("kind", STEPPED)
@pytest.mark.parametrize("name", OWN_NAMES)
def test_indices_that_unified_memory_translates_are_left_to_sglang(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = build(kind, "page_first")
    host, device = pool.slots(3)
    calls: list[int] = []
    monkeypatch.setattr(
        type(pool.host), "backup_from_device_all_layer", lambda *args, **named: calls.append(1)
    )
    pool.device.host_transfer_translate = lambda indices: indices
    writeback = write_back(name)
    submit(writeback, pool, host, device)
    assert calls == [1]
    assert writeback.counters.by_backend == {"upstream": 1}


@pytest.mark.parametrize("name", OWN_NAMES)
@pytest.mark.parametrize(("kind", "layout"), [case for case in CASES if case[0] in STEPPED])
def test_writes_that_sglang_merged_are_written_whole(name: str, kind: str, layout: str) -> None:
    """Its queue joins the indices of several nodes, each of whole pages (``CacheOperation.merge_ops``)."""
    import torch

    pool = build(kind, layout)
    host, device = pool.slots(7, seed=5)
    at = 3 * pool.per_record
    parts = [slice(at, None), slice(0, at)]
    writeback = write_back(name)
    submit(
        writeback,
        pool,
        torch.cat([host[part] for part in parts]),
        torch.cat([device[part] for part in parts]),
    )
    pool.assert_copied(host, device)
    assert writeback.counters.by_backend == {name: 1}


def test_a_write_of_deepseek_v4_as_sglangs_controller_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots without bytes, pages that follow their indices, states that follow the window's."""
    import torch
    from sglang.srt.managers.cache_controller import CacheOperation
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
    from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import build_pool_entry
    from sglang.srt.mem_cache.l2_transfer import L2TransferEngine
    from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4StateHostPool, LogicalHostPool
    from sglang.srt.mem_cache.pool_host.group import HostPoolGroup

    pages, window = build("page_rows", "page_first"), build("page_rows", "page_first")
    window.host.pool_name = "swa"
    ring = SimpleNamespace(
        ring_size=2, kv_score_buffer=SimpleNamespace(kv_score=torch.zeros(24, 4)), request_scoped=False
    )
    states = DeepSeekV4StateHostPool("deepseek_v4_c4_state", [ring], 20, 8, "page_first", pin_memory=False)
    calls: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        DeepSeekV4StateHostPool,
        "backup_from_device_all_layer",
        lambda pool, device_pool, host, device, io_backend: calls.append((host, device)),
    )
    pools = {
        PoolName.KV: LogicalHostPool(20 * 8, 8, "page_first"),
        PoolName.SWA: window.host,
        PoolName.DEEPSEEK_V4_C4: pages.host,
        PoolName.DEEPSEEK_V4_C4_STATE: states,
    }
    controller = object.__new__(HybridCacheController)
    controller.io_backend, controller.device = "kernel", "cpu"
    controller.mem_pool_host = HostPoolGroup(
        [
            build_pool_entry(
                name=name,
                host_pool=pool,
                device_pool=SimpleNamespace(),
                layer_mapping={},
                transfer_layer_id_max=1,
                is_anchor=name == PoolName.KV,
            )
            for name, pool in pools.items()
        ]
    )
    of_node, of_window = pages.slots(9, seed=1), window.slots(2, seed=2)
    given = {
        PoolName.SWA: of_window,
        PoolName.DEEPSEEK_V4_C4: of_node,
        PoolName.DEEPSEEK_V4_C4_STATE: of_window,
    }
    transfers = [
        PoolTransfer(name=name, host_indices=host, device_indices=device)
        for name, (host, device) in given.items()
    ]
    operation = CacheOperation(*of_node, node_id=1, pool_transfers=transfers)
    writeback = write_back("hybrid")
    moved = writeback.move_write_operation(HybridCacheController._move_write_operation, controller, operation)
    engine = L2TransferEngine("kernel")
    writeback.submit(L2TransferEngine.submit_device_to_host, engine, controller._l2_transfers(*moved))
    pages.assert_copied(*of_node)
    window.assert_copied(*of_window)
    ((host, device),) = calls
    assert (host.tolist(), device.tolist()) == (of_window[0].tolist(), of_window[1].tolist())
    assert writeback.counters.by_backend == {"hybrid": 2, "upstream": 1}
    # A ring of two rows of 16 bytes is a page of one layer.
    assert writeback.counters.bytes == pages.bytes_of(9) + window.bytes_of(2) + 2 * 32


def test_the_slots_of_deepseek_v4_are_nothing_to_wait_for() -> None:
    """They have no bytes. Its other pools follow their indices."""
    from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool

    pool = build("page_rows", "page_first")
    slots = dataclasses.replace(pool, host=LogicalHostPool(20 * 8, 8, "page_first"))
    with pytest.raises(UnsupportedPoolError, match="holds slots and no bytes"):
        describe_pool(slots.host)
    writeback = write_back("hybrid")
    submit(writeback, slots, *pool.slots(3))
    assert writeback.counters.fallback_writes == writeback.counters.bytes == 0
    assert writeback.fences.before_forward(frozenset({"extend", "decode"})) == 0


def test_windows_in_pages_are_left_to_sglang_where_they_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = build("page_rows", "page_first").host
    pool.pool_name = "swa"
    assert describe_pool(pool).label == "swa"
    of_today = versions.current()
    older = dataclasses.replace(of_today, windows_held=False)
    monkeypatch.setattr(versions, "current", lambda: older)
    with pytest.raises(UnsupportedPoolError, match="rows of sliding layers"):
        describe_pool(pool)


@pytest.mark.parametrize("kind", STEPPED)
def test_as_many_device_indices_as_host_indices(kind: str) -> None:
    pool = build(kind, "page_first")
    host, device = pool.slots(2)
    with pytest.raises(ValueError, match=f"{len(host)} host indices for {len(host) + 1} device indices"):
        submit(write_back("hybrid"), pool, host, np.append(device, 0))


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_an_index_past_the_end_is_refused(kind: str, layout: str) -> None:
    pool = build(kind, layout)
    host, device = pool.slots(1)
    with pytest.raises(ValueError, match="host index"):
        submit(write_back("copy_engine"), pool, host * 0 + np.arange(len(host)) + pool.indices, device)


def test_host_rows_that_are_shorter_end_the_start() -> None:
    """Nothing can keep them whole, so nobody may copy them either."""
    pool = build("keys_only", "page_first")
    pool.device.k_buffer = [rows.repeat(1, 1, 2) for rows in pool.device.k_buffer]
    with pytest.raises(ShortHostRowsError, match=r"a host row has 64 bytes, and the device row .* 128"):
        describe_pool(pool.host)
    with pytest.raises(RefusedError, match=r"pool \w+, k: a host row has 64 bytes"):
        write_back("hybrid").pools.serves(pool.host)


def test_host_rows_that_are_longer_are_left_to_sglang() -> None:
    pool = build("keys_only", "page_first")
    pool.device.k_buffer = [rows[..., :8].contiguous() for rows in pool.device.k_buffer]
    with pytest.raises(UnsupportedPoolError, match="a device row has 32 bytes, a host row 64"):
        describe_pool(pool.host)
    assert not write_back("hybrid").pools.serves(pool.host)


def test_a_layer_without_device_rows_is_left_to_sglang() -> None:
    pool = build("keys_only", "page_first")
    pool.device.k_buffer[-1] = pool.device.k_buffer[-1][:0]
    with pytest.raises(UnsupportedPoolError, match="a layer has no device rows"):
        describe_pool(pool.host)


def test_side_states_are_left_to_sglang() -> None:
    import torch

    pool = build("states", "page_first")
    pool.host.slot_state_device_tensors = [torch.zeros(24, 4)]
    with pytest.raises(UnsupportedPoolError, match="side states"):
        describe_pool(pool.host)


def test_a_record_is_a_page_or_one_slot() -> None:
    geometry = describe_pool(build("index_pages", "layer_first").host)
    assert (geometry.record_slots, geometry.page_size) == (64, 64)
    with pytest.raises(ValueError, match="is not a page"):
        dataclasses.replace(geometry, record_slots=2)


def test_a_release_whose_copy_ours_was_not_compared_with_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = build("index_pages", "page_first").host
    assert describe_pool(pool).record_slots > 1
    older = [release.version for release in versions.RELEASES if not release.index_pools]
    assert older == ["0.5.18", "0.5.19"]
    for each in older:
        monkeypatch.setattr(versions, "installed", lambda each=each: each)
        with pytest.raises(UnsupportedPoolError, match="was not compared with ours on a GPU"):
            describe_pool(pool)


def test_states_that_a_release_does_not_hold_are_left_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward may write what a later gap between forwards is to read; race_state_cases.py has the rest."""
    pool = build("states", "page_first").host
    assert describe_pool(pool).kv_kind == "state"
    held = [release.version for release in versions.RELEASES if release.states_held]
    assert held == ["0.5.22", "0.5.23"]
    for release in versions.RELEASES:
        monkeypatch.setattr(versions, "installed", lambda number=release.version: number)
        if not release.states_held:
            with pytest.raises(UnsupportedPoolError, match="may write a state that its cache holds"):
                describe_pool(pool)
