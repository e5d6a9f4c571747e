"""Which rules of a policy take away what the shipped one protects: forwards by FA3 on Hopper, beside SM-side
D2H work (#20611).
"""

from __future__ import annotations

from collections.abc import Iterator

from sglang_hicache.policy.conditions import Condition, Names
from sglang_hicache.policy.fields import USES
from sglang_hicache.policy.layers import DEFAULT_RULE, Policy
from sglang_hicache.policy.match import FORWARDS_OF, SPECULATIVE_ONLY
from sglang_hicache.policy.reach import Reach, never_matches, shadows
from sglang_hicache.policy.schema import Use
from sglang_hicache.policy.vocabulary import NO_SPECULATION, SPECULATIVE

_EITHER = "attention_backend"
_WHERE = {"gpu_arch": Names.of("gpu_arch", ["sm90"]), "device": Names.of("device", ["cuda"])}
# Verification and drafts run their backends only then.
_SPECULATING = {"speculative": Names.of("speculative", set(SPECULATIVE) - {NO_SPECULATION})}


def unprotected(policy: Policy) -> Iterator[tuple[str, str]]:
    """Each rule (or "default") that decides for some server with fa3 on sm90 and leaves a forward that runs
    it unfenced, with a sentence that says so.

    A rule that chooses copy_engine counts too: a pool that copy_engine does not support goes through SGLang's
    own copy, behind the same fences.
    """
    before: list[Reach] = []
    for rule in policy.rules:
        conditions, unknown = rule.when.conditions(), rule.unknown_matches()
        open_forwards = _open(rule.use, conditions, before)
        if open_forwards:
            yield rule.name, _sentence(f"rule '{rule.name}'", open_forwards)
        before.append(Reach(conditions, unknown))
    open_forwards = _open(policy.default.use, {}, before)
    if open_forwards:
        yield DEFAULT_RULE, _sentence("the default", open_forwards)


def _open(use: Use, conditions: dict[str, Condition], before: list[Reach]) -> list[str]:
    """The forwards that such a rule leaves unfenced on some server where they run fa3 on sm90."""
    found = []
    for fact, forwards in FORWARDS_OF.items():
        fa3 = Names.of(fact, ["fa3"])
        wanted = {**_WHERE, fact: fa3, **(_SPECULATING if fact in SPECULATIVE_ONLY else {})}
        met = {
            key: _both(conditions[key], each) if key in conditions else each for key, each in wanted.items()
        }
        server = Reach({**conditions, **met})
        if never_matches(server.conditions) or any(shadows(each, server) for each in before):
            continue
        named = conditions.get(_EITHER) or conditions.get(fact)
        uses = USES in use.fence_forward and named is not None and named.holds("fa3")
        found += [forward for forward in forwards if not uses and forward not in use.fence_forward]
    return list(dict.fromkeys(found))


def _both(stated: Condition, wanted: Names) -> Names:
    """What both accept."""
    return Names(wanted.key, frozenset(value for value in wanted.values if stated.holds(value)))


def _sentence(what: str, forwards: list[str]) -> str:
    return (
        f"{what} lets {' and '.join(forwards)} by fa3 on sm90 run beside D2H work on the SMs: "
        "fence_forward does not list them, and the shipped policy does (#20611)"
    )
