"""``hicache-io bench``: measure write-back on this machine, compare two runs, and make reports of saved ones.

Exit status 0: measured, every byte right, nothing slower; 1: wrong bytes, nothing could be measured, or
something slower than before; 2: the input is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ...io_backends.registry import BACKENDS
from ...policy import completion
from ...policy.format.errors import PolicyError
from ...policy.names import ATTENTION_BACKENDS, NameProblem, check_name
from ...policy.terminal import tell
from ...policy.text import answer
from ..examples import epilog
from ..json_option import Json
from ..outputs import check_folder, refuse
from ..serve.command import serve
from ..whole_help import WholeHelpGroup
from . import report, results, saved_runs, suite
from .cases import LAYOUTS, MODELS
from .contenders import names
from .devices import gpu_missing
from .results import Results
from .saved_runs import say_written, stderr_console
from .sustained import SECONDS

ALL = "all"

bench = typer.Typer(
    cls=WholeHelpGroup,
    help="Measure write-back on this machine, compare runs, and make reports of saved ones.",
    epilog=epilog("bench"),
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
)


_STAND_INS = ("gemm", "attention", "memory", "decode", "prefill", "mixed")
_CONTIGUITY = {"contiguous": (False,), "fragmented": (True,), "both": (False, True)}


def _many(metavar: str, text: str, names: Iterable[str] | Callable[[], Iterable[str]] = ()) -> Any:
    return typer.Option(
        metavar=metavar,
        help=f"{text} May be repeated.",
        show_default=False,
        autocompletion=completion.one_of(names) if names else None,
    )


def _measurement(name: str, text: str) -> None:
    """Add the subcommand that runs one measurement (or ``all``)."""

    def command(
        backend: Annotated[list[str] | None, _many("NAME", "Contender; all without it.", names)] = None,
        model: Annotated[list[str] | None, _many("NAME", f"Of {', '.join(MODELS)}.", MODELS)] = None,
        layout: Annotated[list[str] | None, _many("LAYOUT", f"Of {', '.join(LAYOUTS)}.", LAYOUTS)] = None,
        page_size: Annotated[list[int] | None, _many("TOKENS", "Tokens a page.")] = None,
        tokens: Annotated[list[int] | None, _many("N", "Tokens a write.")] = None,
        contiguity: Annotated[
            str | None,
            typer.Option(
                metavar="WHICH",
                help="contiguous, fragmented or both.",
                show_default=False,
                autocompletion=completion.one_of(_CONTIGUITY),
            ),
        ] = None,
        attention: Annotated[
            list[str] | None,
            _many("NAME", "SGLang's attention backend, by which the policy sets fences.", ATTENTION_BACKENDS),
        ] = None,
        forward: Annotated[
            list[str] | None,
            _many(
                "NAME",
                "Forwards of interference: gemm, attention, memory, decode; of sustained: prefill, mixed.",
                _STAND_INS,
            ),
        ] = None,
        option: Annotated[
            list[str] | None,
            _many("BACKEND.NAME=N", "Option of a backend, such as hybrid.staging_mb=128."),
        ] = None,
        policy: Annotated[
            str | None, typer.Option(metavar="FILE", help="Policy that auto asks.", show_default=False)
        ] = None,
        repeats: Annotated[int, typer.Option(min=1, help="Repeats of each contender in each case.")] = 5,
        budget: Annotated[float, typer.Option(min=1, help="Seconds for all measurements together.")] = 300,
        seconds: Annotated[float, typer.Option(min=0.1, help="Of each loop of sustained.")] = SECONDS,
        quick: Annotated[bool, typer.Option("--quick", help="One or two cases of each measurement.")] = False,
        out: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="Write JSON, CSV, tables, plots and a report there."),
        ] = None,
        every: saved_runs.All = False,
        as_json: Json = False,
    ) -> None:
        only = {
            "models": model,
            "layouts": layout,
            "page_sizes": page_size,
            "tokens": tokens,
            "fragmented": _contiguity(contiguity),
            "attention": attention,
        }
        for what, given, known in (
            ("contender", backend, names()),
            ("model", model, tuple(MODELS)),
            ("layout", layout, LAYOUTS),
            ("attention backend", attention, ATTENTION_BACKENDS),
            ("stand-in", forward, _STAND_INS),
        ):
            _check(what, given, known)
        _positive("--page-size", page_size)
        _positive("--tokens", tokens)
        ask = suite.MeasureOptions(
            measurements=tuple(suite.GRIDS) if name == ALL else (name,),
            cpu=gpu_missing() is not None,
            only={key: values for key, values in only.items() if values},
            wanted=backend or None,
            options=_options(option or ()),
            policy=policy,
            repeats=repeats,
            budget_s=budget,
            quick=quick,
            stand_ins=tuple(forward) if forward else None,
            seconds=seconds,
        )
        if not any(ask.cases(each) for each in ask.measurements):
            refuse("no case is left: a write has fewer --tokens than a page has")
        check_folder("--out", out)
        _run(ask, out, every, as_json)

    command.__doc__ = text
    bench.command(name, epilog=epilog("bench measurement", name=name))(command)


for _name, _text in {
    "bandwidth": "GB/s of one write end to end, and share of the link, by every contender.",
    "submit": "Time of the scheduler's thread for one write, planning apart from the driver.",
    "interference": "Slow-down of a forward beside write-back that never stops.",
    "fence": "How long a forward waits that must not share the SMs with one write.",
    "latency": "Time until one small write is acknowledged.",
    "sustained": "Whether write-back keeps pace with forwards back to back, and what that costs them.",
    ALL: "All of them.",
}.items():
    _measurement(_name, _text)


bench.command("serve", epilog=epilog("bench serve"))(serve)
bench.command("list", epilog=epilog("bench list"))(saved_runs.list_runs)
bench.command("show", epilog=epilog("bench show"))(saved_runs.show)
bench.command("compare", epilog=epilog("bench compare"))(saved_runs.compare)
bench.command("report", epilog=epilog("bench report"))(saved_runs.make_report)


def _run(ask: suite.MeasureOptions, out: Path | None, every: bool, as_json: bool) -> None:
    console = stderr_console()
    if ask.cpu:
        console.print(f"No GPU: {gpu_missing()}. {results.CPU_WATERMARK}.", style="bold red")
    try:
        with Live(console) as say:
            run = suite.measure(ask, say, save=lambda run: _save(run, out))
    except PolicyError as error:
        refuse(str(error))
    if out is not None:
        say_written(report.write_all(run, out))
    if as_json:
        answer(json.dumps(run.to_dict(), indent=1))
    else:
        saved_runs.print_run(run, every)
    wrong, measured = run.wrong(), any(row.metrics for row in run.rows)
    for row in wrong:
        console.print(f"{row.measurement}: {row.case}: {row.contender}: {row.reason}", style="bold red")
    if not measured:
        console.print("nothing could be measured; the table says why", style="bold red")
    raise typer.Exit(0 if measured and not wrong else 1)


def _save(run: Results, out: Path | None) -> None:
    if out is not None:
        results.save(run, out)


class Live:
    """A progress bar on a terminal, and one line for each step; gives a function to tell it of progress."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> suite.SuiteProgress:
        self._bars.start()
        task = self._bars.add_task("measuring", total=1)

        def progress(text: str, done: float, total: float) -> None:
            self._bars.update(task, completed=done, total=total, description=text.split(":")[0])
            tell(self._console, text)

        return progress

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


def _contiguity(word: str | None) -> tuple[bool, ...]:
    if word is None:
        return ()
    _check("contiguity", [word], tuple(_CONTIGUITY))
    return _CONTIGUITY[word]


def _options(given: Sequence[str]) -> dict[str, dict[str, int | str]]:
    found: dict[str, dict[str, int | str]] = {}
    known = {name: spec for name, spec in BACKENDS.items() if spec.options is not None}
    for text in given:
        path, _, value = text.partition("=")
        backend, _, name = path.partition(".")
        _check("backend with options", [backend], tuple(known))
        try:
            number: int | str = int(value) if value.isdigit() else value
            known[backend].check_option(name, number)
        except NameProblem as error:
            refuse(f"--option {text}: {error}")
        found.setdefault(backend, {})[name] = number
    return found


def _check(what: str, given: Sequence[str] | None, known: Sequence[str]) -> None:
    for word in given or ():
        try:
            check_name(what, word, known)
        except NameProblem as error:
            refuse(str(error))


def _positive(name: str, given: Sequence[int] | None) -> None:
    for number in given or ():
        if number < 1:
            refuse(f"{name} must be at least 1, not {number}")
