"""A POSIX shell's commands and words, as far as they are known without a shell; the rest is refused by name.

The grammar is the Shell Command Language of POSIX.1-2024 (sections 2.2, 2.3, 2.6 and 2.7). An expansion whose
outcome only a shell could tell stays `Unknown` until something needs it: ``echo $(date)`` is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ....policy.names import NameProblem


class CommandLineError(NameProblem):
    """A command line that cannot be resolved here; the message says why in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"\s*[\r\n]\s*", " ", message))  # it may quote several lines of the text


class ServerRefusedError(CommandLineError):
    """This plug-in would refuse a server that was started like this; the message is what it would say."""


@dataclass(frozen=True)
class Unknown:
    """A value that the text does not tell; ``why`` is a clause without a full stop."""

    why: str


Value = str | Unknown


class Kind(Enum):
    """What a part of a word is; ``Part.text`` holds its characters, the variable's name, or its source."""

    LITERAL = "literal"
    VARIABLE = "variable"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Part:
    """A piece of a word that is quoted throughout, or nowhere."""

    text: str
    kind: Kind = Kind.LITERAL
    quoted: bool = False


@dataclass(frozen=True)
class Word:
    """A word before expansion, and the characters that it was written with."""

    parts: tuple[Part, ...]
    source: str


@dataclass(frozen=True)
class Command:
    """A simple command without its redirections, and the operator before it in its list.

    Attributes:
        words: assignments included, never empty.
        before: ``&&``, ``||`` or ``|``; empty for the first command of a list.
    """

    words: tuple[Word, ...]
    before: str


@dataclass(frozen=True)
class AndOrList:
    """Commands joined by ``&&``, ``||`` and ``|``; ``background`` if ``&`` ends them."""

    commands: tuple[Command, ...]
    background: bool


_OPERATOR = re.compile(r"&&|\|\||\|&|;;|[;&|\n]")
_REDIRECTION = re.compile(r"&>>?|\d*(?:<<<|<<|>>|[<>][(&]|>\||<>|[<>])")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BLANK = " \t"


def parse(text: str, *, options_alone: bool = False) -> list[AndOrList]:
    """The commands of a script, in order.

    Args:
        text: the script.
        options_alone: the text is one command's options, so that a line end is a blank.

    Raises:
        CommandLineError: open quotes, or a construct that is not read, by name.
    """
    return _Lexer(text, options_alone).lists()


