"""What is known of a server when a policy is asked: one value for each fact name, with where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .fact_spec import FactValue
from .fact_table import ANY_ATTENTION, ATTENTION_FACTS, FACT_NAMES, SERVER_FACTS
from .names import NameProblem, nearest

GIVEN = "given"
NOT_GIVEN = "not given"


@dataclass(frozen=True)
class Fact:
    """One fact: ``value`` (None when unknown) and ``source``, in words a user understands."""

    value: FactValue
    source: str

    def __str__(self) -> str:
        return "unknown" if self.value is None else str(self.value)


class Facts(Mapping[str, Fact]):
    """Every fact name with its Fact, always all of them and in the order of `FACT_NAMES`; never changes.

    Values are not checked against the vocabulary: a running SGLang may hold a name this project does not know
    (a third-party attention backend), and such a value matches no rule.
    """

    __slots__ = ("_facts",)

    def __init__(self, facts: Mapping[str, Fact] | None = None) -> None:
        """`facts` by name; the rest is unknown. Raises NameProblem for a name that is no fact, and TypeError
        for a value of the wrong type.
        """
        given = dict(facts or {})
        for name, fact in given.items():
            _check(name, fact.value)
        self._facts = {name: given.get(name, Fact(None, NOT_GIVEN)) for name in FACT_NAMES}

    @classmethod
    def given(cls, *, source: str = GIVEN, **values: FactValue) -> Facts:
        """Facts from values by name, all with one source. ``attention_backend`` is shorthand: it sets prefill
        and decode where they are not set themselves, as SGLang's option of that name does.
        """
        return cls(
            {name: Fact(value, source) for name, value in expanded(values).items() if value is not None}
        )

    def __getitem__(self, name: str) -> Fact:
        return self._facts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def __repr__(self) -> str:
        return f"Facts({', '.join(f'{name}={fact}' for name, fact in self.items())})"

    def value(self, name: str) -> FactValue:
        """The value of fact `name`, None when unknown. Raises KeyError for a name that is no fact."""
        return self._facts[name].value

    def doubts(self) -> dict[str, str]:
        """What an answer must say of values that nobody knows anything of, by fact."""
        said = {name: SERVER_FACTS[name].doubt(fact.value) for name, fact in self.items()}
        return {name: each for name, each in said.items() if each is not None}

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain JSON types: ``{name: {"value": ..., "source": ...}}``, null for unknown."""
        return {name: {"value": fact.value, "source": fact.source} for name, fact in self.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> Facts:
        """The inverse of `to_dict`."""
        return cls({name: Fact(entry["value"], entry["source"]) for name, entry in data.items()})


def _check(name: str, value: object) -> None:
    if name not in SERVER_FACTS:
        raise NameProblem(f"unknown fact '{name}'", nearest(name, FACT_NAMES))
    wanted = SERVER_FACTS[name].python_type
    # bool is an int, and True is no page size.
    good = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    if value is not None and not good:
        raise TypeError(f"fact {name} is {value!r}; it must be {wanted.__name__} or None")


def expanded(values: Mapping[str, FactValue]) -> dict[str, FactValue]:
    """`values` with the shorthand ``attention_backend`` written out."""
    found = dict(values)
    both = found.pop(ANY_ATTENTION.name, None)
    for name in ATTENTION_FACTS:
        if both is not None and found.get(name) is None:
            found[name] = both
    return found
