"""flashinfer plans the same forward whichever way it reads its index pointers, on a real GPU."""

from __future__ import annotations

from typing import Any

import pytest
from gpu import MARKS, why_not

from sglang_hicache.io_backends.device.cuda import CudaDevice
from sglang_hicache.io_backends.sglang.scheduler.writes import Counters

WHY_NOT = why_not("flashinfer")
pytestmark = [*MARKS, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
if WHY_NOT is None:
    import flashinfer
    import torch

    from sglang_hicache.io_backends.sglang.scheduler.plan_reads import PlanReads

HEADS, KV_HEADS, WIDTH = 8, 2, 128


@pytest.mark.parametrize("seed", range(5))
def test_attention_is_the_same(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    requests = int(torch.randint(1, 9, (), generator=draw))
    new = torch.randint(1, 200, (requests,), generator=draw)
    cached = torch.randint(0, 500, (requests,), generator=draw)
    tokens, slots = int(new.sum()), int((new + cached).sum())

    def pointers(lengths: Any) -> Any:
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).cuda()

    def values(*shape: int) -> Any:
        return torch.randn(shape, generator=draw).to(torch.bfloat16).cuda()

    query, cache = values(tokens, HEADS, WIDTH), values(2 * slots, 2, 1, KV_HEADS, WIDTH)
    indices = torch.randperm(2 * slots, generator=draw)[:slots].to(torch.int32).cuda()
    last_page = torch.ones(requests, dtype=torch.int32, device="cuda")
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")

    def plan() -> None:
        wrapper.plan(
            pointers(new),
            pointers(new + cached),
            indices,
            last_page,
            HEADS,
            KV_HEADS,
            WIDTH,
            1,
            causal=True,
            q_data_type=torch.bfloat16,
        )

    plan()
    as_before = wrapper.run(query, cache)
    counters = Counters()
    with PlanReads(CudaDevice().small_reads(), counters):
        plan()
    assert counters.plan_reads >= 3
    assert torch.equal(wrapper.run(query, cache), as_before)
