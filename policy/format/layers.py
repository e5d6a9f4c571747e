"""A policy from one file or several: whose rules come first, and where each one is from.

A file that extends another puts its rules before that one's; a rule with a name that is there already takes
that rule's place instead, so that what was put before it stays before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..backend_spec import Backends
from .reachability import Reach, shadows
from .schema import Default, PolicyFile, Rule
from .validators import PathStep

#: Where a rule, or a whole decision, comes from. Each layer comes before the ones above it here.
SHIPPED, MACHINE, USER, OPTION = LAYERS = ("shipped default", "machine file", "policy file", "option")
#: What the default is called among rules.
DEFAULT_RULE = "default"


@dataclass(frozen=True)
class Origin:
    """Where a rule stands: its layer, the file's name as given, and the place in it."""

    layer: str
    source: str
    line: int
    column: int

    def __str__(self) -> str:
        return self.layer if self.layer == SHIPPED else f"{self.layer} {self.source}:{self.line}"


@dataclass(frozen=True)
class Policy:
    """A policy that passed every check. ``source`` is the file it was read from, or "shipped default";
    ``origins`` says, by rule name and for "default", where each rule comes from; ``below`` is what would be
    in force without this layer, None for the shipped one; ``backends`` are those that it was checked against.
    """

    rules: tuple[Rule, ...]
    default: Default
    source: str
    origins: Mapping[str, Origin]
    backends: Backends = field(repr=False, compare=False)
    below: Policy | None = field(default=None, repr=False, compare=False)

    def layer(self, rule: str) -> str:
        """The layer of the rule of that name, or of "default"."""
        return self.origins[rule].layer


class RuleProblem(ValueError):
    """A rule that is fine alone and not among the others. ``path`` leads to it within its file."""

    def __init__(self, message: str, path: tuple[PathStep, ...]) -> None:
        super().__init__(message)
        self.path = path


def combine(
    file: PolicyFile, source: str, origins: Mapping[str, Origin], base: Policy | None, backends: Backends
) -> Policy:
    """The policy of `file`, which was checked against `backends`, over `base` if it extends one.

    `origins` says where the rules (and the default) of `file` stand. Raises RuleProblem for a rule of `file`
    that can never match behind the rules that come before it; a rule of `base` may be covered, that is what
    extending is for.
    """
    own = {rule.name: rule for rule in file.rules}
    below = base.rules if base else ()
    replaced = {rule.name for rule in below} & own.keys()
    rules = (
        *(rule for rule in file.rules if rule.name not in replaced),
        *(own.get(rule.name, rule) for rule in below),
    )
    reaches = [Reach(rule.when.conditions(), rule.unknown_matches()) for rule in rules]
    for index, rule in enumerate(rules):
        if rule.name not in own:
            continue
        for before in range(index):
            if shadows(reaches[before], reaches[index]):
                why = f"rule '{rules[before].name}' before it matches whenever it does"
                at = next(n for n, each in enumerate(file.rules) if each.name == rule.name)
                raise RuleProblem(f"rule '{rule.name}' can never match: {why}", ("rules", at, "name"))
    default = file.default or (base.default if base else None)
    assert default is not None, "PolicyFile lets no file without a default through that extends nothing"
    return Policy(rules, default, source, {**(base.origins if base else {}), **origins}, backends)


def covered(policy: Policy) -> dict[str, str]:
    """Rules that can never match because one of another file covers them, each with that rule's name."""
    reaches = [(rule.name, Reach(rule.when.conditions(), rule.unknown_matches())) for rule in policy.rules]
    found: dict[str, str] = {}
    for index, (name, reach) in enumerate(reaches):
        earlier = next((before for before, each in reaches[:index] if shadows(each, reach)), None)
        if earlier is not None:
            found[name] = earlier
    return found
