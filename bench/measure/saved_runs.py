"""Commands on saved runs: ``hicache-io bench list``, ``show``, ``compare`` and ``report``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...policy.terminal import console as console_of
from ...policy.text import answer, columns_of, say, wrapped
from .. import layout
from ..json_option import Json
from ..outputs import check_folder, refuse
from ..saved import one_line
from ..serve import report as serve_report
from ..serve import result as serve_result
from ..serve import tables as serve_tables
from . import compare as comparing
from . import gate, plots, report, results, tables
from .results import Results

All = Annotated[bool, typer.Option("--all", help="Show every case and contender, too.")]
Saved = Annotated[Path, typer.Argument(help="A saved run, such as bench.json.")]


class Sort(StrEnum):
    """What lines of a comparison are sorted by."""

    CHANGE = "change"
    MEASUREMENT = "measurement"
    CONTENDER = "contender"


def list_runs(
    folder: Annotated[Path, typer.Argument(help="Where to look, below it too.")] = Path("."),
    as_json: Json = False,
) -> None:
    """Every saved run in a folder: file, date, GPU, what was measured, of servers in which cells."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.rglob("*.json")):
        run = _found(path)
        if run is not None:
            measured = _measured(run)
            about = {name: run.environment.get(name) for name in ("gpu", "sglang", "git")}
            date = str(run.environment.get("date"))[:16]
            cells = [] if isinstance(run, Results) else [_cell(each) for each in run.cells]
            found.append({"file": str(path), "date": date, "measured": measured, "cells": cells, **about})
    if as_json:
        answer(json.dumps({"runs": found}, indent=1))
        return
    if not found:
        refuse(f"no saved run in {folder}")
    for each in found:
        answer(each["file"])
        lines = wrapped(_about(each), columns_of(sys.stdout) or _COLUMNS, "    ")
        answer("\n".join(lines).replace(_TOGETHER, " "))


_COLUMNS = 80
_CELLS = 6
_TOGETHER = "\u00a0"
"""A blank at which no line ends."""


def _about(run: Mapping[str, Any]) -> str:
    """What is in a file, of many cells the first ones."""
    what = ", ".join(f"{name}{_TOGETHER}{count}" for name, count in run["measured"].items())
    cells = run["cells"]
    if cells:
        more = [f"{len(cells) - _CELLS} more"] if len(cells) > _CELLS else []
        what = f"{what}: {', '.join([*cells[:_CELLS], *more])}"
    return f"{one_line(run['date'])}, {one_line(run['gpu'] or 'no GPU')}; {what}"


def _cell(cell: serve_result.CellResult) -> str:
    """Its name, and the model that is served if that does not say it."""
    model = str((cell.cell.get("model") or {}).get("name") or "")
    return one_line(cell.name if model.lower() in cell.name.lower() else f"{cell.name} of {model}")


