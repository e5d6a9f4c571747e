"""Whether a rule's conditions on the server hold, and which forwards ``uses`` means. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from .conditions import Condition
from .fact_table import ANY_ATTENTION, FORWARDS_OF, SERVER_FACTS
from .facts import Facts
from .format.schema import Default, Rule
from .format.validators import USES
from .names import FORWARDS, NO_SPECULATION


@dataclass(frozen=True)
class Match:
    """Whether the server conditions of a rule hold.

    ``unknown`` names the unknown facts that alone kept them from doing so; ``assumed`` those that counted as
    matching, because the rule says so.
    """

    matched: bool
    reason: str
    unknown: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


def match(rule: Rule, facts: Facts) -> Match:
    """Whether every condition of `rule` on the server holds. An unknown fact fails the conditions on it,
    unless the rule says ``unknown: match`` for them.
    """
    held, failed = [], []
    unknown: list[str] = []
    assumed: list[str] = []
    only_unknown = True
    written = rule.when.written()
    tolerated = rule.unknown_matches()
    for key, condition in rule.when.server_conditions().items():
        names = facts_of(key, facts)
        holding = [name for name in names if _holds(condition, facts, name)]
        missing = [name for name in names if facts.value(name) is None]
        if holding:
            held.append(" and ".join(f"{name} is {facts[name]}" for name in holding))
        if missing and key in tolerated:
            assumed += missing
            held.append(f"{' and '.join(missing)} unknown, which this rule counts as a match")
        elif not holding:
            wanted = " or ".join(word_of(value) for value in written[key])
            failed.append(
                ", ".join(f"{name} is {facts[name]}" for name in names) + f" (the rule wants {wanted})"
            )
            unknown += missing
            only_unknown = only_unknown and bool(missing)
    if failed:
        return Match(False, "; ".join(failed), tuple(dict.fromkeys(unknown)) if only_unknown else ())
    return Match(True, "; ".join(held) or "it has no condition on the server", assumed=tuple(assumed))


def facts_of(key: str, facts: Facts) -> tuple[str, ...]:
    """The facts that condition `key` is about; it holds when one of them satisfies it.

    ``attention_backend`` means every attention backend that runs: verification and draft do only with
    speculative decoding, and might when it is unknown whether that is on.
    """
    if key != ANY_ATTENTION.name:
        return (key,)
    without = facts.value("speculative") == NO_SPECULATION
    return tuple(name for name in FORWARDS_OF if not (without and SERVER_FACTS[name].speculative_only))


def resolve_fences(chosen: Rule | Default, facts: Facts) -> tuple[str, ...]:
    """The forwards that wait under `chosen`, with ``uses`` written out, in the order of `FORWARDS`."""
    listed = set(chosen.use.fence_forward)
    if USES in listed and isinstance(chosen, Rule):
        listed |= _using_forwards(chosen, facts)
    return tuple(forward for forward in FORWARDS if forward in listed)


def word_of(value: int | str | bool) -> str:
    """A value as a policy file says it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _using_forwards(rule: Rule, facts: Facts) -> set[str]:
    """The forwards that run an attention backend which the rule names.

    ``attention_backend`` speaks for all of them; without it, each backend's own condition does. An unknown
    backend is one that the rule names where the rule counts unknown as a match, else not.
    """
    conditions = rule.when.server_conditions()
    tolerated = rule.unknown_matches()
    using: set[str] = set()
    for name in facts_of(ANY_ATTENTION.name, facts):
        key = ANY_ATTENTION.name if ANY_ATTENTION.name in conditions else name
        if key not in conditions:
            continue
        might = facts.value(name) is None and key in tolerated
        if might or _holds(conditions[key], facts, name):
            using.update(FORWARDS_OF[name])
    return using


def _holds(condition: Condition, facts: Facts, name: str) -> bool:
    value = facts.value(name)
    return value is not None and condition.holds(value)
