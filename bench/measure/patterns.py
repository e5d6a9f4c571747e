"""The forwards of ``bench sustained``: how long each runs, and how many tokens' rows it leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from .overlap import WARM_CYCLES, ForwardStep

PATTERNS: Mapping[str, tuple[ForwardStep, ...]] = {
    # A prefill-only server: SGLang's chunk on an H100, and a short one. 350 ms: Qwen3-8B at about 60 % of an
    # H100's dense bf16 peak (2 x 8.2e9 operations a token, and attention over a long context).
    "prefill 350 ms": (ForwardStep(350, 8192),),
    "prefill 100 ms": (ForwardStep(100, 2048),),
    # Nearly all that the link takes: 48 GB/s of Qwen3-8B.
    "prefill 25 ms": (ForwardStep(25, 8192),),
    # A prefill among decode steps, each of which ends a request of 64 new tokens.
    "mixed": (ForwardStep(150, 4096), *(ForwardStep(11, 64, decode=True),) * 12),
}
"""By name; a pattern is repeated."""

LEAST_CYCLES = WARM_CYCLES + 5


def whole_pages(pattern: Iterable[ForwardStep], page: int) -> tuple[ForwardStep, ...]:
    """The pattern with tokens rounded up to pages, which are all that HiCache writes."""
    return tuple(replace(step, tokens=-(-step.tokens // page) * page) for step in pattern)
