"""What a layer of policy takes away: forwards that wait without it and do not wait with it.

Compared is what happens, not how it is written: for every combination of facts, unknown ones included, and
every write, the forwards that the policy below makes wait must wait under the policy as well. That covers
each backend that can be asked for: ``auto`` takes the fences of the write's own route; a pool that this
backend does not support goes through SGLang's own copy, and a backend given by name serves every write,
behind the fences of all routes together. So a rule that chooses copy_engine must list its forwards too,
though nothing waits for copy_engine itself.

The search is complete. It asks, for a rule that fences below and one that decides above, whether one
combination leads to both: it goes through the classes of one fact after the other (`classes`) and leaves a
branch as soon as a condition fails there. Pairs of rules that both policies share in the same order cannot
meet. What takes more than `MOST_STEPS` is not decided, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .classes import CannotCompareError, Classes, Clause, CompiledRule, Literal
from .decide import decide
from .fact_spec import FactValue
from .fact_table import CONDITIONS, FACT_NAMES
from .facts import Facts
from .format.layers import DEFAULT_RULE, USER, Policy
from .format.schema import Default, Rule
from .names import FORWARDS

#: Rules looked at in a whole comparison: about two seconds.
MOST_STEPS = 400_000


@dataclass(frozen=True)
class Loss:
    """A fence that is gone.

    Attributes:
        rule: the rule (or "default") of the policy above that takes it away.
        of: the rule (or "default") below whose fence it is.
        forwards: which do not wait any more.
        facts: one combination in which they do not; what is left out may be anything, or unknown.
        write: what of a write leads there; empty where every write does.
        by_hand: only where a backend is given by name, or a pool goes through SGLang's own copy.
    """

    rule: str
    of: str
    forwards: tuple[str, ...]
    facts: Mapping[str, FactValue]
    write: Mapping[str, FactValue]
    by_hand: bool

    def example(self) -> str:
        """The combination in words."""
        said = [f"{name} {_word(self.facts[name])}" for name in FACT_NAMES if name in self.facts]
        said += [f"{name} {_word(value)}" for name, value in self.write.items()]
        if self.by_hand:
            said.append("a backend given by name")
        return ", ".join(said) or "any facts"


def losses(below: Policy, above: Policy) -> Iterator[Loss]:
    """Fences of `below` that `above` does not have, one for each pair of rules that take and lose one.

    Raises CannotCompareError when that is not decided.
    """
    return _Comparison(below, above).losses()


class _Comparison:
    def __init__(self, below: Policy, above: Policy) -> None:
        classes = Classes([*below.rules, *above.rules])
        self._values, self._no_speculation = classes.values, classes.no_speculation
        self._no_bytes = classes.no_bytes
        self._speculating = Literal("speculative", tuple(not each for each in self._no_speculation), False)
        chosen: list[Rule | Default] = [*below.rules, below.default, *above.rules, above.default]
        compiled = {id(each): classes.compile(each) for each in chosen}
        self._below = [compiled[id(each)] for each in (*below.rules, below.default)]
        self._above = [compiled[id(each)] for each in (*above.rules, above.default)]
        self._shared = set(self._below) & set(self._above)
        self._names = {rule.name: rule for rule in self._above}
        self._steps = 0

    def losses(self) -> Iterator[Loss]:
        found: set[tuple[str, str]] = set()
        for at, old in enumerate(self._below):
            if not (old.listed or old.uses):
                continue
            for to, new in enumerate(self._above):
                # Rules that both have keep their order: where one decides, the other never does.
                if old is new or (old in self._shared and new in self._shared):
                    continue
                blamed = self._blamed(old, new)
                if (blamed, old.name) in found or not (may := self._may_lose(at, to)):
                    continue
                if (state := self._one_write(at, to, may, {})) is not None:
                    found.add((blamed, old.name))
                    for name in list(state):  # what does not matter is not said
                        less = {each: index for each, index in state.items() if each != name}
                        state = less if self._lost(at, to, less) else state
                    yield self._loss(blamed, old, self._lost(at, to, state), state, by_hand=False)
        if any(rule.write for rule in (*self._below, *self._above)):
            for at, old in enumerate(self._below):
                for forward in FORWARDS:
                    if (state := self._all_writes(at, forward, {})) is None:
                        continue
                    blamed = self._blamed(old, self._stop(state))
                    if (blamed, old.name) not in found:
                        found.add((blamed, old.name))
                        yield self._loss(blamed, old, frozenset({forward}), state, by_hand=True)

    def _blamed(self, old: CompiledRule, new: CompiledRule) -> str:
        """The rule to change: the one that decides now, or what took the place of the one that did."""
        return self._names[old.name].name if new in self._shared and old.name in self._names else new.name

    def _loss(
        self, blamed: str, old: CompiledRule, gone: frozenset[str], state: dict[str, int], *, by_hand: bool
    ) -> Loss:
        values = {name: self._values[name][index] for name, index in state.items()}
        return Loss(
            blamed,
            old.name,
            tuple(forward for forward in FORWARDS if forward in gone),
            {name: value for name, value in values.items() if not CONDITIONS[name].of_write},
            {name: value for name, value in values.items() if CONDITIONS[name].of_write},
            by_hand,
        )

    # A state holds the class of some facts; what is not in it is open, and so are rules that depend on it.

    def _may_lose(self, at: int, to: int) -> frozenset[str]:
        """Forwards that rule `at` of `below` may fence and rule `to` of `above` not, by conditions alone."""
        old, new = self._below[at], self._above[to]
        self._count(at + to)
        clauses = (*old.server, *old.write, *new.server, *new.write)
        for earlier in (*self._above[:to], *self._below[:at]):
            if all(
                any(_implies(each, clause) for each in clauses)
                for clause in (*earlier.server, *earlier.write)
            ):
                return frozenset()  # it decides before one of the two
        kept = {
            forward
            for forward, clause in old.uses.items()
            if forward not in old.listed and _implies(clause, new.uses.get(forward, ()))
        }
        return (old.listed | old.uses.keys()) - new.listed - kept

    def _wanted(self, at: int, to: int) -> Iterator[tuple[CompiledRule, bool]]:
        """What must hold, and what must not, for these two to decide."""
        yield self._below[at], True
        yield self._above[to], True
        yield from ((each, False) for each in (*self._above[:to], *self._below[:at]))

    def _lost(self, at: int, to: int, state: dict[str, int]) -> frozenset[str]:
        """The forwards that are surely lost in `state`, between these two rules."""
        if any(self._rule(rule, state) is not value for rule, value in self._wanted(at, to)):
            return frozenset()
        return self._least(self._below[at], state) - self._most(self._above[to], state)

    def _one_write(
        self, at: int, to: int, may: frozenset[str], state: dict[str, int]
    ) -> dict[str, int] | None:
        """A state in which `below` decides by its rule `at` and `above` by its rule `to`, and one of the
        forwards `may` is lost.
        """
        old, new = self._below[at], self._above[to]
        self._count(at + to)
        if not self._is_a_write(state):
            return None
        branch: tuple[Literal, bool] | None = None
        for rule, value in self._wanted(at, to):
            answer = self._rule(rule, state)
            if answer is not None and answer is not value:
                return None
            if answer is None and branch is None:
                branch = self._open((*rule.server, *rule.write), state), value
        if not (self._most(old, state) - self._least(new, state)) & may:
            return None
        if branch is None:
            if self._least(old, state) - self._most(new, state):
                return state
            branch = self._open_fence((old, new), state), True
        for index in self._ordered(*branch):
            if (found := self._one_write(at, to, may, {**state, branch[0].variable: index})) is not None:
                return found
        return None

    def _is_a_write(self, state: dict[str, int]) -> bool:
        """Whether a write can be so: one of no entries has no bytes in each (`WriteFacts.entry_bytes`)."""
        if not state.keys() >= {"write_entries", "write_entry_bytes"}:
            return True
        # A class that stands for more than 0 shows another of its numbers.
        none = self._values["write_entries"][state["write_entries"]] == 0
        return not none or state["write_entry_bytes"] == self._no_bytes

    def _ordered(self, literal: Literal, wanted: bool) -> list[int]:
        """The classes of its fact, those first that lead to what is wanted: they make the better example."""
        return sorted(range(len(literal.holds)), key=lambda index: literal.holds[index] is not wanted)

    def _all_writes(self, at: int, forward: str, state: dict[str, int]) -> dict[str, int] | None:
        """A state in which rule `at` is one of the routes of `below` and lists `forward`, and none of `above`
        does.
        """
        old = self._below[at]
        self._count(at + len(self._above))
        if forward not in self._most(old, state):
            return None
        asked: list[CompiledRule] = []
        for rule, value in [(old, True), *((each, False) for each in self._below[:at] if not each.write)]:
            answer = self._server(rule, state)
            if answer is not None and answer is not value:
                return None
            if answer is None:
                asked.append(rule)
        cut = passed = False
        for rule in self._above:
            answer = self._server(rule, state)
            if answer is False:
                continue
            if rule is old and not passed:
                return None  # what lists it below is a route above, too
            if answer and not cut and forward in self._least(rule, state):
                return None
            if answer is None or forward in self._most(rule, state):
                asked.append(rule)
            if not rule.write and rule not in self._shared:
                passed = True  # may be the last route, before `old`
            if not rule.write:
                if answer:
                    break
                cut = True
        clauses = [clause for rule in asked for clause in rule.server]
        clauses += [rule.uses[forward] for rule in (old, *asked) if forward in rule.uses]
        if all(self._clause(clause, state) is not None for clause in clauses):
            return state
        literal = self._open(clauses, state)
        for index in self._ordered(literal, True):
            if (found := self._all_writes(at, forward, {**state, literal.variable: index})) is not None:
                return found
        return None

    def _stop(self, state: dict[str, int]) -> CompiledRule:
        """The last route of `above`."""
        return next(rule for rule in self._above if self._server(rule, state) and not rule.write)

    def _count(self, rules: int) -> None:
        self._steps += 2 + rules
        if self._steps > MOST_STEPS:
            raise CannotCompareError("its conditions combine in too many ways")

    def _rule(self, rule: CompiledRule, state: dict[str, int]) -> bool | None:
        return self._all((*rule.server, *rule.write), state)

    def _server(self, rule: CompiledRule, state: dict[str, int]) -> bool | None:
        return self._all(rule.server, state)

    def _all(self, clauses: Sequence[Clause], state: dict[str, int]) -> bool | None:
        result: bool | None = True
        for clause in clauses:
            answer = self._clause(clause, state)
            if answer is False:
                return False
            if answer is None:
                result = None
        return result

    def _clause(self, clause: Clause, state: dict[str, int]) -> bool | None:
        result: bool | None = False
        for literal in clause:
            answer = self._literal(literal, state)
            if answer:
                return True
            if answer is None:
                result = None
        return result

    def _literal(self, literal: Literal, state: dict[str, int]) -> bool | None:
        index = state.get(literal.variable)
        answer = None if index is None else literal.holds[index]
        if not literal.speculative or answer is False:
            return answer
        speculative = state.get("speculative")
        if speculative is None:
            return None
        return False if self._no_speculation[speculative] else answer

    def _most(self, rule: CompiledRule, state: dict[str, int]) -> frozenset[str]:
        """The forwards that may wait under `rule`."""
        return rule.listed | {
            each for each, clause in rule.uses.items() if self._clause(clause, state) is not False
        }

    def _least(self, rule: CompiledRule, state: dict[str, int]) -> frozenset[str]:
        """The forwards that surely do."""
        return rule.listed | {each for each, clause in rule.uses.items() if self._clause(clause, state)}

    def _open(self, clauses: Sequence[Clause], state: dict[str, int]) -> Literal:
        """A literal whose fact is not set, in an open one of `clauses`; those of single facts come first."""
        clause = next(each for each in sorted(clauses, key=len) if self._clause(each, state) is None)
        literal = next(each for each in clause if self._literal(each, state) is None)
        return literal if literal.variable not in state else self._speculating

    def _open_fence(self, rules: Sequence[CompiledRule], state: dict[str, int]) -> Literal:
        return self._open([clause for rule in rules for clause in rule.uses.values()], state)


def _implies(clause: Clause, other: Clause) -> bool:
    """Whether `other` holds wherever `clause` does, literal by literal."""
    return all(
        any(
            each.variable == literal.variable
            and each.speculative <= literal.speculative  # what may not run holds less often
            and all(theirs or not ours for ours, theirs in zip(literal.holds, each.holds, strict=True))
            for each in other
        )
        for literal in clause
    )


def in_words(taken: Sequence[Loss], below: Policy) -> str:
    """What one rule takes away, in one sentence."""
    name = taken[0].rule
    what = "the default" if name == DEFAULT_RULE else f"rule '{name}'"
    parts = []
    for loss in taken:
        waits = "no longer wait" if len(loss.forwards) > 1 else "no longer waits"
        of = "the default" if loss.of == DEFAULT_RULE else f"rule '{loss.of}'"
        parts.append(
            f"{' and '.join(loss.forwards)} {waits} for D2H work on the SMs with {loss.example()} ({of} of "
            f"the {below.layer(loss.of)} makes {'them' if len(loss.forwards) > 1 else 'it'} wait)"
        )
    return f"{what} takes {'a fence' if len(taken) == 1 else 'fences'} away: {'; '.join(parts)}"


def lost_here(policy: Policy, facts: Facts, *, backend: str) -> tuple[str, ...]:
    """The forwards that wait on this server for some write without the user's file, and with it need not."""
    if policy.below is None or all(origin.layer != USER for origin in policy.origins.values()):
        return ()
    before, after = (decide(each, facts, backend=backend) for each in (policy.below, policy))
    if [(each.when, each.fence_forward) for each in before.routes] == [
        (each.when, each.fence_forward) for each in after.routes
    ]:
        return ()
    return tuple(
        each for each in before.fences() if any(each not in route.fence_forward for route in after.routes)
    )


def _word(value: FactValue) -> str:
    return "unknown" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
