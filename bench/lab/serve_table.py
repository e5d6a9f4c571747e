"""Markdown tables of saved runs of whole servers, for README.md and docs/.

    python -m sglang_hicache.bench.lab.serve_table bench/results/DATE-GPU-servers/first.json ...
    python -m sglang_hicache.bench.lab.serve_table --workload prefill FILE...
    python -m sglang_hicache.bench.lab.serve_table --summary FILE...
    python -m sglang_hicache.bench.lab.serve_table --arms FILE...
    python -m sglang_hicache.bench.lab.serve_table --verified FILE...

Of several runs with a cell of the same name the last one counts. With ``--verified``, which combinations have
served without an error, and for how many answers it was compared that they are the same as without HiCache;
where SGLang's own write-back answers otherwise than that too, how many are the same as its.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...io_backends.registry import AUTO
from ...io_backends.sglang.unsafe import NULL
from ..measure.tables import markdown_row
from ..serve.account import ArmSummary
from ..serve.arms import DEFAULT, NONE
from ..serve.result import CellResult, ServeResult, load
from .experiments import attention_of

OWN = ("kernel", "direct")
"""SGLang's own ways, the one that `auto` is set against first: its default, and what it runs instead in
page_first_direct."""
ARMS = {
    "kernel": "SGLang `kernel` (its default)",
    "direct": "SGLang `direct`",
    NONE: "no HiCache",
    AUTO: "`auto`",
    NULL: "writes nothing (the limit)",
}
"""Titles of the rows, in their order."""
_COLUMNS = ("req/s", "TTFT p50", "p99 ms", "ITL p99 ms", "write ms")
_MACHINE = ("gpu", "driver", "cuda", "torch", "sglang", "sglang_kernel")
"""What must be the same for figures to stand in one table."""


def together(runs: Iterable[ServeResult]) -> ServeResult:
    """One result of several: their cells, of those with the same name the last.

    Raises:
        ValueError: they ran on different machines or versions, or there is none.
    """
    whole: ServeResult | None = None
    for run in runs:
        whole = whole or ServeResult(run.environment)
        apart = [name for name in _MACHINE if whole.environment.get(name) != run.environment.get(name)]
        if apart:
            raise ValueError(f"runs that differ in {', '.join(apart)} have no common table")
        for cell in run.cells:
            whole.put(cell)
    if whole is None:
        raise ValueError("no runs")
    return whole


def speed_table(found: ServeResult, workload: str = "chat") -> str:
    """What it ran on, and each arm at each page size: median of the rounds, with least and greatest req/s.

    Raises:
        ValueError: nothing ran under that workload.
    """
    machine = found.environment
    cells = [cell for cell in found.cells if any(each.workload == workload for each in cell.sums())]
    if not cells:
        raise ValueError(f"no cell has a workload {workload}")
    pages = [f"page {cell.cell['page_size']}" for cell in cells]
    turns = "; ".join(f"{page}: {_rounds(cell, workload)}" for page, cell in zip(pages, cells, strict=True))
    shape = cells[0].workloads[workload]
    lines = [
        f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, "
        f"SGLang {machine['sglang']}, {machine['date'][:10]}. Model {cells[0].cell['model']['name']}, "
        f"one GPU, `{cells[0].cell['mem_layout']}`, {' '.join(cells[0].cell['more'][:2])}; {shape['says']}. "
        f"{turns}.",
        "",
    ]
    rows = {title: _row(arm, cells, workload) for arm, title in ARMS.items()}
    titles = [f"{page}: {what}" for page in pages for what in _COLUMNS]
    kept = [place for place in range(len(titles)) if any(row[place] for row in rows.values())]
    lines += [
        markdown_row(["write-back", *(titles[place] for place in kept)]),
        markdown_row(["---"] * (1 + len(kept))),
    ]
    lines += [markdown_row([title, *(row[place] for place in kept)]) for title, row in rows.items()]
    return "\n".join(lines) + "\n"


def summary_table(found: ServeResult) -> str:
    """What it ran on, and a row for each setup and load: requests a second and TTFT p50, by those of SGLang.

    Raises:
        ValueError: a cell has no figure of SGLang's own write-back under a load.
    """
    machine = found.environment
    loads = {name: shape["says"] for cell in found.cells for name, shape in cell.workloads.items()}
    columns = ("SGLang's own", "`auto`", "`auto` by SGLang's", "writes nothing", "no HiCache")
    lines = [
        f"{machine['gpu']}, SGLang {machine['sglang']}, {machine['date'][:10]}; model "
        f"{', '.join(dict.fromkeys(str(cell.cell['model']['name']) for cell in found.cells))}, one GPU. "
        + "Requests a second, TTFT p50. "
        + " ".join(f"*{name}*: {says}." for name, says in loads.items()),
        "",
        markdown_row(["attention", "layout", "page", "load", *columns]),
        markdown_row(["---"] * (4 + len(columns))),
    ]
    for cell in found.cells:
        for workload in cell.workloads:
            sums = {each.arm: each for each in cell.sums() if each.workload == workload}
            own = next((sums[arm] for arm in OWN if arm in sums), None)
            if own is None or own.requests_per_s is None:
                raise ValueError(f"{cell.name} has no {workload} of SGLang's own write-back")
            ours = sums[AUTO].requests_per_s if AUTO in sums else None
            lines.append(
                markdown_row(
                    [
                        _attention(cell.arms[AUTO].server or {}),
                        f"`{cell.cell['mem_layout']}`",
                        str(cell.cell["page_size"]),
                        workload,
                        f"`{own.arm}`: {_short(own)}",
                        _short(sums.get(AUTO)),
                        "" if ours is None else f"{ours.median / own.requests_per_s.median:.2f}x",
                        _short(sums.get(NULL)),
                        _short(sums.get(NONE)),
                    ]
                )
            )
    return "\n".join(lines) + "\n"


def arms_table(found: ServeResult) -> str:
    """What it ran on, and a row for each arm under each load: its figures, and the scheduler's thread.

    Raises:
        ValueError: nothing ran.
    """
    attention = {cell.name: _served_attention(cell) for cell in found.cells}
    # One for all: said once, as the option that was given.
    apart = len(set(attention.values())) > 1
    rows = [
        [
            *([attention[cell.name]] if apart else []),
            str(cell.cell["model"]["name"]),
            f"`{cell.cell['mem_layout']}`",
            str(cell.cell["page_size"]),
            each.workload,
            _by(each.arm, cell),
            *_figures(each),
            *_thread(cell, each.arm),
        ]
        for cell in found.cells
        for each in cell.sums()
    ]
    if not rows:
        raise ValueError("no cell has a turn")
    machine = found.environment
    columns = ["model", "layout", "page", "load", "write-back", *_COLUMNS, "entries", "thread ms"]
    if apart:
        columns.insert(0, "attention")
    options = "" if apart else f"; {' '.join(found.cells[0].cell['more'][:2])}"
    lines = [
        f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, "
        f"SGLang {machine['sglang']}, {machine['date'][:10]}{options}.",
        "",
        markdown_row(columns),
        markdown_row(["---"] * len(columns)),
        *map(markdown_row, rows),
    ]
    return "\n".join(lines) + "\n"


def _served_attention(cell: CellResult) -> str:
    """As the servers of a cell said, or where none was asked while it was up, as they were told."""
    facts = cell.arms.values()
    said = (_attention(each.server) for each in facts if each.server)
    return next(said, "") or next((attention_of(each.args) for each in facts), "")


def _by(arm: str, cell: CellResult) -> str:
    """An arm's title; of ``auto`` with what it took that day."""
    title = ARMS.get(arm, f"`{arm}`")
    plugin = (cell.arms[arm].server or {}).get("plugin") or {}
    return f"{title} (`{plugin['backend']}`)" if arm == AUTO and plugin else title


