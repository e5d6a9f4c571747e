"""What ``hicache-io doctor`` says of one server: whose backend writes back, and beside which kernels.

``bad`` is what is known to break, and a policy that takes away a fence which the shipped one has; what is
plausible and was never seen is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator

from packaging.version import Version

from ....policy.backend_spec import spec_of
from ....policy.decide import Decision, decide
from ....policy.evidence import (
    PRODUCER_FENCE_SINCE,
    Evidence,
    Level,
    beside,
    path_of,
    unfenced,
    upstream_path,
)
from ....policy.fact_table import CONDITIONS, FORWARDS_OF
from ....policy.facts import Facts
from ....policy.format.layers import Policy
from ....policy.names import FORWARDS
from ...policy_files import default_policy
from ...registry import BACKENDS, UPSTREAM_NAMES
from ..pools.host_pools import assigned
from . import serving
from .checks import BAD, NEW_GPU, OK, WARNING, Finding
from .dry_run import Server

_STATUS = {Level.BREAKS: BAD, Level.PLAUSIBLE: WARNING, Level.UNKNOWN: WARNING, Level.NO_REPORT: OK}
_USE_OURS = "start with --hicache-io-backend auto"


def server(asked: Server, policy: Policy) -> Iterator[Finding]:
    """Whether that server would run safely: by whose backend, and beside which kernels."""
    facts = asked.facts
    if asked.not_read is not None:
        yield Finding("server", WARNING, asked.not_read, "its log has what the plug-in decides")
    if not asked.hicache:
        yield Finding("server", OK, "HiCache is off: nothing is written back")
        return
    running = ", ".join(
        f"{name.partition('_')[0]} {facts[name]}" for name in FORWARDS_OF if facts.value(name)
    )
    yield Finding("server", OK, f"{running} on {facts['gpu_arch']}; --hicache-io-backend {asked.backend}")
    ours = asked.backend not in UPSTREAM_NAMES
    if ours and (said := CONDITIONS["gpu_arch"].doubt(facts.value("gpu_arch"))):
        yield Finding("GPU", WARNING, said, NEW_GPU)
    yield from _loads(facts)
    yield from _own_server(asked, policy) if ours else _upstream_server(asked.backend, facts)
    yield from _past_the_fence(asked, ours)


def _loads(facts: Facts) -> Iterator[Finding]:
    """Of loads from the host, which are SGLang's own whoever writes back."""
    if facts.value("mem_layout") == "page_first_direct" and facts.value("page_size") == 1:
        yield Finding(
            "loads",
            WARNING,
            "SGLang loads page_first_direct from the host by a copy for each page and layer. With pages of 1 "
            "a small model answered 3 to 4 chats a second, whoever wrote back, and over 20 with page_first "
            "(H200, docs/benchmarks.md)",
            # SGLang makes page_first with direct page_first_direct again.
            "--hicache-mem-layout page_first with --hicache-io-backend auto or kernel, or larger pages",
        )


def _own_server(asked: Server, policy: Policy) -> Iterator[Finding]:
    """One of this project's backends, with the fences that the policy gives it."""
    facts = asked.facts
    decision = decide(policy, facts, backend=asked.backend)
    refused = serving.refusal(decision, facts, backend=asked.backend)
    if refused is not None:
        yield Finding("server", BAD, f"would not start: {refused}")
        return
    yield from _pools(asked, decision)
    found = list(dict.fromkeys(_open_forwards(decision, facts)))
    shipped = decide(default_policy(), facts, backend=asked.backend)
    taken = [each for each in shipped.fences() if each not in decision.fences()]
    for each in found:
        # Whoever takes a fence away should know that he did, however much is known against it.
        status, lost = _STATUS[each.level], ""
        if taken:
            status, lost = BAD, f", which takes away a fence of the shipped policy ({' and '.join(taken)})"
        yield Finding(
            "server",
            status,
            f"{each}; rule {decision.rule} of {decision.policy}{lost}",
            "list the forwards in fence_forward, or use the shipped policy",
        )
    if not found:
        fences = "+".join(decision.fences()) or "none"
        yield Finding(
            "server", OK, f"{decision.backend}, forwards that wait: {fences}, by rule {decision.rule}"
        )


def _open_forwards(decision: Decision, facts: Facts) -> Iterator[Evidence]:
    """What is known of the forwards that a route leaves open, beside what that route runs."""
    for route in decision.routes:
        spec = spec_of(BACKENDS, route.backend)
        path = path_of(spec, facts)
        if spec.cannot_serve(facts.value("mem_layout"), facts.value("kv_kind")) is not None:
            path = upstream_path("kernel", facts)
        yield from unfenced(facts, path, [each for each in FORWARDS if each not in route.fence_forward])


def _pools(asked: Server, decision: Decision) -> Iterator[Finding]:
    """Who writes which share of what this server writes, as far as its pools are known."""
    if asked.pools_unknown is not None:
        yield Finding("pools", WARNING, f"unknown who writes them: {asked.pools_unknown}")
    for pool in assigned(asked.pools, decision):
        yield Finding("pools", OK if pool.ours else WARNING, pool.in_words())


def _upstream_server(backend: str, facts: Facts) -> Iterator[Finding]:
    """SGLang's own backends, against what is reported of them."""
    for each in beside(facts, upstream_path(backend, facts)):
        advice = "" if each.level is Level.NO_REPORT else _USE_OURS
        yield Finding("server", _STATUS[each.level], str(each), advice)
    version = facts.value("sglang")
    if version is not None and Version(str(version)) < PRODUCER_FENCE_SINCE:
        yield Finding(
            "server",
            WARNING,
            f"SGLang {version} does not make D2H wait for the forward that writes the rows "
            f"({PRODUCER_FENCE_SINCE} does)",
            _USE_OURS,
        )


def _past_the_fence(asked: Server, ours: bool) -> Iterator[Finding]:
    """Writes of a PD decode server that SGLang's own write fence never covers (read in 0.5.18 to 0.5.23)."""
    version = asked.facts["sglang"]
    for about, where in (("decode retraction", asked.retraction), ("decode offload", asked.offload)):
        if where is None:
            continue
        if ours:
            yield Finding(
                about, OK, f"{where}; this plug-in makes every submit_device_to_host wait for the forward"
            )
            continue
        yield Finding(
            about,
            WARNING,
            f"{where}. In SGLang {version} it waits for the scheduler's own stream only, not for the "
            "forward that may still be writing the rows; no wrong rows have been reported of it",
            _USE_OURS,
        )
