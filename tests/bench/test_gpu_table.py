"""Tables of what was saved, made by commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.bench.gpu_table import steps_table, waits_table

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


def test_decode_steps_have_a_table_of_their_own() -> None:
    assert steps_table(PROFILE).splitlines()[2:] == [f"| `hybrid`, no turns, {CASE} | 2.10x | 47.2 |"]


@pytest.mark.parametrize("module", ["gpu_table", "targets"])
@pytest.mark.parametrize("text", [None, "no JSON"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, module: str, text: str | None) -> None:
    path = tmp_path / "bench.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", f"sglang_hicache.bench.{module}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{module}.py: error: ")
