"""``hicache-io doctor``: what this machine and this SGLang have, what works here, and what would be unsafe.

Exit status 0: nothing unsafe (a machine without a GPU included); 1: something is, or would not start; 2: the
input is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ....policy import completion
from ....policy.fact_spec import FactValue
from ....policy.gpu_names import architecture, doubt, memory_gib, remark
from ....policy.names import NameProblem
from ....policy.terminal import console, working
from ....policy.text import answer, say
from ..handover.machine_facts import detect
from . import checks, memory_checks, server_checks, server_memory
from .checks import BAD, OK, WARNING, Finding
from .dry_run import RESOLVING, Server, resolved, understood
from .gpu_memory import GpuMemory

_STYLES = {OK: "green", WARNING: "yellow", BAD: "bold red"}
_VERDICTS = {
    OK: "Nothing unsafe found.",
    WARNING: "Nothing unsafe found; the warnings are worth reading.",
    BAD: "Unsafe, or would not start: see what is bad.",
}
_STATUS_COLUMNS, _ABOUT_COLUMNS = 7, 17
"""Of a line: each is printed when it is known, so that no table can fit them."""

Sections = Iterator[tuple[str, Iterator[Finding]]]


def doctor(
    server_args: Annotated[
        str | None,
        typer.Option(
            "--server-args",
            metavar="'OPTIONS'",
            help="A whole SGLang command line: check that server too.",
            show_default=False,
        ),
    ] = None,
    gpu_arch: Annotated[
        str | None,
        typer.Option(
            "--gpu-arch",
            metavar="ARCH",
            help="The server's GPU, if not this machine's: sm90, H100, ...",
            show_default=False,
            autocompletion=completion.one_of(completion.ARCHITECTURES),
        ),
    ] = None,
    gpu_memory: GpuMemory = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", metavar="FILE", help="The policy file, as for explain.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine, this SGLang, the policy and a server, and say what to do."""
    given: dict[str, FactValue] = {}
    if gpu_arch is not None:
        try:
            given["gpu_arch"] = architecture(gpu_arch)
        except NameProblem as error:
            _refuse("--gpu-arch", error)
        # Of a server, a finding has the doubt.
        if said := remark(gpu_arch) or (None if server_args else doubt(gpu_arch)):
            say(f"gpu_arch: {said}")
    # SGLang resolves the command line in a process of its own, while this one looks at the machine.
    with ThreadPoolExecutor(1) as pool:
        try:
            asked = (
                None
                if server_args is None
                else pool.submit(
                    resolved,
                    understood(server_args),
                    given,
                    gpu_gib=gpu_memory or memory_gib(gpu_arch or ""),
                )
            )
            report = _told(examine(asked, policy), None if as_json else console())
        except NameProblem as error:
            _refuse("--server-args", error)
    worst = checks.worst(report)
    if as_json:
        sections = {name: [asdict(each) for each in section] for name, section in report.items()}
        answer(json.dumps({"status": worst, "sections": sections}, indent=2))
    else:
        console().print(_VERDICTS[worst], style=_STYLES[worst])
    raise typer.Exit(1 if worst == BAD else 0)


def _refuse(option: str, error: NameProblem) -> NoReturn:
    say(f"{option}: {error}")
    raise typer.Exit(2) from None


def examine(asked: Future[Server] | None, policy_file: str | None) -> Sections:
    """Every check's findings by section, each made when it is asked for.

    Raises:
        NameProblem: what was asked about cannot be resolved.
    """
    yield "SGLang and this plug-in", checks.installation()
    with working("looking for a GPU"):
        here = detect()
    yield "This machine", chain(checks.machine(here), memory_checks.machine())
    with working(RESOLVING):
        server = None if asked is None else asked.result()
    found, policy = checks.in_force(policy_file, server)
    yield "Policy", iter(found)
    if server is not None and policy is not None:
        memory = server_memory.memory(server, here.value("gpu_arch"))
        yield "The server", chain(server_checks.server(server, policy), memory)


def _told(sections: Sections, out: Console | None) -> dict[str, list[Finding]]:
    """The findings by section; each is printed on `out` when it is there."""
    report: dict[str, list[Finding]] = {}
    for title, findings in sections:
        report[title] = []
        for each in _one_by_one(title, findings):
            if out is not None:
                if not report[title]:
                    out.print(title, style="bold")
                show(out, each)
            report[title].append(each)
        if out is not None:
            out.print()
    return report


def _one_by_one(title: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings; while the next one is being made, that is said."""
    while True:
        with working(f"checking {title[0].lower() if title[1].islower() else title[0]}{title[1:]}"):
            found = next(findings, None)
        if found is None:
            return
        yield found


def show(out: Console, each: Finding) -> None:
    """Print one finding: a line, and below it what to do."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, width=_STATUS_COLUMNS)
    table.add_column(no_wrap=True, width=_ABOUT_COLUMNS)
    table.add_column(overflow="fold")
    table.add_row(Text(each.status, _STYLES[each.status]), each.about, each.text)
    if each.advice:
        table.add_row("", "", f"-> {each.advice}", style="dim")
    out.print(table)
