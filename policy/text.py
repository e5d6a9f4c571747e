"""Text that may reach a terminal: what must not be in it, and how it is shown anyway."""

from __future__ import annotations

import os
import re
import sys
import textwrap
import unicodedata
from typing import TextIO

# Control characters move a cursor, colour or erase; format characters (bidirectional overrides among them)
# change the order in which others are shown, or are not seen; separators end a line. Joiners belong to words
# of some scripts.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
#: What text of several lines may hold.
LINES = "\n\t"
_JOINERS = "\u200c\u200d"


def unsafe_character(text: str, *, allowed: str = "") -> str | None:
    """The first character of `text` that could make a terminal show something else, besides `allowed`."""
    if text.isascii() and text.isprintable():
        return None
    return next((each for each in text if _is_unsafe(each) and each not in allowed), None)


def escaped(text: str, *, allowed: str = "") -> str:
    r"""`text` with unsafe characters but `allowed` ones as escapes such as ``\x1b`` and ``\u202e``."""
    if unsafe_character(text, allowed=allowed) is None:
        return text
    return "".join(
        each.encode("unicode_escape", "surrogatepass").decode()
        if _is_unsafe(each) and each not in allowed
        else each
        for each in text
    )


def columns_of(stream: TextIO | None) -> int | None:
    """How wide what is written there is shown, as COLUMNS or else the terminal says; None if neither does, or
    the stream is closed, which Python has as None.
    """
    said = os.environ.get("COLUMNS", "")
    if said.isascii() and said.isdigit() and int(said):
        return int(said)
    if stream is None:
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def say(text: str, *, whole: bool = False) -> None:
    """A message on standard error: what is being done, or why not. Where it is known how wide that is shown,
    lines end at words; else they are whole, for who looks for them in a file.

    Args:
        text: of one line or several.
        whole: also where the width is known, for logs.
    """
    said, columns = escaped(text, allowed=LINES), None if whole else columns_of(sys.stderr)
    if columns is not None:
        said = "\n".join(_wrapped(line, columns) for line in said.split("\n"))
    print(said, file=sys.stderr, flush=True)


def _wrapped(line: str, columns: int) -> str:
    """A line that fits as it is; else its words in several, as far in as it is. No word is broken."""
    if len(line) <= columns:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    return "\n".join(wrapped(line.strip(), columns, indent))


def wrapped(text: str, columns: int, indent: str = "") -> list[str]:
    """Lines that begin with `indent` and end at words; a longer word is left whole."""
    return textwrap.wrap(
        text,
        columns,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def answer(text: str) -> None:
    """A result on standard output that is no table: JSON, Markdown, a line."""
    print(escaped(text, allowed=LINES), flush=True)


def code_point(character: str) -> str:
    """What a reader looks up, such as ``U+001B``."""
    return f"U+{ord(character):04X}"


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in _UNSAFE and character not in _JOINERS


def first_sentence(text: str) -> str:
    """A whole one, on one line, which is about three of 80 columns. What follows a colon is left out where it
    makes the sentence longer than that.
    """
    ends = [
        each.start()
        for each in _END.finditer(text)
        if text.count("(", 0, each.start()) <= text.count(")", 0, each.start())
    ]
    stop = next((at for at in ends if text[at] != ":"), len(text))
    if stop > _SHORT:
        stop = next((at for at in ends if at <= _SHORT), stop)
    mark = text[stop] if text[stop : stop + 1] in ("!", "?") else "."
    return textwrap.shorten(f"{text[:stop].rstrip('.;')}{mark}", _LONGEST, placeholder=" ...")


_END = re.compile(r"(?:(?<!\bvs)(?<!\be\.g)(?<!\bi\.e)(?<!\bapprox)\.|[;:!?])(?=\s|$)")
_SHORT, _LONGEST = 160, 240
"""Characters of a sentence, and of the longest that is not cut."""