def show(
    saved: Saved,
    every: All = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Measurement; of servers, workload. May be repeated.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """The tables of a saved run: `auto` beside SGLang's default, and all with --all."""
    if serve_result.is_one(saved):
        _show_served(serve_result.load(saved), every, only, as_json)
        return
    run = load(saved)
    if only:
        _check_only(only, {row.measurement for row in run.rows})
        run.rows = [row for row in run.rows if row.measurement in only]
    if as_json:
        answer(json.dumps(run.to_dict(), indent=1))
        return
    print_run(run, every)


def _show_served(
    found: serve_result.ServeResult, every: bool, only: Sequence[str] | None, as_json: bool
) -> None:
    if only:
        _check_only(only, {each.workload for cell in found.cells for each in cell.turns})
        for cell in found.cells:
            cell.turns = [each for each in cell.turns if each.workload in only]
    if as_json:
        answer(json.dumps(found.to_dict(), indent=1))
        return
    shown = serve_tables.tables(found)
    short = [each for each in shown if each.title.endswith(serve_tables.FIRST)]
    for each in shown if every or not short else short:
        answer(serve_tables.as_text(each, found.watermark))
    if short and not every:
        answer("What came from the caches, how long a write took, and the servers: --all")


def compare(
    first: Saved,
    second: Saved,
    fail_over: Annotated[
        str, typer.Option(metavar="PERCENT", help="As much slower counts: 5%, 5 or 0.05.")
    ] = f"{gate.FAIL_OVER:.0%}",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Contender or measurement. May be repeated.", show_default=False),
    ] = None,
    sort: Annotated[Sort, typer.Option(help="Order of the lines.")] = Sort.CHANGE,
    every: Annotated[bool, typer.Option("--all", help="Show each figure that changed, too.")] = False,
    as_json: Json = False,
) -> None:
    """Whether SECOND is slower than FIRST, by contender and measurement; status 1 if anything is.

    In proportion to what did not change: SGLang's own copies and the plain loop of copies, measured in the
    same two runs, or the link. So the same code on another host is not slower.
    """
    runs = [load(first), load(second)]
    problem = comparing.not_comparable(runs[0], runs[1])
    if problem is not None:
        refuse(problem)
    lines = gate.gate(runs[0], runs[1], _share(fail_over))
    if only:
        _check_only(only, {name for line in lines for name in (line.contender, line.measurement)})
        lines = [line for line in lines if line.contender in only or line.measurement in only]
    lines = gate.sort(lines, sort)
    worse = [line for line in lines if line.verdict in gate.WORSE]
    changes = list(comparing.compare(runs[0], runs[1])) if every else []
    changes = [
        each
        for each in changes
        if each.verdict != "same" and (not only or {each.row.contender, each.row.measurement} & set(only))
    ]
    if as_json:
        told = {"first": runs[0].environment, "second": runs[1].environment}
        shown = {"lines": [line.to_dict() for line in lines]}
        shown |= {"changes": [each.to_dict() for each in changes]} if every else {}
        answer(json.dumps({"ok": not worse, "watermark": runs[1].watermark, **told, **shown}, indent=1))
    else:
        _show_lines(lines, runs)
        if changes:
            _show_changes(changes)
    raise typer.Exit(1 if worse else 0)


def make_report(
    saved: Annotated[list[Path], typer.Argument(help="Saved runs of one machine; later ones replace rows.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write.")],
) -> None:
    """Write JSON, CSV, tables, plots and the HTML report of saved runs, or of saved results of serve."""
    check_folder("--out", out)
    try:
        if all(map(serve_result.is_one, saved)):
            found = serve_result.merged([serve_result.load(path) for path in saved])
            say_written(serve_report.write_all(found, out))
            return
        run = results.merged(load(path) for path in saved)
    except ValueError as error:
        refuse(str(error))
    say_written(report.write_all(run, out))


def print_run(run: Results, every: bool) -> None:
    """A run's tables on standard output: the short ones, or all of them. One measurement alone is short."""
    shown = tables.summary(run) if run.of("bandwidth") else []
    tables.print_each(
        tables.tables(run) if every or not shown else shown, run.watermark, console_of(columns=200)
    )
    if shown and not every:
        missing = sum(not row.metrics for row in run.rows)
        answer(f"Every contender and case, and why {missing} have no figures: --all")


def _found(path: Path) -> Results | serve_result.ServeResult | None:
    """What is in a file, if it is a saved run."""
    try:
        return serve_result.load(path) if serve_result.is_one(path) else results.load(path)
    except ValueError:
        return None


def _measured(run: Results | serve_result.ServeResult) -> dict[str, int]:
    """Measurements, and how many rows or cells of each."""
    if not isinstance(run, Results):
        return {"servers": len(run.cells)}
    names = [row.measurement for row in run.rows]
    return {name: names.count(name) for name in dict.fromkeys(names)}


_LEGEND = (
    "change: of the figure. beside: how much slower in proportion to the nearest contender in which no code "
    "of this project runs, or to the link; 0 where it moved like one of them."
)
_MEANINGS = {
    gate.UNTOLD: "untold: it lies between two of them that moved apart, and may be slower or not.",
    "noise": "noise: such a contender itself.",
    "gone": "gone: these cases are not in the second run; its time may have been up.",
    "new": "new: these cases are not in the first run.",
}


