"""The consoles that every command prints on: what they are given is text, whoever wrote it.

Servers, policy files, file names and error messages hold brackets, colons and control characters. Read as
rich's markup or as a terminal's commands they end the program, or hide what was said.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from .text import escaped


class _PlainConsole(Console):
    """A console on which strings, also those in tables, are `printable` and hold no markup."""

    def render_str(self, text: str, **how: Any) -> Text:
        """As rich's, which every string comes through on its way out."""
        return super().render_str(printable(text), **{**how, "markup": False, "emoji": False})


def console(*, stderr: bool = False, columns: int | None = None) -> Console:
    """Standard output, or what is said beside the result.

    Args:
        stderr: standard error.
        columns: width where that is no terminal; rich assumes 80 without it.
    """
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return _PlainConsole(stderr=stderr, highlight=False, width=None if is_terminal else columns)


def printable(text: str) -> str:
    """``text`` with what a terminal obeys or hides, line ends and tabs excepted, as Python's escapes."""
    return escaped(text, allowed="\n\t")


def styled(*parts: str | tuple[str, str]) -> Text:
    """Parts of one line, each a text or a text and its style."""
    pairs = [(each, "") if isinstance(each, str) else each for each in parts]
    return Text.assemble(*((printable(text), style) for text, style in pairs))
