"""The values of each fact that the rules of two policies tell apart: one of each is enough to compare them.

Every condition cuts what its fact can be into values that satisfy it and values that do not. Two values that
satisfy the same conditions are alike to all rules, so that a policy decides the same for both. What is left
of a fact is a handful of classes; an unknown fact is one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .conditions import Condition, Flags, Names, Numbers
from .fact_spec import FactKind, FactValue
from .fact_table import ANY_ATTENTION, CONDITIONS, FORWARDS_OF
from .format.schema import Default, Rule
from .format.validators import USES
from .names import NO_SPECULATION
from .version_sets import Versions

_EITHER = ANY_ATTENTION.name
_SPECULATIVE = "speculative"
# Values times conditions, and one on versions is eight others: a second of work. Policies in use have some
# hundred.
_MOST_TESTS = 500_000


class CannotCompareError(ValueError):
    """Two policies that are not compared; the message says why, in words for a user."""


@dataclass(frozen=True)
class Literal:
    """One fact in one condition: which of its classes satisfy it. ``speculative``: only where the backend may
    run, that is not where it is known that nothing speculates.
    """

    variable: str
    holds: tuple[bool, ...]
    speculative: bool


#: A condition holds when one of its literals does; a rule when all of its conditions do.
Clause = tuple[Literal, ...]


@dataclass(frozen=True, eq=False)
class CompiledRule:
    """A rule (or the default) over classes. ``uses`` has, by forward, the literals that make it wait."""

    name: str
    server: tuple[Clause, ...]
    write: tuple[Clause, ...]
    listed: frozenset[str]
    uses: Mapping[str, Clause]


class Classes:
    """Classes of every fact and every write that the conditions of some rules tell apart.

    Attributes:
        values: by fact, and by write condition, one value of each class; None stands for unknown, and is the
            last.
        no_speculation: for each class of ``speculative``, whether it is known that nothing speculates.
        no_bytes: the class of ``write_entry_bytes`` that a write of no entries is in; None without one.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        """Raises CannotCompareError where a version condition is not decided, or where there are too many."""
        tested: dict[str, dict[tuple[Condition, bool], None]] = {_SPECULATIVE: {}}
        for rule in rules:
            tolerated = rule.unknown_matches()
            for key, condition in rule.when.conditions().items():
                for name in FORWARDS_OF if key == _EITHER else (key,):
                    tested.setdefault(name, {})[condition, key in tolerated] = None
        self.values: dict[str, tuple[FactValue, ...]] = {}
        self.no_bytes: int | None = None
        for name, tests in tested.items():
            conditions = [condition for condition, _ in tests]
            candidates = list(dict.fromkeys(_candidates(name, conditions)))
            cost = 8 if any(isinstance(each, Versions) for each in conditions) else 1
            if len(candidates) * len(tests) * cost > _MOST_TESTS:
                raise CannotCompareError(f"its conditions on {name} tell too many values apart")
            classes: dict[tuple[bool, ...], FactValue] = {}
            for value in candidates:
                alike = tuple(_holds(condition, unknown, value) for condition, unknown in tests)
                classes.setdefault(
                    (*alike, value is None, value == NO_SPECULATION and name == _SPECULATIVE), value
                )
            self.values[name] = tuple(classes.values())
            if name == "write_entry_bytes":
                alike = tuple(_holds(condition, unknown, 0) for condition, unknown in tests)
                self.no_bytes = list(classes).index((*alike, False, False))
        self.no_speculation = tuple(value == NO_SPECULATION for value in self.values[_SPECULATIVE])

    def compile(self, chosen: Rule | Default) -> CompiledRule:
        """`chosen` over these classes; it must be one of the rules that they were made of, or a default."""
        fences = chosen.use.fence_forward
        listed = frozenset(fences) - {USES}
        if isinstance(chosen, Default):
            return CompiledRule("default", (), (), listed, {})
        conditions, tolerated = chosen.when.conditions(), chosen.unknown_matches()
        clauses = {
            key: tuple(
                self._literal(name, condition, key in tolerated, key == _EITHER)
                for name in (FORWARDS_OF if key == _EITHER else (key,))
            )
            for key, condition in conditions.items()
        }
        uses: dict[str, list[Literal]] = {}
        if USES in fences:
            for name, forwards in FORWARDS_OF.items():
                key = _EITHER if _EITHER in conditions else name
                if key in conditions:
                    literal = self._literal(name, conditions[key], key in tolerated, True)
                    for forward in forwards:
                        uses.setdefault(forward, []).append(literal)
        return CompiledRule(
            chosen.name,
            tuple(clause for key, clause in clauses.items() if not CONDITIONS[key].of_write),
            tuple(clause for key, clause in clauses.items() if CONDITIONS[key].of_write),
            listed,
            {forward: tuple(literals) for forward, literals in uses.items()},
        )

    def _literal(self, name: str, condition: Condition, tolerated: bool, may_not_run: bool) -> Literal:
        holds = tuple(_holds(condition, tolerated, value) for value in self.values[name])
        return Literal(name, holds, may_not_run and CONDITIONS[name].speculative_only)


def _holds(condition: Condition, tolerated: bool, value: FactValue) -> bool:
    return tolerated if value is None else condition.holds(value)


def _candidates(name: str, conditions: Sequence[Condition]) -> Iterator[FactValue]:
    """Values of `name`, at least one of every class; those that a rule names first, unknown last."""
    if name == _SPECULATIVE:
        yield NO_SPECULATION
    names = [each for each in conditions if isinstance(each, Names)]
    numbers = [each for each in conditions if isinstance(each, Numbers)]
    versions = [each for each in conditions if isinstance(each, Versions)]
    if any(isinstance(each, Flags) for each in conditions):
        yield from (True, False)
    spec = CONDITIONS[name]
    known = spec.values
    for one in names:
        yield from sorted(one.values, key=lambda value: (known.index(value) if value in known else -1, value))
    if names or name == _SPECULATIVE:
        # One that SGLang has and no rule names, for the reader; and one that nobody has heard of, as there
        # may be.
        yield from known
        if spec.kind is FactKind.ARCHITECTURE:
            yield from ("sm80", "sm90", "sm100", "cpu")
        another = "another"
        while any(one.holds(another) for one in names):
            another += " one"
        yield another
    if numbers:
        yield from (1, *sorted(_edges(numbers)))
        if spec.of_write:
            yield 0
    if versions:
        yield from _versions(name, versions)
    if not spec.of_write:
        yield None


def _edges(numbers: Iterable[Numbers]) -> set[int]:
    """The first and last number of each span, and those beside them."""
    ends = {end for each in numbers for span in each.spans for end in span if end is not None}
    return {beside for end in ends for beside in (end - 1, end, end + 1) if beside >= 1}


def _versions(name: str, conditions: Sequence[Versions]) -> Iterator[str]:
    depth = 0
    for condition in conditions:
        if condition.spans is None:
            written = ", ".join(str(entry) for entry in condition.sets)
            raise CannotCompareError(
                f"which versions {name} '{written}' takes is not compared: an epoch, a pre-release, a local "
                "version or ==="
            )
        depth = max(depth, condition.depth())
    for condition in conditions:
        yield from condition.samples(depth)
    yield "not a version"
