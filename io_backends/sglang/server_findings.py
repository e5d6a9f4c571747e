"""What ``hicache-io doctor`` says of one server: whose backend writes back, and beside which kernels."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.version import Version

from sglang_hicache.io_backends.registry import UPSTREAM_NAMES
from sglang_hicache.io_backends.sglang.dry_run import Server
from sglang_hicache.io_backends.sglang.findings import BAD, OK, WARNING, Finding
from sglang_hicache.policy import serving
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.layers import Policy
from sglang_hicache.policy.match import FORWARDS_OF


def server(asked: Server, policy: Policy) -> Iterator[Finding]:
    """Whether that server would run safely: by whose backend, and beside which kernels."""
    facts = asked.facts
    if not asked.hicache:
        yield Finding("server", OK, "HiCache is off: nothing is written back")
        return
    running = ", ".join(
        f"{name.partition('_')[0]} {facts[name]}" for name in FORWARDS_OF if facts.value(name)
    )
    yield Finding("server", OK, f"{running} on {facts['gpu_arch']}; --hicache-io-backend {asked.backend}")
    if asked.backend in UPSTREAM_NAMES:
        yield from _upstream_server(asked.backend, facts)
        return
    decision = decide(policy, facts, backend=asked.backend)
    refused = serving.refusal(decision, facts, backend=asked.backend)
    if refused is not None:
        yield Finding("server", BAD, f"would not start: {refused}")
        return
    open_forwards = [forward for forward in fa3_forwards(facts) if forward not in decision.fences()]
    if open_forwards:
        yield Finding(
            "server",
            BAD,
            f"{' and '.join(open_forwards)} run fa3 on sm90 and do not wait for D2H work on the SMs "
            f"(#20611): rule {decision.rule} of {decision.policy}",
            "list them in fence_forward, or use the shipped policy",
        )
    else:
        fences = "+".join(decision.fences()) or "none"
        yield Finding(
            "server", OK, f"{decision.backend}, forwards that wait: {fences}, by rule {decision.rule}"
        )


def _upstream_server(backend: str, facts: Facts) -> Iterator[Finding]:
    """SGLang's own backends, against what is reported of them."""
    advice = "start with --hicache-io-backend auto"
    fa3 = fa3_forwards(facts)
    if backend == "kernel" and fa3:
        yield Finding(
            "server",
            BAD,
            f"{' and '.join(fa3)} run fa3 on sm90 beside SGLang's own kernel, and nothing makes them wait: "
            "illegal memory access within 20 minutes (#20611, 8xH100; also #19737, #18785, #14363)",
            advice,
        )
    on_blackwell = {str(facts.value(name)) for name in FORWARDS_OF} & {"dsa", "nsa"}
    if backend == "kernel" and facts.value("gpu_arch") == "sm103" and on_blackwell:
        yield Finding(
            "server",
            BAD,
            "dsa attention on B300 with SGLang's own kernel: TP hangs, cured by making forwards wait for D2H "
            "(#38300, open; 2xB300)",
            advice,
        )
    version = facts.value("sglang")
    if version is not None and Version(str(version)) < Version("0.5.23"):
        yield Finding(
            "server",
            WARNING,
            f"SGLang {version} does not make D2H wait for the forward that writes the rows (0.5.23 does)",
            advice,
        )


def fa3_forwards(facts: Facts) -> list[str]:
    """The forwards that run fa3 on sm90, extend first; none elsewhere."""
    if facts.value("gpu_arch") != "sm90":
        return []
    found = [
        forward
        for name, forwards in FORWARDS_OF.items()
        if facts.value(name) == "fa3"
        for forward in forwards
    ]
    return sorted(set(found), reverse=True)
