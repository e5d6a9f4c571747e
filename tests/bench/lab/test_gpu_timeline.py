"""What a GPU does in a step, from a trace."""

from __future__ import annotations

from typing import Any

from sglang_hicache.bench.lab.gpu_timeline import (
    FIRST_KERNEL,
    KindTime,
    StepTime,
    kind_times,
    step_times,
    text,
)


def event(name: str, stream: int, begin_ms: float, took_ms: float, **args: Any) -> dict[str, Any]:
    kind = "gpu_memcpy" if name.startswith("Memcpy") else "kernel"
    about = {"ph": "X", "cat": kind, "name": name, "ts": begin_ms * 1e3, "dur": took_ms * 1e3}
    return {**about, "args": {"stream": stream, **args}}


TO_HOST = "Memcpy DtoH (Device -> Pinned)"


def test_a_step_goes_from_its_first_kernel_to_the_next_ones() -> None:
    events = [
        {"ph": "X", "cat": "cuda_runtime", "name": FIRST_KERNEL, "ts": 0, "dur": 5},  # of the host
        event(FIRST_KERNEL, 7, 10, 1),
        event("gemm", 7, 11, 5),
        event("attention", 7, 15, 3),  # begins before the other ends
        event("gather_rows", 9, 19, 2),
        event("gather_rows", 9, 22, 1),
        event(TO_HOST, 10, 21, 6, bytes=2**25),
        event(TO_HOST, 8, 12, 3, bytes=64),  # token ids
        event(FIRST_KERNEL, 7, 25, 1),
        event("gemm", 7, 26, 4),
        event("gather_rows", 9, 28, 4),  # beside the forward, and into the next step
        event(FIRST_KERNEL, 7, 31, 1),
    ]
    for order in (events, events[::-1]):
        first, second = step_times(order)
        assert first == StepTime(length=15, forward=8, gather=3, gathers=2, copies=4, nothing=4)
        assert second == StepTime(length=6, forward=5, gather=3, gathers=1, copies=2, nothing=0)
    assert "2 steps, medians in ms: 10.50 each; forward's stream busy 6.50" in text([first, second])


def test_a_trace_without_prefills_has_no_steps() -> None:
    assert step_times([event("gemm", 7, 1, 1)]) == []
    assert text([]) == "no steps"


def test_work_beside_a_copy_to_the_host_is_told_apart() -> None:
    events = [
        event("before", 7, 5, 1),
        event(FIRST_KERNEL, 7, 10, 1),
        event("gemm", 7, 12, 4),
        event("Memcpy DtoD (Device -> Device)", 7, 16, 1),
        event(TO_HOST, 9, 17, 20, bytes=2**25),
        event("Memcpy DtoD (Device -> Device)", 7, 20, 3),
        event("gemm", 7, 23, 5),
        event("gemm", 9, 24, 5),  # of another stream
        event(TO_HOST, 7, 28, 0.01, bytes=8),  # a small one hides nothing
        event("gemm", 7, 36.5, 6),  # outlasts the copy that it began beside
        event("memset", 7, 40, 1),  # beside that kernel, in a graph
    ]
    for order in (events, events[::-1]):
        assert [
            KindTime(
                each.kind,
                each.beside,
                each.count,
                *(round(x, 6) for x in (each.took_us, each.most_us, each.idle_us)),
            )
            for each in kind_times(order)
        ] == [
            KindTime("Memcpy DtoD (Device -> Device)", False, 1, 1000, 1000, 0),
            KindTime("Memcpy DtoD (Device -> Device)", True, 1, 3000, 3000, 3000),
            KindTime(TO_HOST, True, 1, 10, 10, 0),
            KindTime("kernel", False, 3, 1000, 4000, 333.333333),
            KindTime("kernel", True, 2, 5500, 6000, 4245),
        ]
    shown = text(step_times([*events, event(FIRST_KERNEL, 7, 50, 1)]), kind_times(events))
    assert "\n  kernel, beside a copy to the host: 2 of 5500.0 us (at most 6,000.0), after 4245.0 us" in shown


def test_a_trace_without_prefills_has_no_kinds() -> None:
    assert kind_times([event("gemm", 7, 1, 1)]) == []
