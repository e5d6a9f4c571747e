"""From a policy and facts to a `Decision`. Pure: no file, no device, no environment is read here.

The decision is made once, where the server's options are resolved, and travels to the schedulers as the plain
dict of `Decision.to_dict`, so that every process of a server follows the same one. What rules ask of single
writes stays open in it, as `Decision.routes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from packaging.version import InvalidVersion, Version

from .backend_spec import Backends, SmWork
from .evidence import PRODUCER_FENCE_SINCE, beside, upstream_path
from .facts import Facts
from .format.layers import DEFAULT_RULE, OPTION, SHIPPED, Policy
from .format.schema import Default, Rule
from .match import match, resolve_fences
from .names import AUTO, FORWARDS, UPSTREAM_NAMES, check_name
from .routes import WriteFacts, WriteRoute, writes_in_words
from .text import first_sentence

# The option that a person types to choose a backend by hand.
BACKEND_OPTION = "--hicache-io-backend"


@dataclass(frozen=True)
class Considered:
    """One rule that was looked at, the layer it is from, whether its conditions on the server hold, and why
    or why not. ``writes`` is what it asks of a write, in words, or None where it takes every write.
    ``assumed`` and ``unknown`` are those of `Match`.
    """

    rule: str
    layer: str
    matched: bool
    reason: str
    writes: str | None = None
    assumed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "rule": self.rule,
            "layer": self.layer,
            "matched": self.matched,
            "reason": self.reason,
            "writes": self.writes,
            "assumed": list(self.assumed),
            "unknown": list(self.unknown),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Considered:
        """The inverse of `to_dict`. Raises KeyError or TypeError for anything else."""
        return cls(**{**data, "assumed": tuple(data["assumed"]), "unknown": tuple(data["unknown"])})


@dataclass(frozen=True)
class Decision:
    """What runs, which forwards wait, and why.

    ``routes`` holds the ways for a write, in the order in which they are tried; the last one takes every
    write, and ``backend``, ``fence_forward``, ``options``, ``rule``, ``because`` and ``layer`` are that
    one's. ``rule`` is the name of the rule that decided, "default", or the option given by hand; ``layer`` is
    where it comes from, one of `layers.LAYERS`. ``upstream_io_backend`` is what SGLang itself is told, for
    host-to-device copies and for pools that no route's backend supports. ``facts`` is `Facts.to_dict`,
    ``considered`` holds the rules up to the first that takes every write, ``policy`` says which policy.
    """

    backend: str
    fence_forward: tuple[str, ...]
    options: Mapping[str, Any]
    rule: str
    because: str
    layer: str
    routes: tuple[WriteRoute, ...]
    upstream_io_backend: str
    facts: Mapping[str, Mapping[str, Any]]
    considered: tuple[Considered, ...]
    policy: str

    def route(self, write: WriteFacts) -> int:
        """The index in ``routes`` of the first one that holds for `write`.

        Pure, on the scheduler's thread for every write: 2.2 to 3.8 us through three routes of two conditions
        each, on two shared x86 cores with CPython 3.11 (``python tests/policy/time_route.py``).
        """
        for index, each in enumerate(self.routes):
            if each.holds(write):
                return index
        raise AssertionError("the last route takes every write")

    def might_match(self) -> dict[str, tuple[str, ...]]:
        """Rules that were passed over only because facts are unknown, with those facts."""
        return {each.rule: each.unknown for each in self.considered if each.unknown}

    def fences(self) -> tuple[str, ...]:
        """The forwards that wait for the SM-side work of any route."""
        listed = {forward for route in self.routes for forward in route.fence_forward}
        return tuple(forward for forward in FORWARDS if forward in listed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "backend": self.backend,
            "fence_forward": list(self.fence_forward),
            "options": dict(self.options),
            "rule": self.rule,
            "because": self.because,
            "layer": self.layer,
            "routes": [route.to_dict() for route in self.routes],
            "upstream_io_backend": self.upstream_io_backend,
            "facts": {name: dict(fact) for name, fact in self.facts.items()},
            "considered": [each.to_dict() for each in self.considered],
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
            layer=data["layer"],
            routes=tuple(WriteRoute.from_dict(each) for each in data["routes"]),
            upstream_io_backend=data["upstream_io_backend"],
            facts={name: dict(fact) for name, fact in data["facts"].items()},
            considered=tuple(Considered.from_dict(each) for each in data["considered"]),
            policy=data["policy"],
        )


def decide(policy: Policy, facts: Facts, *, backend: str = AUTO) -> Decision:
    """What to do on a server of which `facts` are known.

    `backend` is what ``--hicache-io-backend`` says: ``auto`` asks the policy; any other name keeps that
    backend for every write, and takes from the policy at most the fences. Raises NameProblem for a name that
    is no backend.
    """
    check_backend(backend, policy.backends)
    if backend in UPSTREAM_NAMES:
        found = map(str, beside(facts, upstream_path(backend, facts)))
        known = " ".join(f"{each[0].upper()}{each[1:]}." for each in found)
        because = (
            f"{backend} is SGLang's own and runs untouched: no rule of a policy applies and this project "
            f"adds no fence. {_producer_fence(facts.value('sglang'))} No released SGLang makes a forward "
            f"wait for D2H (#20611 and #38463 were closed unmerged). {known}"
        )
        return _decision(policy, facts, (_by_hand(backend, because, ()),), (), upstream=backend)
    spec = policy.backends.get(backend)
    if spec is not None and spec.sm_work is SmWork.TRANSFER:
        because = (
            f"{BACKEND_OPTION} {backend} was given by hand: it moves every byte with SM work, and every "
            "forward waits for it, whatever the rules say"
        )
        return _decision(policy, facts, (_by_hand(backend, because, FORWARDS),), ())
    routes, considered = _routes(policy, facts)
    if backend != AUTO:
        routes = (_kept_by_hand(backend, routes),)
    return _decision(policy, facts, routes, considered)


def check_backend(name: str, backends: Backends) -> str:
    """`name` if ``--hicache-io-backend`` takes it. Raises NameProblem otherwise, with the nearest name that
    it does.
    """
    return check_name("backend", name, (AUTO, *backends, *UPSTREAM_NAMES))


def describe_decision(decision: Decision) -> str:
    """The one line that each scheduler logs: backends, fences, rule, why in short, what nobody knows, and
    which rules were passed over for that alone.
    """
    why = first_sentence(decision.because)
    found = Facts.from_dict(decision.facts).doubts()
    doubts = "".join(f" Careful: {name}: {doubt}" for name, doubt in found.items())
    for rule, missing in decision.might_match().items():
        verb = "are" if len(missing) > 1 else "is"
        doubts += f" Careful: rule {rule} was passed over because {' and '.join(missing)} {verb} unknown."
    backends = " or ".join(dict.fromkeys(route.backend for route in decision.routes))
    # A file may extend the shipped policy, and the rule be of that.
    source = SHIPPED if decision.layer == SHIPPED else decision.policy
    return (
        f"hicache-io: D2H backend {backends}, forwards that wait: {'+'.join(decision.fences()) or 'none'}, "
        f"by rule {decision.rule} ({source}): {why}{doubts}"
    )


def _routes(policy: Policy, facts: Facts) -> tuple[tuple[WriteRoute, ...], tuple[Considered, ...]]:
    """The ways for a write, and every rule looked at up to the first that takes all of them."""
    routes: list[WriteRoute] = []
    considered: list[Considered] = []
    for rule in policy.rules:
        found = match(rule, facts)
        on_writes = rule.when.on_writes()
        writes = writes_in_words(on_writes) if on_writes else None
        layer = policy.layer(rule.name)
        considered.append(
            Considered(rule.name, layer, found.matched, found.reason, writes, found.assumed, found.unknown)
        )
        if found.matched:
            routes.append(_route(rule.name, layer, rule, facts))
            if not on_writes:
                return tuple(routes), tuple(considered)
    layer = policy.layer(DEFAULT_RULE)
    reason = "there are no rules" if not policy.rules else "no rule matched"
    if routes:
        reason = "no rule before it takes every write"
    considered.append(Considered(DEFAULT_RULE, layer, True, reason))
    routes.append(_route(DEFAULT_RULE, layer, policy.default, facts))
    return tuple(routes), tuple(considered)


def _route(name: str, layer: str, chosen: Rule | Default, facts: Facts) -> WriteRoute:
    return WriteRoute(
        rule=name,
        layer=layer,
        because=chosen.because,
        backend=chosen.use.backend,
        fence_forward=resolve_fences(chosen, facts),
        options=dict(chosen.use.options),
        when=chosen.when.on_writes() if isinstance(chosen, Rule) else {},
    )


def _by_hand(backend: str, because: str, fences: tuple[str, ...]) -> WriteRoute:
    return WriteRoute(
        rule=f"{BACKEND_OPTION} {backend}",
        layer=OPTION,
        because=because,
        backend=backend,
        fence_forward=fences,
        options={},
        when={},
    )


def _kept_by_hand(backend: str, routes: tuple[WriteRoute, ...]) -> WriteRoute:
    """`backend` for every write, with the fences of the rules that match.

    Where these differ by write, the forwards that any of them lists wait: which write comes is not known
    here.
    """
    last = routes[-1]
    listed = {forward for route in routes for forward in route.fence_forward}
    names = [
        "the policy's default" if route.rule == DEFAULT_RULE else f"rule '{route.rule}'" for route in routes
    ]
    because = (
        f"{BACKEND_OPTION} {backend} was given by hand; which forwards wait is from {', '.join(names)}: "
        f"{last.because}"
    )
    options = next((route.options for route in routes if route.backend == backend), {})
    fences = tuple(forward for forward in FORWARDS if forward in listed)
    return replace(
        last, layer=OPTION, because=because, backend=backend, fence_forward=fences, options=options, when={}
    )


def _decision(
    policy: Policy,
    facts: Facts,
    routes: tuple[WriteRoute, ...],
    considered: tuple[Considered, ...],
    *,
    upstream: str | None = None,
) -> Decision:
    last = routes[-1]
    # SGLang turns `kernel` into `direct` for this layout itself (0.5.23, arg_groups/hicache_hook.py); saying
    # so here keeps its warning out of the log.
    by_layout = "direct" if facts.value("mem_layout") == "page_first_direct" else "kernel"
    return Decision(
        backend=last.backend,
        fence_forward=last.fence_forward,
        options=last.options,
        rule=last.rule,
        because=last.because,
        layer=last.layer,
        routes=routes,
        upstream_io_backend=upstream or by_layout,
        facts=facts.to_dict(),
        considered=considered,
        policy=policy.source,
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
    has = "waits" if known >= PRODUCER_FENCE_SINCE else "does not wait"
    return f"In SGLang {sglang}, D2H {has} for the forward that writes the rows (it does from 0.5.23 on)."
