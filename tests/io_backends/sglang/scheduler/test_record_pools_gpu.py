"""Pools of pages and states on a GPU: our backends write what SGLang's own copy writes, to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from gpu import why_not
from record_pools import CASES, POISON, RecordPool, build
from stand_in_scheduler import fences

from sglang_hicache.io_backends import get_backend
from sglang_hicache.io_backends.device.cuda import CudaDevice
from sglang_hicache.io_backends.registry import OWN_NAMES
from sglang_hicache.io_backends.routes import one_route
from sglang_hicache.io_backends.sglang.pools.geometry import host_buffers
from sglang_hicache.io_backends.sglang.scheduler.writeback import WriteBack

WHY_NOT = why_not("sglang")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]


@pytest.fixture(scope="module", autouse=True)
def published() -> None:
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    publish(ServerArgs(model_path="dummy"), role="scheduler")


@pytest.fixture
def pool(kind: str, layout: str) -> Iterator[RecordPool]:
    import torch

    made = build(kind, layout, device="cuda")
    torch.cuda.synchronize()
    yield made
    torch.cuda.synchronize()
    made.host.destroy()


def submit(pool: RecordPool, writeback: WriteBack | None, host: Any, device: Any) -> Any:
    """By our backend, or by SGLang's own engine and copy without one."""
    from sglang.srt.mem_cache.l2_transfer import L2Transfer, L2TransferEngine

    direct = pool.host.layout == "page_first_direct"
    engine = L2TransferEngine("direct" if direct else "kernel")
    if writeback is None:
        host, device = (host, device.cpu()) if direct else (host.cuda(), device)
        transfers = [L2Transfer(pool.host, pool.device, host, device)]
        return engine.submit_device_to_host(transfers)
    transfers = [L2Transfer(pool.host, pool.device, host, device)]
    return writeback.submit(L2TransferEngine.submit_device_to_host, engine, transfers)


def copied(pool: RecordPool, writeback: WriteBack | None, host: Any, device: Any) -> list[Any]:
    """Host memory after the write, of poison before it."""
    import torch

    for buffer in host_buffers(pool.host):
        buffer.view(-1).view(torch.uint8).fill_(POISON)
    submit(pool, writeback, host, device).finish_event.synchronize()
    return [buffer.clone().view(-1).view(torch.uint8) for buffer in host_buffers(pool.host)]


@pytest.mark.parametrize("records", [1, 7, 12])
@pytest.mark.parametrize(("kind", "layout"), CASES)
@pytest.mark.parametrize("name", [name for name in OWN_NAMES if name != "fenced_kernel"])
def test_the_bytes_are_those_of_sglangs_own_copy(name: str, pool: RecordPool, records: int) -> None:
    import torch

    host, device = pool.slots(records, seed=records)
    device = device.cuda()
    with unstaged(pool):
        expected = copied(pool, None, host, device)
    seam = CudaDevice()
    writeback = WriteBack(seam, one_route(get_backend(name)(seam, {"staging_mb": 8}), ()), fences(seam))
    found = copied(pool, writeback, host, device)
    assert writeback.pools.fallbacks() == []
    assert writeback.counters.by_backend == {name: 1}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    pool.assert_copied(host, device.cpu())


def unstaged(pool: RecordPool) -> Any:
    """SGLang's staged copy takes host indices on the host, which these are not."""
    from sglang_hicache.io_backends.sglang.scheduler import kernels

    return kernels.without_staging(pool.host)
