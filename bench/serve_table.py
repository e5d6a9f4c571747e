"""Markdown tables of saved runs of whole servers, for the README.

    python -m sglang_hicache.bench.serve_table bench/results/DATE-GPU-servers/first.json
    python -m sglang_hicache.bench.serve_table --verified bench/results/DATE-GPU-servers/first.json ...

With ``--verified``, which combinations have served without an error, and for how many answers it was compared
that they are the same as without HiCache.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sglang_hicache.bench.measure.tables import markdown_row
from sglang_hicache.bench.serve.account import Sum
from sglang_hicache.bench.serve.arms import NONE
from sglang_hicache.bench.serve.result import CellResult, Result, load
from sglang_hicache.io_backends.registry import AUTO
from sglang_hicache.io_backends.sglang.unsafe import NULL

ARMS = {
    "kernel": "SGLang `kernel` (its default)",
    "direct": "SGLang `direct`",
    NONE: "no HiCache",
    AUTO: "`auto`",
    NULL: "writes nothing (the limit)",
}
"""Titles of the rows, in their order."""
_COLUMNS = ("req/s", "TTFT p50", "p99 ms", "ITL p99 ms")


def speed_table(found: Result, workload: str = "chat") -> str:
    """What it ran on, and each arm at each page size: median of the rounds, with least and greatest req/s."""
    machine = found.environment
    cells = [cell for cell in found.cells if any(each.workload == workload for each in cell.sums())]
    pages = [f"page {cell.cell['page_size']}" for cell in cells]
    rounds = sorted({each.rounds for cell in cells for each in cell.sums() if each.workload == workload})
    shape = cells[0].workloads[workload]
    lines = [
        f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, "
        f"SGLang {machine['sglang']}, {machine['date'][:10]}. Model {cells[0].cell['model']['name']}, "
        f"one GPU, `{cells[0].cell['mem_layout']}`, {' '.join(cells[0].cell['more'][:2])}; {shape['says']}; "
        f"{' or '.join(map(str, rounds))} rounds.",
        "",
        markdown_row(["write-back", *(f"{page}: {what}" for page in pages for what in _COLUMNS)]),
        markdown_row(["---"] * (1 + len(_COLUMNS) * len(pages))),
    ]
    for arm, title in ARMS.items():
        row = [title]
        for cell in cells:
            each = next((s for s in cell.sums() if (s.arm, s.workload) == (arm, workload)), None)
            row += [""] * len(_COLUMNS) if each is None else _figures(each)
        lines.append(markdown_row(row))
    return "\n".join(lines) + "\n"


def _figures(each: Sum) -> list[str]:
    rate = each.requests_per_s
    texts = ["" if rate is None else f"{rate.median:.1f} ({rate.low:.1f} to {rate.high:.1f})"]
    for spread in (each.ttft_p50_s, each.ttft_p99_s, each.itl_p99_s):
        texts.append("" if spread is None else f"{spread.median * 1e3:,.0f}")
    return texts


def verified_table(runs: Iterable[Result]) -> str:
    """A row for each cell in which ``auto`` served all that it was asked."""
    columns = (
        "GPU",
        "SGLang",
        "attention",
        "model",
        "layout",
        "page",
        "TP",
        "`auto` took",
        "answers as without",
    )
    lines = [
        markdown_row([*columns, "from the host", "date", "command"]),
        markdown_row(["---"] * (len(columns) + 3)),
    ]
    for run in runs:
        for cell in run.cells:
            row = _verified(cell)
            if row is not None:
                machine = run.environment
                about = [str(machine["gpu"]), str(machine["sglang"]), *row]
                lines.append(markdown_row([*about, machine["date"][:10], f"`{_command(machine, cell)}`"]))
    return "\n".join(lines) + "\n"


def _verified(cell: CellResult) -> list[str] | None:
    sums = [each for each in cell.sums() if each.arm == AUTO]
    server: dict[str, Any] | None = cell.arms[AUTO].server if AUTO in cell.arms else None
    bad = any(each.errors or each.same != each.compared for each in sums)
    if server is None or bad or not sum(each.requests for each in sums):
        return None
    compared = [each for each in sums if each.compared is not None]
    same = sum(each.same or 0 for each in compared)
    return [
        str(server["attention_backend"]),
        str(cell.cell["model"]["name"]),
        f"`{cell.cell['mem_layout']}`",
        str(cell.cell["page_size"]),
        str(cell.cell["tp"]),
        f"`{server['plugin']['backend']}`",
        f"{same} of {sum(each.compared or 0 for each in compared)}" if compared else "not compared",
        f"{sum(each.host_tokens for each in sums):,} tokens",
    ]


def _command(machine: dict[str, Any], cell: CellResult) -> str:
    words = shlex.split(str(machine["command"]))
    plan = words[: words.index("-m") + 3]
    return shlex.join([*plan, "--cell", cell.name])


def main() -> None:
    """Print the tables of saved runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verified", action="store_true", help="which combinations have served")
    parser.add_argument("run", nargs="+", type=Path)
    args = parser.parse_args()
    runs = [load(path) for path in args.run]
    print(verified_table(runs) if args.verified else "\n".join(map(speed_table, runs)), end="")


if __name__ == "__main__":
    main()
