"""What is odd about a policy that can be used: `policy validate` says it; a server starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..classes import CannotCompareError
from ..fact_table import CONDITIONS
from ..unfenced import Loss, in_words, losses
from .layers import DEFAULT_RULE, Origin, Policy, covered


@dataclass(frozen=True)
class PolicyWarning:
    """A sentence, and the rule's place."""

    origin: Origin
    message: str

    def __str__(self) -> str:
        return f"{self.origin.source}:{self.origin.line}:{self.origin.column}: warning: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """The parts and the whole, as plain JSON types."""
        at = self.origin
        return {
            "filename": at.source,
            "line": at.line,
            "column": at.column,
            "message": self.message,
            "text": str(self),
        }


def warnings(policy: Policy) -> list[PolicyWarning]:
    """What is odd about `policy`, in the order of its rules."""
    names = [*(rule.name for rule in policy.rules), "default"]
    found = sorted(_found(policy), key=lambda each: names.index(each[0]))
    return [PolicyWarning(policy.origins[name], message) for name, message in found]


def _found(policy: Policy) -> Iterator[tuple[str, str]]:
    yield from _taken_away(policy)
    for name, earlier in covered(policy).items():
        yield name, f"rule '{name}' is never reached any more: rule '{earlier}' matches whenever it does"
    for rule in policy.rules:
        for key, values in rule.when.written().items():
            for asked in values:
                fact = CONDITIONS[key]
                if isinstance(asked, str) and (said := fact.remark(asked) or fact.doubt(asked)) is not None:
                    yield rule.name, f"{key}: {said}"
        for key in rule.when.written().keys() - rule.unknown_matches():
            if rule.use.fence_forward and (hidden := CONDITIONS[key].hidden):
                missing = f"{key} may be unknown ({hidden}), and then this rule's fences are missing"
                yield rule.name, f"{missing}: say unknown: [{key}]"
    for name, use in [*((rule.name, rule.use) for rule in policy.rules), ("default", policy.default.use)]:
        spec = policy.backends[use.backend]
        for option in spec.options or ():
            value = use.options.get(option.name)
            if option.ample is not None and isinstance(value, int) and value > option.ample:
                yield name, f"{option.name} {value:,} {option.ample_because}"


def _taken_away(policy: Policy) -> Iterator[tuple[str, str]]:
    """Fences of the layers below that a user's file does without, which is for its author to decide."""
    if policy.below is None:
        return
    by_rule: dict[str, list[Loss]] = {}
    unsure = None
    try:
        for loss in losses(policy.below, policy):
            by_rule.setdefault(loss.rule, []).append(loss)
    except CannotCompareError as error:
        unsure = error
    for name, taken in by_rule.items():
        yield name, in_words(taken, policy.below)
    if unsure is not None:
        first = policy.rules[0].name if policy.rules else DEFAULT_RULE
        yield (
            first,
            f"whether this policy takes {'more' if by_rule else 'a fence'} away is not known: {unsure}",
        )
