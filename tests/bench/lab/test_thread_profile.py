"""Where the scheduler's thread spends a write: a trace read, and one of a real server made and read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from launching import Machine

from sglang_hicache.bench import serving
from sglang_hicache.bench.lab import profiled_server, thread_profile
from sglang_hicache.bench.serve.workloads import maker

HOOK = "/site/io_backends/sglang/scheduler/scheduler_hooks.py(265): _around_submit"


def event(name: str, ts: float, dur: float, cat: str = "python_function", tid: int = 1) -> Mapping[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": tid, "ts": ts, "dur": dur}


def test_a_calls_own_time_is_that_of_none_that_it_calls() -> None:
    events = [
        event("/x/hybrid.py(10): submit", 10, 60),
        event(HOOK, 0, 100),
        event("cudaLaunchKernel", 20, 5, "cuda_runtime"),
        event("cudaLaunchKernel", 30, 15, "cuda_runtime"),
        # Not of a hook: before it, behind it, on another thread, and no call at all.
        event("/x/hybrid.py(10): submit", -50, 40),
        event("cudaLaunchKernel", 100, 9, "cuda_runtime"),
        event("cudaLaunchKernel", 20, 9, "cuda_runtime", tid=2),
        event("gemm", 20, 9, "kernel"),
        {"ph": "i", "name": "mark", "ts": 5},
        event(HOOK, 200, 20),
        event("/x/writeback.py(3): submit", 200, 20),
    ]
    (found,) = thread_profile.hook_times(events)
    assert (found.hook, found.calls, found.median_us, found.most_us) == ("_around_submit", 2, 60, 100)
    parts = {part.name: (part.calls, part.self_us) for part in found.parts}
    assert parts == {
        "scheduler_hooks.py: _around_submit": (1, 20),
        "hybrid.py: submit": (0.5, 20),
        "cudaLaunchKernel": (1, 10),
        "writeback.py: submit": (0.5, 10),
    }
    assert sum(part.self_us for part in found.parts) == 60
    assert "60 us, most 100 us" in thread_profile.text([found])


def test_objects_of_one_kind_are_one_part() -> None:
    calls = [event(f"<built-in method numel of Tensor object at 0x7f{n}a>", n, 1) for n in (1, 2)]
    (found,) = thread_profile.hook_times([event(HOOK, 0, 10), *calls])
    assert ("<built-in method numel of Tensor object>", 2) in {
        (part.name, part.calls) for part in found.parts
    }


def test_a_hook_inside_a_hook_is_part_of_it() -> None:
    inner = HOOK.replace("_around_submit", "_around_move")
    (found,) = thread_profile.hook_times([event(HOOK, 0, 10), event(inner, 2, 3)])
    assert found.hook == "_around_submit"
    assert {part.name for part in found.parts} == {
        "scheduler_hooks.py: _around_submit",
        "scheduler_hooks.py: _around_move",
    }


def test_a_trace_without_our_hooks_has_nothing() -> None:
    assert thread_profile.hook_times([event("/x/other.py(1): _around_submit", 0, 10)]) == []
    assert thread_profile.text([]) == ""


@pytest.mark.server
def test_a_real_servers_writes(machine: Machine, tmp_path: Path) -> None:
    """As on a GPU, but for what runs there."""
    args = machine.hicache_args("hybrid")
    with serving.ServerProcess(
        args, log=tmp_path / "log", env=machine.env(), launch=machine.launcher
    ) as server:
        load = maker("prefill")(512, 512, 0)
        trace = profiled_server.profiled(server, load, tmp_path, "mine", steps=4, activities=("CPU",))
    found = {each.hook: each for each in thread_profile.hook_times(profiled_server.read(trace))}
    assert found["_before_run_batch"].calls >= 3
    submit = found["_around_submit"]
    assert submit.calls > 0
    assert "hybrid.py: submit" in {part.name for part in submit.parts}
    assert sum(part.self_us for part in submit.parts) <= submit.calls * submit.most_us
