"""``hicache-io doctor``: what this machine and this SGLang have, what works here, and what would be unsafe.

Exit status 0: nothing unsafe (a machine without a GPU included); 1: something is, or would not start; 2: the
input is wrong.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ....policy.fact_spec import FactValue, check_gpu_arch
from ....policy.names import NameProblem
from ....policy.terminal import console
from ..handover.machine_facts import detect
from . import checks, server_checks
from .checks import BAD, OK, WARNING, Finding
from .dry_run import Server, server_facts_of

_STYLES = {OK: "green", WARNING: "yellow", BAD: "bold red"}
_VERDICTS = {
    OK: "Nothing unsafe found.",
    WARNING: "Nothing unsafe found; the warnings are worth reading.",
    BAD: "Unsafe, or would not start: see what is bad.",
}


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
            "--gpu-arch", metavar="ARCH", help="The server's GPU, if not this machine's.", show_default=False
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", metavar="FILE", help="The policy file, as for explain.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine, this SGLang, the policy and a server, and say what to do."""
    try:
        given: dict[str, FactValue] = {} if gpu_arch is None else {"gpu_arch": check_gpu_arch(gpu_arch)}
        asked = None if server_args is None else server_facts_of(server_args, given)
    except NameProblem as error:
        option = "--gpu-arch" if server_args is None else "--server-args"
        typer.echo(f"{option}: {error}", err=True)
        raise typer.Exit(2) from None
    report = examine(asked, policy)
    worst = checks.worst(report)
    if as_json:
        sections = {name: [asdict(each) for each in section] for name, section in report.items()}
        typer.echo(json.dumps({"status": worst, "sections": sections}, indent=2))
    else:
        show(console(), report, worst)
    raise typer.Exit(1 if worst == BAD else 0)


def examine(asked: Server | None, policy_file: str | None) -> dict[str, list[Finding]]:
    """Every check's findings, by section."""
    of_policy, policy = checks.in_force(policy_file or (asked.policy if asked else None))
    report = {
        "SGLang and this plug-in": list(checks.installation()),
        "This machine": list(checks.machine(detect())),
        "Policy": of_policy,
    }
    if asked is not None and policy is not None:
        report["The server"] = list(server_checks.server(asked, policy))
    return report


def show(out: Console, report: dict[str, list[Finding]], worst: str) -> None:
    """Print the report: a line for each finding, and below it what to do."""
    for title, section in report.items():
        out.print(title, style="bold")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for each in section:
            table.add_row(Text(each.status, _STYLES[each.status]), each.about, each.text)
            if each.advice:
                table.add_row("", "", f"-> {each.advice}", style="dim")
        out.print(table)
        out.print()
    out.print(_VERDICTS[worst], style=_STYLES[worst])