def _thread(cell: CellResult, arm: str) -> list[str]:
    """Copies of a write and ms of the scheduler's thread for one, of all loads together."""
    counters = ((cell.arms[arm].server or {}).get("plugin") or {}).get("counters", {})
    writes = counters.get("writes")
    if not writes or "submit_seconds" not in counters:
        return ["", ""]
    seconds = counters["submit_seconds"] + counters["gap_seconds"]
    return [f"{counters['copies'] / writes:,.0f}", f"{seconds / writes * 1e3:.2f}"]


def _attention(server: Mapping[str, Any]) -> str:
    """The attention backend, or those of prefill and decode where they are not one."""
    both = [
        server.get(f"{forward}_attention_backend") or server.get("attention_backend")
        for forward in ("prefill", "decode")
    ]
    return ", ".join(dict.fromkeys(map(str, both)))


def _short(each: ArmSummary | None) -> str:
    if each is None or each.requests_per_s is None or each.ttft_p50_s is None:
        return ""
    return f"{each.requests_per_s.median:.1f}, {each.ttft_p50_s.median * 1e3:,.0f} ms"


def _rounds(cell: CellResult, workload: str) -> str:
    rounds = sorted({each.rounds for each in cell.sums() if each.workload == workload})
    asked = cell.workloads[workload]["requests"]
    return f"{' or '.join(map(str, rounds))} rounds of {asked:,} requests"


