"""Markdown tables of a saved GPU run, for the README.

python -m sglang_hicache.bench.gpu_table bench/results/2026-11-23-h200/gpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONTENDERS = ("hybrid", "copy_engine", "sglang_staged", "sglang_kernel", "sglang_kernel_tma", "sglang_direct")
MODEL, TOKENS = "Qwen3-8B", 4096


def tables(run: Mapping[str, Any]) -> str:
    """What it ran on, GB/s of every cell at 4,096 tokens of Qwen3-8B, and the slow-down of forwards.

    Args:
        run: what ``gpu_suite`` wrote.
    """
    machine = run["hardware"]
    lines = [
        f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, "
        f"Triton {machine['triton']}, {machine['date'][:10]}. One large pinned copy: "
        f"{run['link_gb_per_s']:.1f} GB/s. {MODEL} ({TOKENS:,} tokens, 604 MB), GB/s end to end, the "
        "scheduler thread's work included; *us* is that work.",
        "",
        _row(["layout", "page", "slots", *(_title(name) for name in CONTENDERS)]),
        _row(["---"] * (3 + len(CONTENDERS))),
    ]
    cells: dict[tuple[str, int, bool], dict[str, Mapping[str, Any]]] = {}
    for row in run["bandwidth"]:
        case = row["case"]
        if case["model"] == MODEL and case["tokens"] == TOKENS:
            key = (case["layout"], case["page_size"], case["fragmented"])
            cells.setdefault(key, {})[row["contender"]] = row
    for (layout, page, fragmented), found in cells.items():
        shape = "fragmented" if fragmented else "contiguous"
        lines.append(
            _row([f"`{layout}`", str(page), shape, *(_cell(found.get(name)) for name in CONTENDERS)])
        )
    lines += [
        "",
        "Slow-down of a forward stand-in beside back-to-back write-back (8,192 fragmented tokens, "
        "`page_first`, page 16):",
        "",
    ]
    names = list(dict.fromkeys(each["contender"] for each in run["interference"]))
    lines += [_row(["beside", *(_title(name) for name in names)]), _row(["---"] * (1 + len(names)))]
    for forward in dict.fromkeys(each["forward"] for each in run["interference"]):
        slow = {e["contender"]: e["slow_down"] for e in run["interference"] if e["forward"] == forward}
        lines.append(_row([forward, *(f"{slow[name]:.2f}x" for name in names)]))
    return "\n".join(lines) + "\n"


def fence_table(run: Mapping[str, Any]) -> str:
    """How long one write holds back a forward that must not share the SMs with it.

    Args:
        run: what ``gpu_suite --fence-only`` wrote.
    """
    names = ("hybrid, forwards wait", "sglang_staged", "sglang_kernel")
    rows = [row for row in run["fence"] if row["contender"] in names]
    lines = [_row(["one write", *(_title(name) for name in names)]), _row(["---"] * (1 + len(names)))]
    for tokens in dict.fromkeys(row["case"]["tokens"] for row in rows):
        found = {row["contender"]: row for row in rows if row["case"]["tokens"] == tokens}
        cells = [f"{found[name]['stall_ms']:.2f} ms ({found[name]['gb_per_s']:.1f} GB/s)" for name in names]
        # Qwen3-8B: 36 layers of K and V rows of 2,048 bytes.
        lines.append(_row([f"{tokens:,} tokens, {tokens * 36 * 2 * 2048 / 1e6:,.1f} MB", *cells]))
    return "\n".join(lines) + "\n"


def _title(name: str) -> str:
    return name.replace("sglang_", "SGLang ").replace("_", " ") if "sglang" in name else f"`{name}`"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["gb_per_s"] is None:
        return ""
    return f"{row['gb_per_s']:.1f} ({row['submit_us']:,.0f} us)"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    saved = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(tables(saved) if "bandwidth" in saved else fence_table(saved), end="")
