"""The table of :mod:`~sglang_hicache.bench.submit_cost`, and what its columns mean."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_hicache.bench.d2h import QWEN3_8B, Case

DRIVER_US_PER_ENTRY = 0.6
"""CPU time of one entry in cuMemcpyBatchAsync: vLLM's and LMCache's published figure (H200, CUDA 13.0)."""

LOOP_REPEATS = 3


@dataclass
class Row:
    """One backend in one case; times in us, medians over ``repeats``.

    Attributes:
        submit_us: Python's and numpy's time until ``submit`` returns.
        first_us: the same for a number of tokens that was not seen before (nothing is cached for it).
        rest_us: the same for what ``submit`` left for later gaps between forwards.
        gathers: SM kernels that were launched.
        model_us: all of it, and what the driver is said to add for the entries. **A model.**
        python_share: the part of ``model_us`` that was measured here.
        loop_us: a plain loop of one driver call per row, same rows, same run, same driver.
    """

    case: Case
    contender: str
    submit_us: float
    least_us: float
    p90_us: float
    first_us: float
    rest_us: float
    entries: int
    gathers: int
    model_us: float
    python_share: float
    loop_us: float
    repeats: int


def show(found: Sequence[Row], where: dict[str, Any]) -> None:
    """A table, and what it means."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(" | ".join(f"{key}: {value}" for key, value in where.items()), highlight=False)
    table = Table(
        title=f"One write of {QWEN3_8B.name}: scheduler-thread us, planning and enqueueing (no GPU)"
    )
    for name in ("layout", "page", "tokens", "slots", "backend"):
        table.add_column(name, no_wrap=True)
    times = (
        "submit us",
        "least",
        "p90",
        "first",
        "later",
        "entries",
        "gathers",
        "model us",
        "Python",
        "loop us",
    )
    for name in times:
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        case = row.case
        table.add_row(
            case.layout,
            str(case.page_size),
            str(case.tokens),
            "frag" if case.fragmented else "contig",
            row.contender,
            *(
                f"{value:.0f}"
                for value in (row.submit_us, row.least_us, row.p90_us, row.first_us, row.rest_us)
            ),
            str(row.entries),
            str(row.gathers),
            f"{row.model_us:.0f}",
            f"{row.python_share:.0%}",
            f"{row.loop_us:.0f}",
        )
    console.print(table)
    console.print(
        "submit us: median until submit() returns; first: the same for a number of tokens not seen before;\n"
        "later: what submit() left for gaps between forwards (fenced: forwards wait for gathers).\n"
        f"model us = submit + later + {DRIVER_US_PER_ENTRY} us an entry: A MODEL of a driver that works "
        f"(published by others, not measured here). Python: the share of it measured here.\n"
        f"loop us: one driver call per row through cuda-python, median of {LOOP_REPEATS} runs; a driver that "
        "works adds 5 to 7 us a call.\n"
        "Not in the figures, and not measured here: the driver's part of launches, events and waits; "
        "the wait for copy_engine's indices; SGLang's own kernel (fenced_kernel).\n"
        f"{limits(found)}",
        highlight=False,
    )


def limits(found: Sequence[Row]) -> str:
    """Fixed cost and slope of each backend, from the rows themselves."""
    lines = []
    for contender in dict.fromkeys(row.contender for row in found if row.contender != "fenced_kernel"):
        rows = [row for row in found if row.contender == contender]
        most, least = max(rows, key=lambda row: row.entries), min(rows, key=lambda row: row.submit_us)
        each = (most.submit_us + most.rest_us) / most.entries * 1e3
        lines.append(
            f"What limits {contender}: {least.submit_us:.0f} us a write at least (Python calls); "
            f"{each:.0f} ns an entry at {most.entries} entries (numpy, memory)"
        )
    return "\n".join(lines)
