"""Text that may reach a terminal: what must not be in it, and how it is shown anyway."""

from __future__ import annotations

import sys
import unicodedata

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


def say(text: str) -> None:
    """A message on standard error: what is being done, or why not."""
    print(escaped(text, allowed=LINES), file=sys.stderr, flush=True)


def answer(text: str) -> None:
    """A result on standard output that is no table: JSON, Markdown, a line."""
    print(escaped(text, allowed=LINES), flush=True)


def code_point(character: str) -> str:
    """What a reader looks up, such as ``U+001B``."""
    return f"U+{ord(character):04X}"


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in _UNSAFE and character not in _JOINERS
