"""From facts and a backend's name to an experiment."""

from __future__ import annotations

from dataclasses import replace

from ....policy.decide import Decision
from ....policy.facts import Facts
from ....policy.names import FORWARDS
from ..kept_fences import KeptFences
from .cache import Cache, Setup
from .experiment import Experiment
from .forward import is_exclusive
from .modes import MODES

LAYOUTS = ("layer_first", "page_first", "page_first_direct")
"""Host layouts whose copies have stand-ins."""


def exclusive_forwards(facts: Facts) -> tuple[str, ...]:
    """The forwards that were reported to crash beside SM-side write-back work."""
    backends = {
        "extend": facts.value("prefill_attention_backend"),
        "decode": facts.value("decode_attention_backend"),
    }
    return tuple(name for name in FORWARDS if is_exclusive(backends[name], facts.value("gpu_arch")))


def fenced(decision: Decision, fences: KeptFences) -> Decision:
    """``decision``, with every forward waiting unless the policy is what is looked at."""
    if fences == KeptFences.auto:
        return decision
    return replace(
        decision,
        fence_forward=FORWARDS,
        routes=tuple(replace(route, fence_forward=FORWARDS) for route in decision.routes),
    )


def setup_of(facts: Facts, io_backend: str) -> Setup:
    """What is simulated for these facts, SGLang itself being told ``io_backend``."""
    layout = str(facts.value("mem_layout"))
    return Setup(
        kv_kind=str(facts.value("kv_kind")),
        mem_layout=layout,
        page_size=int(str(facts.value("page_size"))),
        gpu_arch=str(facts.value("gpu_arch")),
        # SGLang makes the same of it (arg_groups/hicache_hook.py).
        io_backend="direct" if layout == "page_first_direct" else io_backend,
    )


def experiment(
    facts: Facts,
    decision: Decision | None,
    fences: KeptFences,
    io_backend: str = "kernel",
    mode: str = "overlap",
) -> Experiment:
    """Builds SGLang's cache, which takes a moment, and what is to be done to it."""
    chosen = MODES[mode]
    cache = Cache(chosen.setup_of(setup_of(facts, io_backend)))
    return Experiment(
        cache,
        None if decision is None else fenced(decision, fences),
        exclusive_forwards(facts),
        chosen.scheduler,
    )
