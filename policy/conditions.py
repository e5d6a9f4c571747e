"""One condition of a rule's ``when``, as the set of values it accepts.

Four kinds of set: names, whole numbers from 1 up, versions, and true or false. Each can say whether it holds
a value, whether it holds nothing at all, and whether another set of its kind covers it. The last two find
rules that can never match before a server starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self

from .fact_spec import FactKind, FactValue
from .fact_table import CONDITIONS
from .names import NameProblem
from .version_sets import Versions


class Condition(Protocol):
    """A set of values of one fact."""

    def holds(self, value: FactValue) -> bool:
        """Whether a known `value` is in the set."""

    def is_empty(self) -> bool:
        """Whether no value is in the set. False when that cannot be decided."""

    def within(self, other: Self) -> bool:
        """Whether `other` holds every value of this set. False when that cannot be decided."""


@dataclass(frozen=True)
class Names:
    """Any of some names, compared under the one name that an alias stands for."""

    key: str
    values: frozenset[str]

    @classmethod
    def of(cls, key: str, names: Iterable[str]) -> Names:
        return cls(key, frozenset(map(CONDITIONS[key].canonical, names)))

    def holds(self, value: FactValue) -> bool:
        return isinstance(value, str) and CONDITIONS[self.key].canonical(value) in self.values

    def is_empty(self) -> bool:
        return not self.values

    def within(self, other: Names) -> bool:
        return self.values <= other.values


_COMPARISON = re.compile(r"\s*(<=|>=|==|!=|<|>)?\s*(\d+)\s*", re.ASCII)
Span = tuple[int, int | None]  # both ends included; None: no upper end


@dataclass(frozen=True)
class Numbers:
    """Whole numbers from 1 up, as disjoint spans in ascending order."""

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, entries: Iterable[int | str]) -> Numbers:
        """Any of `entries`: numbers, or comparisons such as ``<64`` and ``>=16,<64`` (all of its parts hold).

        Raises NameProblem for a comparison that cannot be read.
        """
        spans: list[Span] = []
        for entry in entries:
            parts = str(entry).split(",")
            allowed: tuple[Span, ...] = ((1, None),)
            for part in parts:
                allowed = _intersect(allowed, _spans_of(part, str(entry)))
            spans.extend(allowed)
        return cls(_merged(spans))

    def holds(self, value: FactValue) -> bool:
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return any(low <= value and (high is None or value <= high) for low, high in self.spans)

    def is_empty(self) -> bool:
        return not self.spans

    def within(self, other: Numbers) -> bool:
        # Both are merged, so a span that is covered is covered by one span.
        return all(
            any(_intersect((span,), (cover,)) == (span,) for cover in other.spans) for span in self.spans
        )


def _spans_of(part: str, entry: str) -> tuple[Span, ...]:
    found = _COMPARISON.fullmatch(part)
    if not found:
        swapped = entry.replace("=<", "<=").replace("=>", ">=")
        raise NameProblem(
            f"'{entry}' is neither a number nor a comparison such as <64 or >=16,<64",
            swapped if swapped != entry else None,
        )
    number = int(found[2])
    match found[1]:
        case "<":
            return _merged([(1, number - 1)])
        case "<=":
            return _merged([(1, number)])
        case ">":
            return _merged([(number + 1, None)])
        case ">=":
            return _merged([(number, None)])
        case "!=":
            return _merged([(1, number - 1), (number + 1, None)])
        case _:
            return _merged([(number, number)])


def _intersect(left: Iterable[Span], right: Iterable[Span]) -> tuple[Span, ...]:
    right = tuple(right)
    spans: list[Span] = []
    for low_a, high_a in left:
        for low_b, high_b in right:
            high = high_b if high_a is None else high_a if high_b is None else min(high_a, high_b)
            spans.append((max(low_a, low_b), high))
    return _merged(spans)


def _merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """`spans` without the empty ones, clipped to sizes from 1 up, joined where they touch, in ascending
    order.
    """
    clipped = [(max(low, 1), high) for low, high in spans if high is None or high >= max(low, 1)]
    merged: list[Span] = []
    for low, high in sorted(clipped, key=lambda span: span[0]):
        if merged and (merged[-1][1] is None or low <= merged[-1][1] + 1):
            before = merged[-1][1]
            merged[-1] = (merged[-1][0], None if before is None or high is None else max(before, high))
        else:
            merged.append((low, high))
    return tuple(merged)


@dataclass(frozen=True)
class Flags:
    """True, false, or either."""

    values: frozenset[bool]

    def holds(self, value: FactValue) -> bool:
        return isinstance(value, bool) and value in self.values

    def is_empty(self) -> bool:
        return not self.values

    def within(self, other: Flags) -> bool:
        return self.values <= other.values


def condition(key: str, values: Iterable[int | str | bool]) -> Condition:
    """The set of values that condition `key` of a rule accepts, from its `values` as written.

    Raises NameProblem for a comparison or a specifier that cannot be read.
    """
    match CONDITIONS[key].kind:
        case FactKind.FLAG:
            return Flags(frozenset(value for value in values if isinstance(value, bool)))
        case FactKind.NUMBER:
            return Numbers.of(values)
        case FactKind.VERSION:
            return Versions.of(map(str, values))
        case FactKind.NAME | FactKind.ARCHITECTURE | FactKind.TEXT:
            return Names.of(key, map(str, values))
