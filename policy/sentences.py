"""What a decision means, in sentences for operators."""

from __future__ import annotations

from .backend_spec import Backends, SmWork, spec_of
from .decide import Decision
from .fact_table import ANY_ATTENTION, ATTENTION_FACTS, CONDITIONS
from .facts import Facts
from .format.layers import DEFAULT_RULE, OPTION, SHIPPED, Policy
from .names import NO_SPECULATION, UPSTREAM_NAMES
from .routes import WriteRoute, writes_in_words

# What operators call the forwards; extend is SGLang's name for prefill, chunked or not.
_FORWARD_WORDS = {"extend": "prefill (extend)", "decode": "decode"}
_PRODUCER = "D2H waits, on the GPU, for the forward that writes the rows."


def backend_sentence(decision: Decision) -> str:
    """Which backend moves which writes."""
    if len(decision.routes) == 1:
        return decision.backend
    *conditional, last = decision.routes
    parts = [f"{writes_in_words(route.when)}: {route.backend}" for route in conditional]
    return "; ".join([*parts, f"others: {last.backend}"])


def fence_sentence(decision: Decision, backends: Backends) -> str:
    """Which forwards wait for what."""
    if decision.backend in UPSTREAM_NAMES:
        return "No fence of this project: SGLang's own behaviour, untouched."
    if not decision.fences():
        return f"No forward waits: compute and write-back overlap fully. {_PRODUCER}"
    sentences = list(dict.fromkeys(_route_sentence(route, backends) for route in decision.routes))
    if len(sentences) > 1:
        sentences = [
            f"{route.backend} ({'others' if not route.when else writes_in_words(route.when)}): "
            f"{_route_sentence(route, backends)}"
            for route in decision.routes
        ]
    return " ".join([*sentences, _PRODUCER])


def memory_sentence(decision: Decision, backends: Backends) -> str | None:
    """GPU memory that the decision takes; None where it takes none."""
    staging: dict[str, list[str]] = {}
    # As many as there are instances.
    instances = {
        (route.backend, repr(route.options), route.fence_forward): route for route in decision.routes
    }
    for route in instances.values():
        in_words = spec_of(backends, route.backend).staging
        if in_words is not None:
            staging.setdefault(route.backend, []).append(in_words(route.options, bool(route.fence_forward)))
    return "; ".join(f"{name}'s staging: {', and '.join(each)}" for name, each in staging.items()) or None


def forward_sentences(decision: Decision, facts: Facts, backends: Backends) -> dict[str, str]:
    """For each kind of forward, whether it waits and for what; verification and drafts with speculative
    decoding.
    """
    said = {
        "prefill (extend)": _waits(decision, backends, ("extend",)),
        "decode": _waits(decision, backends, ("decode",)),
    }
    if facts.value("speculative") not in (None, NO_SPECULATION):
        # One step launches all of them, so the scheduler fences it as a whole
        # (io_backends/sglang/scheduler/scheduler_hooks.py).
        step = _waits(decision, backends, ("extend", "decode"))
        said |= {"prefill (extend)": step, "decode": step, "target verify": step, "draft": step}
    return said


def decided_by(decision: Decision, policy: Policy) -> str:
    """Which rule of which layer decided."""
    if not decision.considered:
        return f"{decision.rule}, given by hand"
    origin = policy.origins[decision.rule]
    what = "the default" if decision.rule == DEFAULT_RULE else f"rule {decision.rule}"
    where = f"{what} of the {'shipped policy' if origin.layer == SHIPPED else origin}"
    if len(decision.routes) > 1:
        others = ", ".join(route.rule for route in decision.routes[:-1])
        where += f"; for some writes {others}"
    if decision.rule == DEFAULT_RULE and len(decision.routes) == 1:
        where += ": no rule matched"
    return (
        f"{decision.backend} by hand ({OPTION}), the fences by {where}" if decision.layer == OPTION else where
    )


def upstream_sentence(decision: Decision) -> str:
    """What SGLang itself is told."""
    if decision.backend in UPSTREAM_NAMES:
        return f"io backend {decision.upstream_io_backend}, as asked"
    backends = " and ".join(dict.fromkeys(route.backend for route in decision.routes))
    verb = "do" if len(decision.routes) > 1 and " and " in backends else "does"
    return (
        f"io backend {decision.upstream_io_backend}, for host-to-device copies and for pools that "
        f"{backends} {verb} not support"
    )


def unknown_note(decision: Decision) -> str | None:
    """What rests on unknown facts, and the options that give them; None when nothing does."""
    assumed = {each.rule: each.assumed for each in decision.considered if each.matched and each.assumed}
    passed = decision.might_match()
    notes = []
    if assumed:
        rules = ", ".join(assumed)
        notes.append(f"unknown facts count as a match in {rules}, to be safe: give {_options_for(assumed)}.")
    if passed:
        notes.append(
            f"with more known, another rule might match ({', '.join(passed)}): give {_options_for(passed)}."
        )
    return " ".join(notes) or None


def lost_sentence(lost: tuple[str, ...], policy: Policy) -> str:
    """What a file of the user takes away on one server."""
    verb = "wait" if len(lost) > 1 else "waits"
    return (
        f"{policy.source} takes a fence away here: without it {forwards_in_words(lost)} {verb} for D2H work "
        "on the SMs"
    )


def forwards_in_words(forwards: tuple[str, ...]) -> str:
    """``extend`` and ``decode`` as operators call them, joined."""
    return " and ".join(_FORWARD_WORDS[forward] for forward in forwards)


def _route_sentence(route: WriteRoute, backends: Backends) -> str:
    if not route.fence_forward:
        return "no forward waits."
    who = forwards_in_words(route.fence_forward)
    sm_work = spec_of(backends, route.backend).sm_work
    if sm_work is SmWork.NONE:
        return (
            f"No forward waits for {route.backend}, which has no work on the SMs; {who} would wait for a "
            "pool that falls back to SGLang's own copy."
        )
    verb = "wait" if len(route.fence_forward) > 1 else "waits"
    return f"{who[0].upper()}{who[1:]} {verb}, on the GPU, {_FOR_WHAT[sm_work]}."


_FOR_WHAT = {
    SmWork.GATHER: (
        "for the last gather within GPU memory, not for the copy to the host unless writes outrun it"
    ),
    SmWork.TRANSFER: "for the whole of the last transfer to the host",
    SmWork.UNKNOWN: "for the backend's last work on the SMs",
}


def _waits(decision: Decision, backends: Backends, names: tuple[str, ...]) -> str:
    """Whether a forward that counts as `names` waits."""
    work = [
        spec_of(backends, route.backend).sm_work
        for route in decision.routes
        if set(names) & set(route.fence_forward)
    ]
    for_what = [_FOR_WHAT[each] for each in work if each is not SmWork.NONE]
    if for_what:
        return "waits " + " or ".join(dict.fromkeys(for_what))
    if work:
        return "does not wait; only for a pool that falls back to SGLang's own copy"
    return "does not wait"


def _options_for(unknown: dict[str, tuple[str, ...]]) -> str:
    """The options that give the facts in `unknown`."""
    missing = dict.fromkeys(name for names in unknown.values() for name in names)
    both = {name for name in ATTENTION_FACTS if not CONDITIONS[name].speculative_only} <= missing.keys()
    given = dict.fromkeys(
        ANY_ATTENTION.name if both and name in ATTENTION_FACTS else name for name in missing
    )
    # device has no option: it follows from gpu_arch.
    names = dict.fromkeys("gpu_arch" if name == "device" else name for name in given)
    return ", ".join(CONDITIONS[name].option for name in names)
