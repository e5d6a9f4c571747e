"""The values of a policy file: for each kind a validator that normalises one, or says what is wrong.

A scalar becomes a tuple of one, so that the rest of the package sees one form. What is wrong is raised as
pydantic's PydanticCustomError, of which ``validation_errors`` makes a PolicyError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pydantic import BeforeValidator, ValidationInfo
from pydantic_core import PydanticCustomError

from ..backend_spec import Backends
from ..conditions import Numbers
from ..fact_spec import FactKind, FactSpec
from ..names import (
    AUTO,
    FORWARDS,
    UPSTREAM_NAMES,
    NameProblem,
    check_name,
    nearest,
    shown,
)
from ..text import code_point, unsafe_character
from ..version_sets import Versions

USES = "uses"
MATCH = "match"  # of `unknown`: every condition of the rule
DEFAULT = "default"  # of `extends`
PROBLEM = "policy"  # the error type of `problem`, by which `load` knows it

# One condition names at most so many values, of so many characters: more than anybody writes (SGLang has 27
# attention backends), and few enough for what compares every value with every other.
MOST_ENTRIES = 64
MOST_CHARACTERS = 256

PathStep = str | int
_Entry = TypeVar("_Entry")


def problem(
    message: str, hint: str | None = None, *, at: tuple[PathStep, ...] = (), key: bool = False
) -> PydanticCustomError:
    """A validation error whose text is `message`, with the nearest valid name in `hint`.

    `at` is the path from the value being validated to the one that is wrong; with `key`, the wrong thing is
    the key there and not its value.
    """
    context = {"message": message, "hint": hint, "at": at, "key": key}
    return PydanticCustomError(PROBLEM, "{message}", context)


def condition_on(spec: FactSpec) -> BeforeValidator:
    """What a rule may ask of that fact: one value, or a list of values."""
    match spec.kind:
        case FactKind.FLAG:
            return flags(spec.name)
        case FactKind.NUMBER:
            return numbers(spec.name)
        case FactKind.VERSION:
            return _condition(spec.name, '">=0.3" in quotes', lambda word: Versions.of([word]))
        case FactKind.NAME:
            return _condition(spec.called, spec.values[0], spec.check_word)
        case FactKind.ARCHITECTURE | FactKind.TEXT:
            return _condition(spec.name, spec.example, spec.check_word)


def numbers(what: str) -> BeforeValidator:
    """A whole number or a comparison such as ``<64``, or a list of them."""

    def validate(value: object) -> tuple[int | str, ...]:
        found: list[int | str] = []
        for entry, at in _entries(value, what):
            if isinstance(entry, bool) or not isinstance(entry, (int, str)):
                wanted = f"{what} takes a number, or a comparison such as '<64'"
                raise problem(f"{wanted}, not {shown(entry)}", at=at)
            try:
                Numbers.of([entry])
            except NameProblem as error:
                raise problem(f"{what}: {error.message}", error.hint, at=at) from None
            found.append(entry)
        return tuple(found)

    return BeforeValidator(validate)


def flags(what: str) -> BeforeValidator:
    """True, false, or a list of them."""

    def validate(value: object) -> tuple[bool, ...]:
        found = []
        for entry, at in _entries(value, what):
            if not isinstance(entry, bool):
                hint = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(str(entry).lower())
                raise problem(f"{what} takes true or false, not {shown(entry)}", hint, at=at)
            found.append(entry)
        return tuple(found)

    return BeforeValidator(validate)


def text(what: str, *, most: int | None = None) -> BeforeValidator:
    """A text that is not empty, of at most `most` characters."""

    def validate(value: object) -> str:
        if not isinstance(value, str) or not value.strip():
            raise problem(f"{what} must be a text that is not empty")
        if most is not None and len(value) > most:
            raise problem(f"{what} has {len(value):,} characters; at most {most} are read")
        # A long text is folded over lines in the file; people and logs read it as one line.
        return " ".join(value.split())

    return BeforeValidator(validate)


def version_1(value: object) -> int:
    """The number 1."""
    if type(value) is not int or value != 1:
        written = f"'{value}'" if isinstance(value, str) else shown(value)
        # "1" and true are 1 to a reader, not to YAML: the hint says what is different about them.
        hint = "version: 1, without quotes" if value == "1" else "version: 1" if value == 1 else None
        raise problem(f"this release reads version 1 of the policy format, not {written}", hint)
    return value


def backends_of(info: ValidationInfo) -> Backends:
    """The backends that a file is checked against: the context of its validation.

    Raises:
        LookupError: it was validated without one.
    """
    if info.context is None:
        raise LookupError("validate with context=backends, the specs of those that there are")
    found: Backends = info.context
    return found


def backend(value: object, info: ValidationInfo) -> str:
    """The name of a shipped or registered backend."""
    if not isinstance(value, str):
        raise problem(f"backend must be the name of a backend, such as hybrid, not {shown(value)}")
    known = backends_of(info)
    if value in UPSTREAM_NAMES:
        raise problem(
            f"'{value}' is SGLang's own io backend, which no rule can choose: it runs untouched, without "
            f"this project's fences (--hicache-io-backend {value} selects it); a rule chooses one of "
            f"{', '.join(known)}"
        )
    if value == AUTO:
        raise problem(f"'{AUTO}' asks the policy, so no rule can choose it; valid: {', '.join(known)}")
    _checked(lambda name: check_name("backend", name, known), value, ())
    return value


def fences(value: object) -> tuple[str, ...]:
    """A list of extend, decode and uses; may be empty. Each name once, in the order written."""
    if value is None:
        raise problem("fence_forward is empty; write [] for no forward")
    if value in ([], ()):
        return ()
    words = _words(value, "fence_forward", "extend", _check_forward)
    return tuple(dict.fromkeys(words))


def unknown(value: object) -> tuple[str, ...]:
    """``match``, or a list of conditions; which ones a rule has is for it to check."""
    if value in ([], ()):
        raise problem("unknown is an empty list; leave it out: an unknown fact then matches nothing")

    def check(word: str) -> None:
        if isinstance(value, str) and word != MATCH:
            # One word that is no list: a typo of the only word there is, or a condition without brackets.
            raise NameProblem(
                f"unknown takes {MATCH}, or a list of conditions such as [gpu_arch], not '{word}'",
                nearest(word, (MATCH,)) or f"[{word}]",
            )

    return tuple(dict.fromkeys(_words(value, "unknown", MATCH, check)))


def unmeasured(value: object) -> dict[str, str]:
    """Paths within a rule, each with what about it nobody measured."""
    if not isinstance(value, dict) or not value:
        example = "when.page_size: pages of 2 to 15"
        raise problem(f"unmeasured must be a mapping such as {{{example}}}, not {shown(value)}")
    for path, what in value.items():
        if not isinstance(what, str) or not what.strip():
            raise problem("unmeasured says in words what nobody measured", at=(path,))
    return {path: " ".join(what.split()) for path, what in value.items()}


def extends(value: object) -> str:
    """``default``, or the name of a policy file."""
    if not isinstance(value, str) or not value.strip():
        raise problem(f"extends takes {DEFAULT}, or the name of a policy file, not {shown(value)}")
    if (found := unsafe_character(value)) is not None:
        raise problem(f"extends has the character {code_point(found)}; it takes one line")
    return value


def options(value: object) -> dict[str, Any]:
    """A mapping; what it may hold depends on the backend."""
    if not isinstance(value, dict):
        raise problem(f"options must be a mapping, not {shown(value)}")
    return dict(value)


def _check_forward(word: str) -> None:
    valid = (*FORWARDS, USES)
    if word not in valid:
        # SGLang's own options say prefill, and nothing that difflib compares is near it.
        hint = "extend" if word == "prefill" else nearest(word, valid)
        raise NameProblem(f"unknown forward '{word}'; valid: {', '.join(valid)}", hint)


def _condition(what: str, example: str, check: Callable[[str], object]) -> BeforeValidator:
    return BeforeValidator(lambda value: _words(value, what, example, check))


def _words(value: object, what: str, example: str, check: Callable[[str], object]) -> tuple[str, ...]:
    """`value`, a word or a list of words, as a tuple; `check` raises NameProblem for a bad one."""
    found = []
    for entry, at in _entries(value, what):
        if not isinstance(entry, str):
            raise problem(f"{what} takes words such as {example}, not {shown(entry)}", at=at)
        _checked(check, entry, at)
        found.append(entry)
    return tuple(found)


def _entries(value: object, what: str) -> Iterator[tuple[object, tuple[PathStep, ...]]]:
    """The entries of a list, or one value as if it were a list, each with its path from `value`."""
    if value is None:
        raise problem(f"{what} is empty; leave it out, or give it a value")
    if not isinstance(value, (list, tuple)):
        yield _short(value, what, ()), ()
        return
    if not value:
        raise problem(f"{what} is an empty list: this rule can never match")
    if len(value) > MOST_ENTRIES:
        raise problem(f"{what} lists {len(value):,} values; at most {MOST_ENTRIES} are read")
    for index, entry in enumerate(value):
        yield _short(entry, what, (index,)), (index,)


def _short(entry: object, what: str, at: tuple[PathStep, ...]) -> object:
    """`entry`, unless it is a text that no name, comparison or specifier is as long as, or has lines."""
    if isinstance(entry, str):
        _check_short(entry, what, at)
    return entry


def _check_short(word: str, what: str, at: tuple[PathStep, ...] = ()) -> None:
    if len(word) > MOST_CHARACTERS:
        raise problem(f"{what} has {len(word):,} characters; at most {MOST_CHARACTERS} are read", at=at)
    if (found := unsafe_character(word)) is not None:  # a line end or a tab: others are in no policy at all
        raise problem(f"{what} has the character {code_point(found)}; it takes one line", at=at)


def _checked(check: Callable[[_Entry], object], entry: _Entry, at: tuple[PathStep, ...]) -> None:
    """Run `check` on `entry`, with its NameProblem turned into a `problem` at `at`."""
    try:
        check(entry)
    except NameProblem as error:
        raise problem(error.message, error.hint, at=at) from None
