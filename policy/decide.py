"""From a policy and facts to a `Decision`. Pure: no file, no device, no environment is read here.

The decision is made once, where the server's options are resolved, and travels to the schedulers as the plain
dict of `Decision.to_dict`, so that every process of a server follows the same one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from sglang_hicache.io_backends.registry import AUTO, UPSTREAM_NAMES, available_backends
from sglang_hicache.policy.conditions import Condition, Names
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.fields import USES
from sglang_hicache.policy.schema import Default, Policy, Rule, Use, When
from sglang_hicache.policy.vocabulary import FORWARDS, check_name

# The option that a person types to choose a backend by hand.
OPTION = "--hicache-io-backend"


@dataclass(frozen=True)
class Considered:
    """One rule that was looked at, whether it matched, and why or why not."""

    rule: str
    matched: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """What runs, which forwards wait, and why.

    ``rule`` is the name of the rule that decided, "default", or the option given by hand.
    ``upstream_io_backend`` is what SGLang itself is told, for host-to-device copies and for pools that
    ``backend`` does not support. ``facts`` is `Facts.to_dict`, ``considered`` holds the rules up to the first
    match, ``policy`` says which policy.
    """

    backend: str
    fence_forward: tuple[str, ...]
    options: Mapping[str, Any]
    rule: str
    because: str
    upstream_io_backend: str
    facts: Mapping[str, Mapping[str, Any]]
    considered: tuple[Considered, ...]
    policy: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "backend": self.backend,
            "fence_forward": list(self.fence_forward),
            "options": dict(self.options),
            "rule": self.rule,
            "because": self.because,
            "upstream_io_backend": self.upstream_io_backend,
            "facts": {name: dict(fact) for name, fact in self.facts.items()},
            "considered": [
                {"rule": each.rule, "matched": each.matched, "reason": each.reason}
                for each in self.considered
            ],
            "policy": self.policy,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Decision:
        """The inverse of `to_dict`. Raises KeyError or TypeError for anything else."""
        return cls(
            backend=data["backend"],
            fence_forward=tuple(data["fence_forward"]),
            options=dict(data["options"]),
            rule=data["rule"],
            because=data["because"],
            upstream_io_backend=data["upstream_io_backend"],
            facts={name: dict(fact) for name, fact in data["facts"].items()},
            considered=tuple(Considered(**each) for each in data["considered"]),
            policy=data["policy"],
        )


@dataclass(frozen=True)
class Match:
    """Whether a ``when`` holds. ``unknown`` names the unknown facts that alone kept it from doing so."""

    matched: bool
    reason: str
    unknown: tuple[str, ...] = ()


def decide(policy: Policy, facts: Facts, *, backend: str = AUTO) -> Decision:
    """What to do on a server of which `facts` are known.

    `backend` is what ``--hicache-io-backend`` says: ``auto`` asks the policy; any other name keeps that
    backend, and takes from the policy at most the fences. Raises NameProblem for a name that is no backend.
    """
    check_backend(backend)
    if backend in UPSTREAM_NAMES:
        return _upstream(backend, facts, policy.source)
    if backend == "fenced_kernel":
        because = (
            f"{OPTION} fenced_kernel was given by hand: it moves every byte with SM work, and every "
            "forward waits for it, whatever the rules say"
        )
        return _decision(
            policy,
            facts,
            Use(backend=backend, fence_forward=FORWARDS),
            because,
            (),
            rule=f"{OPTION} {backend}",
        )
    chosen, considered = first_match(policy, facts)
    name = chosen.name if isinstance(chosen, Rule) else "default"
    fences = resolve_fences(chosen, facts)
    if backend == AUTO:
        use = chosen.use.model_copy(update={"fence_forward": fences})
        return _decision(policy, facts, use, chosen.because, considered, rule=name)
    source = f"rule '{name}'" if isinstance(chosen, Rule) else "the policy's default"
    because = f"{OPTION} {backend} was given by hand; which forwards wait is from {source}: {chosen.because}"
    options = chosen.use.options if chosen.use.backend == backend else {}
    use = Use(backend=backend, fence_forward=fences, options=options)
    return _decision(policy, facts, use, because, considered, rule=name)


def check_backend(name: str) -> str:
    """`name` if ``--hicache-io-backend`` takes it. Raises NameProblem otherwise, with the nearest name that
    it does.
    """
    return check_name("backend", name, (AUTO, *available_backends(), *UPSTREAM_NAMES))


def first_match(policy: Policy, facts: Facts) -> tuple[Rule | Default, tuple[Considered, ...]]:
    """The first rule that matches, or the default; and every rule looked at until then, with the default."""
    considered: list[Considered] = []
    for rule in policy.rules:
        found = match(rule.when, facts)
        considered.append(Considered(rule.name, found.matched, found.reason))
        if found.matched:
            return rule, tuple(considered)
    considered.append(
        Considered("default", True, "no rule matched" if policy.rules else "there are no rules")
    )
    return policy.default, tuple(considered)


def match(when: When, facts: Facts) -> Match:
    """Whether every condition of `when` holds. An unknown fact fails the conditions on it."""
    held, failed, unknown = [], [], []
    only_unknown = True
    for key, condition in when.conditions().items():
        wanted = " or ".join(map(str, when.written()[key]))
        names = _facts_of(key)
        values = {name: facts.value(name) for name in names}
        holding = [name for name, value in values.items() if value is not None and condition.holds(value)]
        missing = [name for name, value in values.items() if value is None]
        if holding:
            held.append(" and ".join(f"{name} is {values[name]}" for name in holding))
            continue
        failed.append(", ".join(f"{name} is {facts[name]}" for name in names) + f" (the rule wants {wanted})")
        unknown += missing
        only_unknown = only_unknown and bool(missing)
    if failed:
        return Match(False, "; ".join(failed), tuple(dict.fromkeys(unknown)) if only_unknown else ())
    return Match(True, "; ".join(held) or "it has no condition")


def resolve_fences(chosen: Rule | Default, facts: Facts) -> tuple[str, ...]:
    """The forwards that wait under `chosen`, with ``uses`` written out, in the order of `FORWARDS`."""
    listed = set(chosen.use.fence_forward)
    if USES in listed and isinstance(chosen, Rule):
        listed |= _using_forwards(chosen.when.conditions(), facts)
    return tuple(forward for forward in FORWARDS if forward in listed)


def describe(decision: Decision) -> str:
    """The one line that each scheduler logs: backend, fences, rule, and why in short."""
    fences = "+".join(decision.fence_forward) or "none"
    why = textwrap.shorten(decision.because, 160, placeholder=" ...")
    return (
        f"hicache-io: D2H backend {decision.backend}, forwards that wait: {fences}, "
        f"by rule {decision.rule} ({decision.policy}): {why}"
    )


def _facts_of(key: str) -> tuple[str, ...]:
    """The facts that a condition is about; it holds when one of them satisfies it."""
    if key == "attention_backend":
        return ("prefill_attention_backend", "decode_attention_backend")
    return (key,)


def _using_forwards(conditions: Mapping[str, Condition], facts: Facts) -> set[str]:
    """The forwards whose effective attention backend the rule names.

    ``attention_backend`` speaks for both forwards; without it, each forward's own condition does. An unknown
    backend is not one the rule names.
    """
    using = set()
    for forward, fact in zip(FORWARDS, _facts_of("attention_backend"), strict=True):
        condition = conditions.get("attention_backend") or conditions.get(fact)
        value = facts.value(fact)
        if isinstance(condition, Names) and value is not None and condition.holds(value):
            using.add(forward)
    return using


def _decision(
    policy: Policy, facts: Facts, use: Use, because: str, considered: tuple[Considered, ...], *, rule: str
) -> Decision:
    # SGLang turns `kernel` into `direct` for this layout itself (0.5.23, arg_groups/hicache_hook.py); saying
    # so here keeps its warning out of the log.
    upstream = "direct" if facts.value("mem_layout") == "page_first_direct" else "kernel"
    return Decision(
        backend=use.backend,
        fence_forward=tuple(use.fence_forward),
        options=dict(use.options),
        rule=rule,
        because=because,
        upstream_io_backend=upstream,
        facts=facts.to_dict(),
        considered=considered,
        policy=policy.source,
    )


def _upstream(backend: str, facts: Facts, source: str) -> Decision:
    """SGLang's own backend: nothing of this project runs; the text says which fences SGLang has itself."""
    because = (
        f"{backend} is SGLang's own and runs untouched: no rule of a policy applies and this project adds "
        "no fence. "
        f"{_producer_fence(facts.value('sglang'))} No released SGLang makes a forward wait for D2H "
        "(#20611 and #38463 were closed unmerged)."
    )
    return Decision(
        backend=backend,
        fence_forward=(),
        options={},
        rule=f"{OPTION} {backend}",
        because=because,
        upstream_io_backend=backend,
        facts=facts.to_dict(),
        considered=(),
        policy=source,
    )


def _producer_fence(sglang: object) -> str:
    """Whether that SGLang makes D2H wait for the forward that writes the rows (`write_fence_stream`, from
    0.5.23).
    """
    try:
        known = Version(str(sglang)) if sglang is not None else None
    except InvalidVersion:
        known = None
    if known is None:
        return "D2H waits for the forward only in SGLang 0.5.23 and later; the version here is unknown."
    has = "waits" if known >= Version("0.5.23") else "does not wait"
    return f"In SGLang {sglang}, D2H {has} for the forward that writes the rows (it does from 0.5.23 on)."
