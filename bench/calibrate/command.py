"""``hicache-io calibrate``: measure this machine, and write its layer of the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ...policy import completion
from ...policy.format.errors import PolicyError
from ...policy.terminal import console as console_of
from ...policy.text import answer
from ..layout import table
from ..measure.cases import MODELS
from ..measure.command import Live
from ..measure.devices import gpu_missing
from ..measure.results import CPU_WATERMARK
from ..measure.saved_runs import stderr_console
from ..outputs import check_file, check_folder, refuse
from . import machine_policy
from .run import ON_CPU, Calibration, Plan, quicker
from .run import calibrate as measure


def calibrate(
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the rules there instead of to this machine's policy file."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the rules, write nothing.")] = False,
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME", help=f"Rows of {', '.join(MODELS)}.", autocompletion=completion.one_of(MODELS)
        ),
    ] = "Qwen3-8B",
    rounds: Annotated[int, typer.Option(min=2, help="Whole sweeps, which must agree.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and repeats.")] = False,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Measure on the CPU, to try the command: the rules are of no use.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything that was measured as JSON.")
    ] = False,
) -> None:
    """Measure which backend and options are fastest on this GPU, and write rules that `explain` cites.

    Exit status 0: rules were made; 1: the measurements gave none, and why; 2: the input is wrong.
    """
    if model not in MODELS:
        refuse(f"unknown model '{model}'; there are {', '.join(MODELS)}")
    missing = gpu_missing()
    if missing is not None and not cpu:
        refuse(f"calibrate needs an NVIDIA GPU: {missing} (--cpu tries the command on the CPU)")
    target = out or machine_policy.machine_path()
    if cpu and not dry_run and target.resolve() == machine_policy.machine_path().resolve():
        refuse(f"--cpu needs --out FILE or --dry-run: {target} is this machine's policy file")
    base = ON_CPU if cpu else Plan()
    plan = Plan(model, base.tokens, base.page_sizes, base.options, rounds, base.repeats)
    if not dry_run:
        if out is None:
            check_folder("the folder of this machine's policy file,", target.parent)
        check_file("--out" if out else "this machine's policy file", target)
    console = stderr_console()
    if cpu:
        console.print(f"{CPU_WATERMARK}", style="bold red")
    with Live(console) as say:
        found = measure(quicker(plan) if quick else plan, cpu=cpu, say=say)
    try:
        text = found.text()
    except PolicyError as error:
        refuse(f"what was measured makes no valid policy: {error}")
    written = None
    if text is not None and not dry_run:
        try:
            machine_policy.install(text, target, found.environment)
        except OSError as error:
            refuse(f"{target} cannot be written: {error.strerror}")
        written = str(target)
    if as_json:
        answer(json.dumps({**found.to_dict(), "policy": text, "written": written}, indent=1))
    else:
        _show(found, text, written)
    raise typer.Exit(0 if text is not None else 1)


def _show(found: Calibration, text: str | None, written: str | None) -> None:
    console = console_of()
    for name, times in found.times.items():
        title = f"{name}: ms of each round" + (
            f"\n{CPU_WATERMARK}" if found.environment["ran_on"] == "CPU" else ""
        )
        console.print(title, style="bold")
        sizes = sorted({size for sweep in times.values() for size in sweep})
        first = "bytes an entry" if name in found.segments or name.endswith("first") else name
        rows = []
        for size in sizes:
            cells = [" ".join(f"{ms:.2f}" for ms in sweep.get(size, ())) for sweep in times.values()]
            rows.append((f"{size:,}", *cells))
        console.print(table(console, (first, *times), rows, right=tuple(times)))
    for name, parts in found.segments.items():
        for part in parts:
            console.print(
                f"{name}: {part.backend} from {part.at_least:,} bytes an entry "
                f"({part.low:,} to {part.high:,} in single rounds)"
            )
    for name, choice in found.options.items():
        console.print(f"hybrid {name}: {choice.value} ({choice.low} to {choice.high} in single rounds)")
    for name, why in found.refused.items():
        console.print(f"no number for {name}: {why}", style="bold red")
    if text is not None:
        console.print(f"written: {written}" if written else text, soft_wrap=True)
