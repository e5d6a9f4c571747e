"""policy/figures.yaml from the saved GPU runs: the figures that `hicache-io explain` quotes.

python tests/policy/make_figures.py > policy/figures.yaml
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = "bench/results/2026-11-23-h200"
TOKENS = 4096
# What this project's backends are called in the runs; `fenced_kernel` is SGLang's SM kernel, or its `direct`.
CONTENDERS = {
    "hybrid": "hybrid",
    "copy_engine": "copy_engine",
    "sglang_kernel": "fenced_kernel",
    "sglang_direct": "fenced_kernel",
}
OWN_COPY = {
    "page_first": "sglang_kernel",
    "layer_first": "sglang_kernel",
    "page_first_direct": "sglang_direct",
}


def figures() -> str:
    """The file's text."""
    root = Path(__file__).parents[2] / RESULTS
    run = json.loads((root / "gpu.json").read_text(encoding="utf-8"))
    fence = json.loads((root / "fence.json").read_text(encoding="utf-8"))
    machine = run["hardware"]
    lines = [
        "# Made by tests/policy/make_figures.py from the saved runs; a test compares.",
        f"source: {RESULTS}",
        f"gpu: {machine['gpu']}",
        "gpu_arch: sm" + machine["compute_capability"].replace(".", ""),
        f"driver: {machine['driver']}",
        f"cuda: '{machine['cuda']}'",
        f"sglang: {run['sglang']['sglang']}",
        f"date: '{machine['date'][:10]}'",
        f"tokens: {TOKENS}",
        f"link_gb_per_s: {run['link_gb_per_s']:.1f}",
        "# GB/s end to end, and ms of the scheduler's thread, of one write of that many tokens.",
        "writes:",
    ]
    for row in run["bandwidth"]:
        case, name = row["case"], row["contender"]
        if case["tokens"] != TOKENS or name not in CONTENDERS or row["gb_per_s"] is None:
            continue
        if CONTENDERS[name] == "fenced_kernel" and name != OWN_COPY[case["layout"]]:
            continue
        lines.append(_line(case, CONTENDERS[name], row))
    lines += [
        "# ms that a forward which must not share the SMs waits for such a write (page_first, pages of 8).",
        "waits:",
    ]
    waits = {"hybrid, forwards wait": "hybrid", "sglang_kernel": "fenced_kernel"}
    for row in fence["fence"]:
        if row["case"]["tokens"] == TOKENS and row["contender"] in waits:
            lines.append(f"  {waits[row['contender']]}: {row['stall_ms']:.2f}")
    return "\n".join(lines) + "\n"


def _line(case: dict[str, Any], backend: str, row: dict[str, Any]) -> str:
    values = {
        "model": case["model"],
        "kv_kind": {"Qwen3-8B": "mha", "DeepSeek-V3": "mla"}[case["model"]],
        "mem_layout": case["layout"],
        "page_size": case["page_size"],
        "slots": "fragmented" if case["fragmented"] else "contiguous",
        "backend": backend,
        "gb_per_s": f"{row['gb_per_s']:.1f}",
        "thread_ms": f"{row['submit_us'] / 1000:.2f}",
    }
    return "  - {" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


if __name__ == "__main__":
    print(figures(), end="")
