"""policy/figures.yaml from the saved GPU runs: the figures that `hicache-io explain` quotes.

python tests/policy/make_figures.py > policy/figures.yaml
"""

from __future__ import annotations

import json
from typing import Any

from repository import ROOT

RESULTS = "bench/results/2026-11-26-h100"
TOKENS = 4096
BACKENDS = ("hybrid", "copy_engine", "fenced_kernel")


def figures() -> str:
    """The file's text."""
    root = ROOT / RESULTS
    run = json.loads((root / "bench.json").read_text(encoding="utf-8"))
    machine = run["environment"]
    lines = [
        "# Made by tests/policy/make_figures.py from the saved run; a test compares.",
        f"source: {RESULTS}",
        f"gpu: {machine['gpu']}",
        f"gpu_arch: {machine['gpu_arch']}",
        f"driver: {machine['driver']}",
        f"cuda: '{machine['cuda']}'",
        f"sglang: {machine['sglang']}",
        f"date: '{machine['date'][:10]}'",
        f"tokens: {TOKENS}",
        f"link_gb_per_s: {run['ceilings_gb_per_s']['link']['median']:.1f}",
        "# GB/s end to end, and ms of the scheduler's thread, of one write of that many tokens.",
        "writes:",
    ]
    rows = [
        row
        for row in run["rows"]
        if row["case"]["tokens"] == TOKENS and row["contender"] in BACKENDS and row["metrics"]
    ]
    lines += [_line(row["case"], row) for row in rows if row["measurement"] == "bandwidth"]
    lines += [
        "# ms that a forward which must not share the SMs waits for such a write (page_first, pages of 8).",
        "waits:",
    ]
    lines += [
        f"  {row['contender']}: {row['metrics']['stall_ms']['median']:.2f}"
        for row in rows
        if row["measurement"] == "fence" and row["contender"] != "copy_engine"
    ]
    return "\n".join(lines) + "\n"


def _line(case: dict[str, Any], row: dict[str, Any]) -> str:
    values = {
        "model": case["model"],
        "kv_kind": {"Qwen3-8B": "mha", "DeepSeek-V3": "mla"}[case["model"]],
        "mem_layout": case["layout"],
        "page_size": case["page_size"],
        "slots": "fragmented" if case["fragmented"] else "contiguous",
        "backend": row["contender"],
        "gb_per_s": f"{row['metrics']['gb_per_s']['median']:.1f}",
        "thread_ms": f"{row['metrics']['submit_us']['median'] / 1000:.2f}",
    }
    return "  - {" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


if __name__ == "__main__":
    print(figures(), end="")
