"""What a server would make of a decision beyond the rules: whether it starts, and who copies the pool."""

from __future__ import annotations

from ....policy.backend_spec import spec_of
from ....policy.decide import Decision
from ....policy.facts import Facts
from ....policy.names import AUTO, UPSTREAM_NAMES
from ...registry import BACKENDS, loading_problem
from ..pools.geometry import NOT_COMPARED, OTHER_KINDS
from ..versions import problem_with, release_of


def refusal(decision: Decision, facts: Facts, *, backend: str) -> str | None:
    """Why a server with these facts and ``--hicache-io-backend backend`` would not start, or None."""
    if decision.backend in UPSTREAM_NAMES:
        return None
    version = facts.value("sglang")
    if version is not None and (problem := problem_with(str(version))) is not None:
        return problem
    for name in dict.fromkeys(route.backend for route in decision.routes):
        if (problem := loading_problem(name)) is not None:
            return f"backend {name} {problem}"
    if backend == AUTO:
        return None
    reason = spec_of(BACKENDS, decision.backend).cannot_serve(
        facts.value("mem_layout"), facts.value("kv_kind")
    )
    return None if reason is None else f"--hicache-io-backend {backend} {reason}"


def other_pools(decision: Decision, facts: Facts) -> dict[str, str]:
    """Kinds of pool that SGLang's own copy writes back whatever the backend, each with the reason; none where
    SGLang copies everything. Without a version among the facts, those of any release.
    """
    if decision.backend in UPSTREAM_NAMES:
        return {}
    version = facts.value("sglang")
    older = version is None or not release_of(str(version)).index_steps
    return dict([*OTHER_KINDS.values(), *(NOT_COMPARED.values() if older else ())])


def fallback(decision: Decision, facts: Facts, *, backend: str) -> str | None:
    """Who copies instead where ``auto`` chose a backend that cannot serve the pool; None if all can."""
    if backend != AUTO:
        return None
    sentences = []
    for route in decision.routes:
        reason = spec_of(BACKENDS, route.backend).cannot_serve(
            facts.value("mem_layout"), facts.value("kv_kind")
        )
        if reason is not None:
            waiting = " and ".join(route.fence_forward) or "no forward"
            sentences.append(
                f"{route.backend} {reason}: SGLang's own copy runs instead, and {waiting} would wait for it"
            )
    return "; ".join(dict.fromkeys(sentences)) or None