def _show_lines(lines: Sequence[gate.GateLine], runs: Sequence[Results]) -> None:
    console = console_of(columns=100)
    if runs[1].watermark:
        console.print(runs[1].watermark, style="bold red")
    for name in ("gpu", "driver", "torch", "sglang", "sgl_kernel_loaded"):
        first, second = (run.environment.get(name) for run in runs)
        if first != second:
            then = f"{name}: {one_line(first)}, then {one_line(second)}"
            console.print(f"{then}: SGLang's own copies may have changed too")
    rows = []
    for line in lines:
        beside = "" if line.by is None or line.change is None else f"{line.change:+.1%}"
        own = "" if line.raw is None else f"{_more(line):+.1%}"
        alone = len(gate.FIGURES.get(line.measurement, ())) < 2
        what = line.measurement if alone or line.figure is None else f"{line.measurement} {line.figure}"
        rows.append((line.verdict, what, line.contender, str(line.cases), own, beside))
    numbers = ("cases", "change", "beside")
    if rows:
        titles = ("", "measurement", "contender", *numbers)
        console.print(layout.table(console, titles, rows, right=numbers))
    for line in lines:
        if line.verdict == "fails":
            console.print(f"{line.measurement}: {line.contender}: {line.reason}", style="bold red")
    counts = {
        verdict: sum(line.verdict == verdict for line in lines)
        for verdict in ("slower", "faster", "same", gate.UNTOLD)
    }
    told = (f"{count} {verdict}" for verdict, count in counts.items() if count or verdict != gate.UNTOLD)
    console.print(", ".join(told))
    verdicts = {line.verdict for line in lines}
    said = [_LEGEND, *(meaning for verdict, meaning in _MEANINGS.items() if verdict in verdicts)]
    console.print(" ".join(said), style="dim")


def _more(line: gate.GateLine) -> float:
    """The change of the figure, whichever direction is better."""
    assert line.raw is not None
    assert line.figure is not None
    return (1 / line.raw if results.METRICS[line.figure].more_is_better else line.raw) - 1


def _show_changes(changes: Sequence[comparing.Change]) -> None:
    rows = []
    for each in changes:
        row = each.row
        who = row.contender + (f" beside {row.forward}" if row.forward else "")
        figures = [_spread(each.before), _spread(each.after)]
        change = "" if each.change is None else f"{each.change:+.1%}"
        rows.append((row.measurement, str(row.case), who, each.metric or "", *figures, change, each.verdict))
    titles = ("measurement", "case", "contender", "figure", "before", "after", "change", "verdict")
    console = console_of(columns=180)
    console.print(layout.table(console, titles, rows))


def _spread(each: results.Spread | None) -> str:
    return "" if each is None else f"{each.median:.4g} ({each.low:.4g} to {each.high:.4g})"


def _share(text: str) -> float:
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        refuse(f"--fail-over {text}: a share, such as 5%, 5 or 0.05")
    # Nobody means 500 % with 5, and a gate that never fails would go unnoticed.
    share = number / 100 if text.endswith("%") or number >= 1 else number
    if not 0 <= share < 100:
        refuse(f"--fail-over {text}: a share from 0, such as 5%, 5 or 0.05")
    return share


def _check_only(given: Sequence[str], known: set[str]) -> None:
    for name in given:
        if name not in known:
            refuse(f"--only {name}: not in these runs; there are {', '.join(sorted(known))}")


def load(path: Path) -> Results:
    """A saved run; ends with exit status 2 where it is none."""
    if serve_result.is_one(path):
        refuse(f"{path}: a result of bench serve; here are set runs of bench bandwidth, submit and the like")
    try:
        return results.load(path)
    except ValueError as error:
        refuse(str(error))


def say_written(paths: Sequence[Path]) -> None:
    """Which files were written, on standard error."""
    say(f"written: {', '.join(str(path) for path in paths)}")
    missing = plots.why_not()
    if missing is not None:
        say(f"no plots: {missing}")


def stderr_console() -> Console:
    """Where progress goes: standard output is the result's."""
    return console_of(stderr=True, columns=160)
