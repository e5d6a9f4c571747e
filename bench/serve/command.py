"""``hicache-io bench serve``: real servers, one for each way of write-back, under the same load in turns.

Exit status 0: measured, no request failed, and where outputs are compared they are right; 1: not so; 2: the
input is wrong.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
import tempfile
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ...io_backends.sglang.versions import INSTALL
from ...policy import completion
from ...policy.names import MEM_LAYOUTS, NameProblem, check_name
from ...policy.text import answer, say
from ..json_option import Json
from ..measure.devices import gpu_missing
from ..outputs import check_folder, refuse
from . import arms, models, public, tables, workloads
from .arms import Cell

ON_GPU = ("none", "kernel", "direct", "auto")
ON_CPU = ("none", "auto")
"""Arms without --arm."""


def serve(
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"May be repeated. Of {', '.join(arms.ARMS)}.",
            show_default=False,
            autocompletion=completion.one_of(arms.ARMS),
        ),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Of {', '.join(workloads.NAMES)} (all without it), and SGLang's own benchmark: "
            f"{', '.join(public.NAMES)}. May be repeated.",
            show_default=False,
            autocompletion=completion.one_of((*workloads.NAMES, *public.NAMES)),
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help=f"A model's folder, or one that is made: {', '.join(models.NAMES)}.",
            show_default=False,
            autocompletion=completion.one_of(models.NAMES),
        ),
    ] = None,
    page_size: Annotated[int | None, typer.Option(min=1, help="Tokens a page.", show_default=False)] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            help="--hicache-mem-layout.",
            show_default=False,
            autocompletion=completion.one_of(MEM_LAYOUTS),
        ),
    ] = None,
    pool_tokens: Annotated[
        int | None, typer.Option(min=1024, help="Capacity of the device pool; 65,536.", show_default=False)
    ] = None,
    ratio: Annotated[float, typer.Option(min=1, help="Host pool, in device pools.")] = 3.0,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel size.")] = 1,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="--enable-deterministic-inference, and compare outputs with arm none."
        ),
    ] = False,
    server_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPTIONS",
            help='Of every server, such as "--attention-backend fa3". May be repeated.',
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each arm at each workload.")] = 2,
    at_once: Annotated[int, typer.Option(min=1, help="Servers that are up together.")] = 8,
    budget: Annotated[
        float | None, typer.Option(min=10, metavar="SECONDS", help="For all of it.", show_default=False)
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where made models are kept.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write JSON, CSV, tables, plots, a report and logs there."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve a model with each backend, load the servers in turns, and compare what users would see."""
    cpu = gpu_missing() is not None
    chosen = arm or list(ON_CPU if cpu else ON_GPU)
    asked = workload or list(workloads.NAMES)
    name = model or (models.TINY if cpu else models.HEAVY)
    _check(chosen, asked, layout, cpu)
    check_folder("--out", out)
    check_folder("--cache", cache)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped on the way out
    with ExitStack() as cleanup:
        kept = cache or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="hicache-serve-")))
        try:
            made = models.make(name, kept)
        except NameProblem as problem:
            _refuse(f"{problem}, or a folder with a config.json")
        cell = Cell(
            "serve",
            made,
            page_size=page_size or (arms.CPU_PAGE if cpu else 64),
            mem_layout=layout,
            pool_tokens=pool_tokens or (arms.CPU_POOL_TOKENS if cpu else Cell.pool_tokens),
            ratio=ratio,
            tp=tp,
            deterministic=deterministic,
            cpu_engine=cpu,
            more=tuple(word for text in server_option or () for word in shlex.split(text)),
        )
        logs = (
            out / "logs" if out else Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="logs-")))
        )
        ok = _run(cell, chosen, asked, rounds, at_once, budget, logs.resolve(), out, as_json)
    if not ok:
        raise typer.Exit(1)


def _run(
    cell: Cell,
    chosen: list[str],
    asked: list[str],
    rounds: int,
    at_once: int,
    budget: float | None,
    logs: Path,
    out: Path | None,
    as_json: bool,
) -> bool:
    from ..measure.environment import describe_environment
    from . import report, result, run

    found = result.ServeResult(describe_environment(cpu=cell.cpu_engine))
    if found.watermark:
        say(f"No GPU: {gpu_missing()}. {found.watermark}.")

    def save(part: result.CellResult) -> None:
        found.put(part)
        if out is not None:
            result.save(found, out)

    given = run.ServeOptions(chosen, asked, rounds, at_once, logs)
    found.put(run.run_cell(cell, given, run.Budget(budget), say, save))
    if out is not None:
        written = report.write_all(found, out)
        say(f"written: {', '.join(str(path) for path in written)}")
    problems = found.problems()
    if as_json:
        answer(json.dumps(found.to_dict(), indent=1))
    else:
        for each in tables.tables(found):
            answer(tables.as_text(each, found.watermark))
    for problem in problems:
        say(f"PROBLEM: {problem}")
    for skipped in found.cells[0].skipped:
        say(f"not run: {skipped}")
    return not problems and bool(found.cells[0].turns)


def _check(chosen: list[str], asked: list[str], layout: str | None, cpu: bool) -> None:
    try:
        arms.check_arms(chosen)
        for name in asked:
            check_name("workload", name, (*workloads.NAMES, *public.NAMES))
        if layout is not None:
            check_name("layout", layout, MEM_LAYOUTS)
    except NameProblem as problem:
        _refuse(str(problem))
    for what, given in (("arm", chosen), ("workload", asked)):
        if len(set(given)) < len(given):
            _refuse(f"an {what} was named twice" if what == "arm" else f"a {what} was named twice")
    for arm in chosen:
        why = arms.unserved(arm, cpu=cpu)
        if why is not None:
            _refuse(why)
    for module, install in (("sglang", INSTALL), ("aiohttp", "pip install aiohttp")):
        if find_spec(module) is None:
            _refuse(f"{module} is not installed; {install}")


def _refuse(why: str) -> Any:
    refuse(f"hicache-io bench serve: {why}")
