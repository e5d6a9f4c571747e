"""What is said of one fact: the type of an entry of the table of facts (`fact_table`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from packaging.version import InvalidVersion, Version

from .gpu_names import architecture, doubt, remark
from .names import NameProblem, check_name

FactValue = str | int | bool | None


class FactKind(Enum):
    """What values a fact has: how they are typed, checked and compared."""

    NAME = "one of some names"
    ARCHITECTURE = "a GPU architecture, or cpu"
    TEXT = "any text"
    VERSION = "a version, which conditions compare by PEP 440 specifiers"
    NUMBER = "a whole number from 1 up"
    FLAG = "true or false"


class FactSource(Enum):
    """Where a fact comes from when nobody gives it."""

    MACHINE = "the machine: its GPU, its driver, its installed packages"
    SERVER = "the server's arguments and its model, as SGLang resolves them"
    WRITE = "one write, when it happens"


@dataclass(frozen=True)
class FactSpec:
    """One fact.

    Attributes:
        name: as conditions, ``--fact`` and JSON spell it.
        kind: what its values are.
        meaning: what it is, in one sentence: help of ``explain``, JSON schema and docs/policy.md say it.
        source: where it comes from.
        called: what a message calls such a name; of a number or a text, what it is.
        values: of `FactKind.NAME`, the valid ones.
        unknown: why it is unknown where nobody gives it and detection does not look for it.
        hidden: when not even a server knows it, so that a rule that adds fences by it may not match.
        default, default_because: SGLang's default, where it has one, and what is said of it.
        example: a value, for messages.
        metavar: of ``explain``'s option for it; without one, ``--fact`` gives it.
        launched: SGLang's option that gives it, with ``{}`` for the value (0.5.18 to 0.5.23), in the command
            that ``explain`` prints. Without one, no option gives it.
        launched_as: the same of single values.
        follows: another fact, with which this one changes unless it is given too.
        forwards: of an attention backend, the forwards that it runs in.
        speculative_only: it is there with speculative decoding only.
        compared: a scheduler compares what it runs with what was decided on.
        phrase: of a write, how a condition is said, with ``{}`` for its values.
        canonical: the one spelling under which a name is compared.
        hints: what was meant by a wrong name that is near no valid one.
    """

    name: str
    kind: FactKind
    meaning: str
    source: FactSource = FactSource.SERVER
    called: str = ""
    values: tuple[str, ...] = ()
    unknown: str = ""
    hidden: str = ""
    default: FactValue = None
    default_because: str = "SGLang's default"
    example: str = ""
    metavar: str = ""
    launched: str = ""
    launched_as: Mapping[FactValue, str] = field(default_factory=dict, repr=False)
    follows: str = ""
    forwards: tuple[str, ...] = ()
    speculative_only: bool = False
    compared: bool = False
    phrase: str = ""
    canonical: Callable[[str], str] = field(default=str, repr=False)
    hints: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not (self.meaning[:1].isupper() and self.meaning.endswith(".")):
            raise ValueError(f"the meaning of fact {self.name} is no sentence: {self.meaning!r}")

    @property
    def of_write(self) -> bool:
        """Whether it is about one write; else it is about the server."""
        return self.source is FactSource.WRITE

    @property
    def option(self) -> str:
        """How ``explain`` is told it."""
        return f"--{self.name.replace('_', '-')}" if self.metavar else f"--fact {self.name}=..."

    def launch_words(self, value: FactValue) -> list[str]:
        """SGLang's options that give it this value; none where none does."""
        return self.launched_as.get(value, self.launched).format(value).split()

    @property
    def python_type(self) -> type[str] | type[int] | type[bool]:
        """Of its values."""
        return {FactKind.NUMBER: int, FactKind.FLAG: bool}.get(self.kind, str)

    def check_word(self, word: str) -> str:
        """`word` if it is a name, an architecture or a text of this fact. Raises NameProblem otherwise."""
        if self.kind is FactKind.ARCHITECTURE:
            architecture(word)
            return word
        if self.kind is FactKind.TEXT:
            if not word.strip():
                raise NameProblem(f"{self.name} is empty; leave it out, or give it a value")
            return word
        if word not in self.values and (meant := self.hints.get(word.lower())) is not None:
            raise NameProblem(f"unknown {self.called} '{word}'", meant)
        return check_name(self.called, word, self.values)

    def read(self, text: str) -> str | int | bool:
        """The value that a user typed as `text`, of `python_type`. Raises NameProblem for one that is not
        valid.
        """
        match self.kind:
            case FactKind.VERSION:
                try:
                    Version(text)
                except InvalidVersion:
                    raise NameProblem(
                        f"'{text}' is not a version of {self.name}, such as {self.example}"
                    ) from None
                return text
            case FactKind.NUMBER:
                if not (text.isascii() and text.isdigit() and int(text) >= 1):
                    raise NameProblem(f"'{text}' is not {self.called}")
                return int(text)
            case FactKind.FLAG:
                word = check_name(self.name, text.lower(), ("true", "false", "yes", "no", "on", "off"))
                return word in ("true", "yes", "on")
            case FactKind.TEXT if not text.strip():
                raise NameProblem(f"'{text}' is not {self.called}")
            case FactKind.ARCHITECTURE:
                return architecture(text)
            case _:
                return self.check_word(text)

    def remark(self, word: str) -> str | None:
        """What a valid word is taken as, where that is another; mostly nothing."""
        return remark(word) if self.kind is FactKind.ARCHITECTURE else None

    def doubt(self, value: FactValue) -> str | None:
        """What an answer must say that rests on `value`; mostly nothing."""
        return doubt(str(value)) if self.kind is FactKind.ARCHITECTURE and value is not None else None
