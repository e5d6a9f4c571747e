"""Pools of pages and states: the right bytes by SGLang's own views, whatever a write is like."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from record_pools import CASES, build, serve_index_steps
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


@pytest.fixture(autouse=True)
def index_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_index_steps(monkeypatch)


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


@pytest.mark.parametrize("kind", ["page_rows", "dcp"])
def test_several_indices_for_a_row_wait_for_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = build(kind, "page_first").host
    assert describe_pool(pool).index_step > 1
    for release in versions.RELEASES:
        assert not release.index_steps
        monkeypatch.setattr(versions, "current", lambda release=release: release)
        with pytest.raises(UnsupportedPoolError, match="on a GPU yet"):
            describe_pool(pool)


def test_windows_in_pages_are_left_to_sglang_where_they_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = build("page_rows", "page_first").host
    pool.pool_name = "swa"
    assert describe_pool(pool).label == "swa"
    of_today = versions.current()
    older = dataclasses.replace(of_today, windows_held=False)
    monkeypatch.setattr(versions, "current", lambda: older)
    with pytest.raises(UnsupportedPoolError, match="rows of sliding layers"):
        describe_pool(pool)


@pytest.mark.parametrize("kind", ["page_rows", "dcp"])
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
