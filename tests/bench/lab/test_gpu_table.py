"""Tables of what was saved, made by commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.bench.lab.gpu_table import reads_table, steps_table, sustained_table, waits_table
from sglang_hicache.bench.measure.cases import Case
from sglang_hicache.bench.measure.results import Results, Row, Spread

CASE = "Qwen3-8B page_first page 16 8192 tokens fragmented triton"


def part(kind: str, what: str, **metrics: float | tuple[float, float]) -> dict[str, Any]:
    """Metrics by (median, high), or one number for both."""
    pairs = {name: each if isinstance(each, tuple) else (each, each) for name, each in metrics.items()}
    return {
        "part": kind,
        "what": what,
        "metrics": {name: {"median": median, "high": high} for name, (median, high) in pairs.items()},
    }


WRITE: dict[str, Any] = {"ms": 20.0, "gb_per_s": 50.0, "thread_us": 2000.0, "median_us": 600.0}
PROFILE = {
    "parts": [
        part("drain", "something else", ms=1.0),
        part("small_copy", f"auto, {CASE}", most_us=1.0, **WRITE),
        part("small_copy", f"hybrid, {CASE}", most_us=(620.0, 780.0), **WRITE),
        part("small_copy", f"sglang_direct, {CASE}", most_us=70.0, **{**WRITE, "thread_us": 19_000.0}),
        part("turns", f"no turns, hybrid, {CASE}", most_us=20_000.0, **WRITE),
        part("turns", f"no turns, hybrid, {CASE}, decode steps", slow_down=2.1, gb_per_s=47.2),
    ]
}


def test_small_copies_are_shown_with_the_longest_wait_of_all_repeats() -> None:
    assert waits_table(PROFILE).splitlines()[2:] == [
        "| `hybrid` | 0.60 ms, at most 0.78 (50.0 GB/s) |",
        "| `hybrid`, no turns | 0.60 ms, at most 20.00 (50.0 GB/s) |",
    ]


def test_reads_are_shown_by_the_way_they_take() -> None:
    ways: dict[str, Any] = {"pageable_median_us": 1200.0, "by_kernel_median_us": 50.0}
    ways |= {"first_us": 100.0, "pageable_first_us": 900.0, "by_kernel_first_us": 300.0}
    most = {"most_us": (620.0, 780.0), "pageable_most_us": 1300.0, "by_kernel_most_us": (60.0, 90.0)}
    slow = {**WRITE, "thread_us": 19_000.0}
    parts = [
        part("small_copy", f"auto, {CASE}", **most, **WRITE, **ways),
        part("small_copy", f"hybrid, {CASE}", **most, **WRITE, **ways),
        part("small_copy", f"sglang_direct, {CASE}", **most, **slow, **ways),
        part("turns", f"no turns, hybrid, {CASE}", **most, **WRITE, **ways),
    ]
    assert reads_table({"parts": parts}).splitlines()[2:] == [
        f"| {name}, {CASE} | 0.10, 0.60, at most 0.78 ms | 0.90, 1.20, at most 1.30 ms | "
        "0.30, 0.05, at most 0.09 ms |"
        for name in ("`auto`", "`hybrid`")
    ]


def test_decode_steps_have_a_table_of_their_own() -> None:
    assert steps_table(PROFILE).splitlines()[2:] == [f"| `hybrid`, no turns, {CASE} | 2.10x | 47.2 |"]


def test_pace_is_a_line_for_each_contender_and_says_who_has_no_fence() -> None:
    metrics = {
        "kept_gb_per_s": 45.0,
        "asked_gb_per_s": 50.0,
        "slow_down": 1.1,
        "fence_ms": 2.0,
        "fence_max_ms": 7.0,
        "after_forward_p50_ms": 30.0,
        "after_forward_p99_ms": 55.0,
        "held_mb": 3624.0,
    }
    spreads = {name: Spread(value, value, value, 1) for name, value in metrics.items()}
    case = Case("Qwen3-8B", "page_first", 64, 8192, True, "fa3")
    ours, theirs, failed = (
        Row("sustained", case, who, forward="prefill 25 ms", metrics=found, safe=who == "auto", fenced=True)
        for who, found in (("auto", spreads), ("sglang_kernel", spreads), ("hybrid", {}))
    )
    machine = dict.fromkeys(("gpu", "driver", "cuda", "torch", "sglang", "date"), "x")
    run = Results(machine, [ours, theirs, failed], ceilings={"link": Spread(52.5, 48.4, 55.0, 5)})
    assert sustained_table(run).splitlines()[4:] == [
        "| Qwen3-8B, prefill 25 ms, 8,192 tokens | 64 | `auto` | 45.00 of 50.00 (90%) | 1.100x "
        "| 2.00, at most 7.00 | 30.0, p99 55.0 | 3,624 |",
        "| Qwen3-8B, prefill 25 ms, 8,192 tokens | 64 | SGLang kernel, no fence | 45.00 of 50.00 (90%) "
        "| 1.100x |  | 30.0, p99 55.0 | 3,624 |",
    ]


@pytest.mark.parametrize("module", ["gpu_table", "targets"])
@pytest.mark.parametrize("text", [None, "no JSON"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, module: str, text: str | None) -> None:
    path = tmp_path / "bench.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", f"sglang_hicache.bench.lab.{module}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{module}.py: error: ")
