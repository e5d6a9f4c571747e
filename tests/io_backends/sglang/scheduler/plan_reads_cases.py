"""The hook on SGLang's own planners, by its own registry. Run by test_plan_reads.py, in a process of its own:
a hook is there for good.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.attention.flashinfer_mla_backend import FlashInferMLAAttnBackend

from sglang_hicache.io_backends.policy_files import default_policy
from sglang_hicache.io_backends.sglang.scheduler import scheduler_hooks
from sglang_hicache.io_backends.sglang.scheduler.plan_reads import PlanReads
from sglang_hicache.io_backends.sglang.scheduler.scheduler_hooks import Active
from sglang_hicache.io_backends.sglang.scheduler.writes import Counters
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts

VALUES = torch.tensor([3, 4], dtype=torch.int32)


class PlanningError(Exception):
    """Planning has got this far."""


class Unplanned:
    """What planning first asks for anything: notes what a read gives then, and ends it."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __getattr__(self, name: str) -> Any:
        self.read += VALUES.tolist()
        raise PlanningError(name)


@pytest.mark.parametrize("planner", [FlashInferAttnBackend, FlashInferMLAAttnBackend])
def test_planning_runs_inside_while_a_write_is_on_its_way(
    planner: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = SimpleNamespace(
        serves=lambda values: values.dtype == torch.int32,
        read=lambda values: values.to(torch.int64) * 2,
    )
    known = {"gpu_arch": "sm_90", "mem_layout": "page_first", "page_size": 64, "device": "cuda"}
    facts = Facts.given(attention_backend="flashinfer", **known)
    writeback: Any = SimpleNamespace(counters=Counters(), copying=lambda: writeback.busy, busy=False)
    device: Any = SimpleNamespace(name="cuda", small_reads=lambda: reads)
    active = Active(decide(default_policy(), facts), device, writeback, None, speculative=False)
    monkeypatch.setattr(PlanReads, "possible", staticmethod(lambda: True))  # asks the driver
    monkeypatch.setattr(scheduler_hooks, "_active", active)
    scheduler_hooks._plan_past_copies(active)
    assert active.plan_reads is not None
    for busy, read in ((False, [3, 4]), (True, [6, 8]), (False, [3, 4])):
        writeback.busy = busy
        itself, batch = type("Planner", (Unplanned, planner), {})(), Unplanned()
        with pytest.raises(PlanningError):
            itself.init_forward_metadata(batch)
        assert [*itself.read, *batch.read] == read
    assert writeback.counters.plan_reads == 1
