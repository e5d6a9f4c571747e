"""What ``explain`` and ``policy`` have in common: options, JSON, and how wrong input ends.

Exit status 2: the input is wrong (an unknown name, a policy file that cannot be used), with one line on
standard error, or with --json an object on standard output.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ...policy.fact_table import CONDITIONS, check_fact
from ...policy.format.errors import PolicyError
from ...policy.names import NameProblem
from ...policy.text import answer, say

PolicyPath = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="FILE",
        help="The policy file; without it SGLANG_HICACHE_IO_POLICY, else the shipped policy.",
        show_default=False,
    ),
]


@contextmanager
def refusing(as_json: bool) -> Iterator[None]:
    """Turn wrong input into exit status 2: one line on standard error, or with `as_json` an object on
    standard output.
    """
    try:
        yield
    except (NameProblem, PolicyError) as error:
        if as_json:
            print_json({"ok": False, "errors": [error.to_dict()]})
        else:
            say(str(error))
        raise typer.Exit(2) from None


def typed_fact(name: str, text: str) -> str | int | bool:
    """The value of a server's fact that a user typed, and on standard error what it is taken as, where that
    is not what was typed. Raises NameProblem.
    """
    value = check_fact(name, text)
    if said := CONDITIONS[name].remark(text):
        say(f"{name}: {said}")
    return value


def print_json(value: object) -> None:
    """`value` on standard output."""
    answer(json.dumps(value, indent=2))
