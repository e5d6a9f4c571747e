"""The consoles that every command prints on: what they are given is text, whoever wrote it.

Servers, policy files, file names and error messages hold brackets, colons and control characters. Read as
rich's markup or as a terminal's commands they end the program, or hide what was said.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic
from typing import Any

from rich.console import Console
from rich.text import Text

from .text import LINES, columns_of, escaped, say


class _PlainConsole(Console):
    """A console on which strings, also those in tables, are `printable` and hold no markup."""

    def render_str(self, text: str, **how: Any) -> Text:
        """As rich's, which every string comes through on its way out."""
        return super().render_str(printable(text), **{**how, "markup": False, "emoji": False})


def console(*, stderr: bool = False, columns: int | None = None) -> Console:
    """Standard output, or what is said beside the result.

    Args:
        stderr: standard error.
        columns: width where that is no terminal and COLUMNS is not set; rich assumes 80 without it.
    """
    stream = sys.stderr if stderr else sys.stdout
    return _PlainConsole(
        # Python has None for a stream that is closed.
        file=io.StringIO() if stream is None else None,
        stderr=stderr,
        highlight=False,
        width=columns_of(stream) or columns,
        # rich takes a width of 0 from there, and what is no number.
        _environ={name: value for name, value in os.environ.items() if name != "COLUMNS"},
    )


def tell(out: Console, text: str | Text) -> None:
    """Print a sentence as :func:`~.text.say` does, but that a word longer than a line is broken."""
    out.print(text, soft_wrap=columns_of(out.file) is None)  # type: ignore[arg-type]


def printable(text: str) -> str:
    """``text`` with what a terminal obeys or hides, line ends and tabs excepted, as Python's escapes."""
    return escaped(text, allowed=LINES)


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Say on standard error what is being done, once it has taken a second, and then that it goes on.

    On a terminal that is one line that goes away; else a line now and then. Gives a function that is told how
    far it is. What is done within something that is being said is how far that is.
    """
    if _said:
        _said[-1](what)
        try:
            yield _said[-1]
        finally:
            _said[-1]("")
        return
    out, done, began, far = console(stderr=True), Event(), monotonic(), [""]

    def line() -> str:
        return printable(f"{what}: {far[0]}{', ' if far[0] else ''}{monotonic() - began:.0f} s so far")

    def beat() -> None:
        if done.wait(_QUIET_S):
            return
        if out.is_terminal:
            with out.status(line()) as status:
                while not done.wait(0.5):
                    status.update(line())
            return
        say(f"{what} ...")
        while not done.wait(_BEAT_S):
            say(line())

    def tell(text: str) -> None:
        far[0] = text

    thread = Thread(target=beat, daemon=True)
    thread.start()
    _said.append(tell)
    try:
        yield tell
    finally:
        _said.remove(tell)
        done.set()
        thread.join()


_QUIET_S, _BEAT_S = 1.0, 10.0
_said: list[Callable[[str], None]] = []
"""Of what is being said now, at most one."""


def styled(*parts: str | tuple[str, str]) -> Text:
    """Parts of one line, each a text or a text and its style."""
    pairs = [(each, "") if isinstance(each, str) else each for each in parts]
    return Text.assemble(*((printable(text), style) for text, style in pairs))