def _row(arm: str, cells: Iterable[CellResult], workload: str) -> list[str]:
    texts: list[str] = []
    for cell in cells:
        each = next((s for s in cell.sums() if (s.arm, s.workload) == (arm, workload)), None)
        texts += [""] * len(_COLUMNS) if each is None else _figures(each)
    return texts


def _figures(each: ArmSummary) -> list[str]:
    rate = each.requests_per_s
    texts = ["" if rate is None else f"{rate.median:.1f} ({rate.low:.1f} to {rate.high:.1f})"]
    for spread in (each.ttft_p50_s, each.ttft_p99_s, each.itl_p99_s):
        texts.append("" if spread is None else f"{spread.median * 1e3:,.0f}")
    return [*texts, "" if each.write_mean_s is None else f"{each.write_mean_s * 1e3:,.1f}"]


def verified_table(runs: Iterable[ServeResult]) -> str:
    """A row for each cell in which ``auto`` served all that it was asked, the last of those with its name."""
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
    ran = {cell.name: (run.environment, cell) for run in runs for cell in run.cells if cell.turns}
    for machine, cell in ran.values():
        row = _verified(cell)
        if row is not None:
            about = [str(machine["gpu"]), str(machine["sglang"]), *row]
            lines.append(markdown_row([*about, machine["date"][:10], f"`{_command(machine, cell)}`"]))
    return "\n".join(lines) + "\n"


def _verified(cell: CellResult) -> list[str] | None:
    sums = [each for each in cell.sums() if each.arm == AUTO]
    server: dict[str, Any] | None = cell.arms[AUTO].server if AUTO in cell.arms else None
    bad = any(problem.startswith((f"{AUTO}:", f"{AUTO},")) for problem in cell.problems())
    if server is None or bad or not sum(each.requests for each in sums):
        return None
    return [
        _attention(server),
        str(cell.cell["model"]["name"]),
        f"`{cell.cell['mem_layout']}`",
        str(cell.cell["page_size"]),
        str(cell.cell["tp"]),
        f"`{server['plugin']['backend']}`",
        _same([each for each in sums if each.compared is not None]),
        f"{sum(each.host_tokens for each in sums):,} tokens",
    ]


def _same(compared: Sequence[ArmSummary]) -> str:
    if not compared:
        return "not compared"
    same, of = (sum(getattr(each, name) or 0 for each in compared) for name in ("same", "compared"))
    if same == of:
        return f"{same} of {of}"
    default = sum(each.as_default or 0 for each in compared)
    alike = sum(each.default_compared or each.compared or 0 for each in compared)
    return f"{same} of {of}; {default} of {alike} as `{DEFAULT}`"


def _command(machine: dict[str, Any], cell: CellResult) -> str:
    """What serves this cell again, by the name that the script has today."""
    words = shlex.split(str(machine["command"]))
    module = words.index("-m") + 1
    if words[module].endswith(".gpu_plan"):
        words[module] = f"{__package__}.gpu_plan"
    return shlex.join([*words[: module + 2], "--cell", cell.name])


def main() -> None:
    """Print the tables of saved runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verified", action="store_true", help="which combinations have served")
    parser.add_argument("--summary", action="store_true", help="a row for each setup and load")
    parser.add_argument("--arms", action="store_true", help="a row for each arm under each load")
    parser.add_argument("--workload", default="chat", help="whose figures (chat)")
    parser.add_argument("run", nargs="+", type=Path)
    args = parser.parse_args()
    try:
        runs = [load(path) for path in args.run]
        if args.verified:
            print(verified_table(runs), end="")
        else:
            whole = together(runs)
            make = arms_table if args.arms else summary_table if args.summary else None
            print(make(whole) if make else speed_table(whole, args.workload), end="")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
