"""How `hicache-io demo` shows its runs: progress while they go, a table and JSON of what they gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from ...policy.terminal import console as console_of
from ...policy.terminal import printable, styled, tell
from ..layout import table
from .identity import DemoRun, DemoSetup, Status

# What is said goes to standard error, so that --json has standard output for itself.
console = console_of(stderr=True, columns=110)


_BEAT_S = 10.0


class RunProgress:
    """One line for each run: live on a terminal, otherwise a new line whenever a run's state changes, and now
    and then while it does not.
    """

    def __init__(self, names: list[str], requests: int) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<13}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:>3.0f}/{task.total:.0f} requests", markup=False),
            TextColumn("{task.fields[seconds]:>4.0f} s  {task.fields[what]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {
            name: self._bars.add_task(name, total=requests, seconds=0, what="waiting") for name in names
        }
        self._said: dict[str, tuple[str, float]] = {}

    def __enter__(self) -> RunProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def of(self, name: str) -> Status:
        """Where run `name` reports to."""

        def report(what: str, done: int, seconds: float) -> None:
            self._bars.update(self._tasks[name], completed=done, seconds=seconds, what=printable(what))
            last, when = self._said.get(name, ("", 0.0))
            if not console.is_terminal and (what != last or seconds >= when + _BEAT_S):
                self._said[name] = what, seconds
                tell(console, f"{name}: {seconds:.0f} s: {what}")

        return report


def show_runs(out: Console, runs: Mapping[str, DemoRun], reference: DemoRun) -> None:
    """Print one row a run."""
    headings = (
        "bytes\nwritten",
        "writes",
        "copies\nsubmitted",
        "tokens\nfrom host",
        "fences: D2H\n+ forward",
        "outputs\nidentical",
    )
    rows: list[tuple[str | Text, ...]] = []
    for run in (run for run in runs.values() if run is not reference):
        ran = str(run.plugin["backend"]) if run.plugin else "?"
        colour = "green" if run.problem(reference) is None else "bold red"
        rows.append(
            (
                run.name if ran == run.name else f"{run.name} ({ran})",
                *(f"{run.count(counter):,}" for counter in ("bytes", "writes", "copies")),
                f"{run.host_tokens:,}",
                f"{run.count('producer_fences')} + {run.count('forward_fences')}",
                Text(f"{run.identical(reference)}/{len(reference.answers)}", colour),
            )
        )
    out.print(table(out, ("backend", *headings), rows, right=headings))
    out.print(
        "reference: the same server without HiCache. damaged: leaves out the last layer's V on purpose, and "
        "must differ.",
        style="dim",
    )


def verdict(setup: DemoSetup, failures: Mapping[str, str], seconds: float) -> Text:
    """The last lines: good or not, and what that shows."""
    found = ("Good: every output is the reference's, and the damage shows.", "bold green")
    if failures:
        found = (f"Failed: {', '.join(failures)}.", "bold red")
    about = ""
    if setup.cpu_engine:
        about = (
            "\nThis ran on SGLang's CPU engine: it shows that the right bytes go out and come back. It says "
            "nothing about speed on a GPU, nor about the order of work on one."
        )
    return styled(found, f"{about} ({seconds:.0f} s)")


def as_json(run: DemoRun, reference: DemoRun) -> dict[str, Any]:
    """One run, for `--json`."""
    result = {
        "name": run.name,
        "backend": run.backend,
        "damaged": run.damaged,
        "requests": len(run.answers),
        "host_tokens": run.host_tokens,
        "device_tokens": sum(answer.device_tokens for answer in run.answers),
        "sglang": run.version,
        "start_s": round(run.start_s, 1),
        "plugin": run.plugin,
    }
    if run is not reference:
        result |= {"identical": run.identical(reference), "problem": run.problem(reference)}
    return result
