"""What a shell makes of words: assignments, variables and fields (POSIX.1-2024, sections 2.6 and 2.9.1)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .shell_words import CommandLineError, Kind, Part, Unknown, Value, Word

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=")
_OTHER_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\+=|\[)")
_PATTERN = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{.*(,|\.\.).*\}", re.DOTALL)


def assignment(word: Word) -> tuple[str, tuple[Part, ...]] | None:
    """The name and the value's parts of ``NAME=value``. Raises CommandLineError for ``NAME+=`` and arrays."""
    first = word.parts[0] if word.parts else Part("", quoted=True)
    if first.quoted or first.kind != Kind.LITERAL:
        return None
    if _OTHER_ASSIGNMENT.match(first.text):
        raise CommandLineError(f"the assignment `{word.source}` is not read: write NAME=value")
    if not (found := _ASSIGNMENT.match(first.text)):
        return None
    rest = first.text[found.end() :]
    return found[1], ((Part(rest),) if rest else ()) + word.parts[1:]


def value(parts: Sequence[Part], values: Mapping[str, Value]) -> Value:
    """What a shell assigns: no splitting and no patterns."""
    found = ""
    for index, part in enumerate(parts):
        if part.kind == Kind.LITERAL:
            if not part.quoted and re.search(r"^~|:~" if index == 0 else r":~", part.text):
                return Unknown("`~` is a folder that only the shell knows: write it out")
            found += part.text
            continue
        of_part = _looked_up(part, values)
        if isinstance(of_part, Unknown):
            return of_part
        found += of_part
    return found


def expand(word: Word, values: Mapping[str, Value], *, marking: bool = False) -> list[str]:
    """The words that a command gets for `word`: variables replaced, and split where they are not quoted.

    Args:
        word: before expansion.
        values: the variables that are known.
        marking: let a part that is not known stand in its word as a mark, for `check_known`; a word
            that is nothing else could be several, and is refused.

    Raises:
        CommandLineError: the text does not tell, or the files of a folder decide.
    """
    bare = "".join(
        part.text if part.kind == Kind.LITERAL and not part.quoted else "x" * len(part.text)
        for part in word.parts
    )
    if _PATTERN.search(bare) or _BRACES.search(bare):
        raise CommandLineError(f"`{word.source}` is a pattern to the shell: put it in quotes")
    found: list[str] = []
    current: str | None = None
    if bare.startswith("~"):
        home = Unknown(f"`{word.source}`: `~` is a folder that only the shell knows: write it out")
        current = _marked(home, marking and bare.startswith("~/"))
    for part in word.parts:
        text = part.text if part.kind == Kind.LITERAL else _looked_up(part, values)
        if isinstance(text, Unknown):
            text = _marked(text, marking and (part.quoted or len(word.parts) > 1))
            current = (current or "") + text
            continue
        if part.kind == Kind.LITERAL or part.quoted:
            current = (current or "") + text
            continue
        if _PATTERN.search(text):
            raise CommandLineError(f"`{word.source}` is a pattern to the shell: put it in quotes")
        for index, piece in enumerate(re.split(r"[ \t\n]+", text)):
            if index and current is not None:
                found.append(current)
                current = None
            if piece:
                current = (current or "") + piece
    return found if current is None else [*found, current]


def _marked(unknown: Unknown, allowed: bool) -> str:
    if not allowed:
        raise CommandLineError(unknown.why)
    return f"\0{unknown.why}\0"  # no program can be given a NUL


def unknown_in(text: str) -> Unknown | None:
    """What `expand` marked in `text`, if anything."""
    found = re.search("\0([^\0]*)", text)
    return Unknown(found[1]) if found else None


def check_known(*texts: str) -> None:
    """Raises CommandLineError if `expand` marked something in one of `texts`."""
    for text in texts:
        if unknown := unknown_in(text):
            raise CommandLineError(unknown.why)


def _looked_up(part: Part, values: Mapping[str, Value]) -> Value:
    if part.kind == Kind.UNKNOWN:
        return Unknown(f"what `{part.text}` gives is not known here: write its value")
    unset = Unknown(f"`${part.text}` is used and the text does not set it: write its value")
    return values.get(part.text, unset)