class _Lexer:
    def __init__(self, text: str, options_alone: bool) -> None:
        self.text, self.at = text, 0
        self.blank = _BLANK + "\n" if options_alone else _BLANK

    def lists(self) -> list[AndOrList]:
        found: list[AndOrList] = []
        commands: list[Command] = []
        words: list[Word] = []
        joined = ""
        while True:
            operator = self.next_operator(words)
            if words:
                commands.append(Command(tuple(words), joined if commands else ""))
                words = []
            elif operator == "\n" and commands:
                continue  # a line may end after && and the like
            if operator in ("&&", "||", "|"):
                joined = operator
                continue
            if commands:
                found.append(AndOrList(tuple(commands), operator == "&"))
                commands = []
            if not operator:
                return found

    def next_operator(self, words: list[Word]) -> str:
        """Adds the words up to the next operator to `words`; an empty operator is the end of the text."""
        while self.at < len(self.text):
            if self.text[self.at] in self.blank:
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            elif self.text[self.at] == "#":
                self.at = self.found("\n", self.at)
            elif redirection := _REDIRECTION.match(self.text, self.at):
                self.redirect(redirection[0])
            elif operator := _OPERATOR.match(self.text, self.at):
                self.at = operator.end()
                if operator[0] == ";;":
                    raise CommandLineError("`;;` is not read: give the lines that run, without `case`")
                return operator[0].removesuffix("&") if operator[0] == "|&" else operator[0]
            else:
                words.append(self.word())
        return ""

    def redirect(self, operator: str) -> None:
        if operator.endswith("<<"):
            raise CommandLineError("a here-document (`<<`) is not read: give the command line alone")
        if operator.endswith("("):
            raise CommandLineError(f"process substitution (`{operator}...)`) is not read")
        self.at += len(operator)
        while self.at < len(self.text) and self.text[self.at] in self.blank:
            self.at += 1
        self.word()  # where to: not the command's

    def word(self) -> Word:
        start, parts = self.at, list[Part]()
        while self.at < len(self.text):
            c = self.text[self.at]
            if c in self.blank or c in "\n;&|<>":
                break
            if c in "()":
                raise CommandLineError(
                    f"`{c}` after `{self.text[max(0, self.at - 20) : self.at].strip()}` is not read: give "
                    "the lines that run, without subshells, functions and arrays"
                )
            if c == "\r":
                raise CommandLineError("a line ends in a carriage return: save the text with Unix line ends")
            if c == "'":
                end = self.closing("'", self.at + 1)
                parts.append(Part(self.text[self.at + 1 : end], quoted=True))
                self.at = end + 1
            elif c == '"':
                self.double_quoted(parts)
            elif c == "\\":
                escaped = self.text[self.at + 1 : self.at + 2]
                if escaped != "\n":
                    parts.append(Part(escaped or "\\", quoted=True))
                self.at += 2
            elif c in "$`":
                parts.append(self.expansion(quoted=False))
            else:
                parts.append(Part(c))
                self.at += 1
        return Word(_joined(parts), self.text[start : self.at])

    def double_quoted(self, parts: list[Part]) -> None:
        parts.append(Part("", quoted=True))  # "" is a word
        self.at += 1
        while (c := self.text[self.at : self.at + 1]) != '"':
            if not c:
                raise _open_quote()
            following = self.text[self.at + 1 : self.at + 2]
            if c == "\\" and following and following in '$`"\\\n':
                if following != "\n":
                    parts.append(Part(following, quoted=True))
                self.at += 2
            elif c in "$`":
                parts.append(self.expansion(quoted=True))
            else:
                parts.append(Part(c, quoted=True))
                self.at += 1
        self.at += 1

    def expansion(self, *, quoted: bool) -> Part:
        """What ``$`` or a backtick begins, past its end."""
        start, following = self.at, self.text[self.at + 1 : self.at + 2]
        if self.text[start] == "`":
            self.at = self.skipped("`", start + 1)
        elif name := _NAME.match(self.text, start + 1):
            self.at = name.end()
            return Part(name[0], Kind.VARIABLE, quoted)
        elif following == "{":
            self.at = self.skipped("}", start + 2)
            inside = self.text[start + 2 : self.at - 1]
            if _NAME.fullmatch(inside):
                return Part(inside, Kind.VARIABLE, quoted)
            if re.match(r"\w+:?=", inside):
                raise CommandLineError(f"`${{{inside}}}` is not read, because it sets a variable")
        elif self.text.startswith("((", start + 1):
            raise CommandLineError("arithmetic (`$((...))`) is not read: write its value")
        elif following == "(":
            self.at = self.skipped(")", start + 2)
        elif following and following in "0123456789@*#?$!-":
            self.at += 2
        elif following and following in "'\"" and not quoted:
            raise CommandLineError(f"`${following}...` is not read: use plain quotes")
        else:
            self.at += 1
            return Part("$", quoted=True)
        return Part(self.text[start : self.at], Kind.UNKNOWN, quoted)

    def skipped(self, closing: str, at: int) -> int:
        """The place past the `closing` of what was opened before `at`, quotes and nesting respected."""
        while at < len(self.text):
            c = self.text[at]
            if c == closing:
                return at + 1
            if c == "\\":
                at += 2
            elif c == "'" and closing != '"':
                at = self.closing("'", at + 1) + 1
            elif c == '"':
                at = self.skipped('"', at + 1)
            elif c == "(" and closing == ")":
                at = self.skipped(")", at + 1)
            elif self.text.startswith(("$(", "${"), at):
                at = self.skipped(")" if self.text[at + 1] == "(" else "}", at + 2)
            elif c == "#" and closing == ")" and self.text[at - 1] in " \t\n(":
                at = self.found("\n", at)
            else:
                at += 1
        raise _open_quote()

    def closing(self, quote: str, at: int) -> int:
        if (end := self.text.find(quote, at)) < 0:
            raise _open_quote()
        return end

    def found(self, what: str, at: int) -> int:
        return end if (end := self.text.find(what, at)) >= 0 else len(self.text)


def _open_quote() -> CommandLineError:
    return CommandLineError("the command line cannot be read: No closing quotation")


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbours that are alike as one part."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if last and last.kind == part.kind == Kind.LITERAL and last.quoted == part.quoted:
            found[-1] = Part(last.text + part.text, quoted=part.quoted)
        else:
            found.append(part)
    return tuple(found)
