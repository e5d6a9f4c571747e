"""A batch of the modelled scheduler, and how it makes batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class ScheduleBatch:
    """``ScheduleBatch``: the requests of one forward, and which tokens of each it computes.

    ``states`` is what SGLang's batch keeps of the states of linear layers, where a model has any.
    """

    forward_mode: Any
    requests: list[Any]
    spans: list[tuple[int, int]]
    decoding: Sequence[Any] = ()
    chunked: Any = None
    hicache_consumer_index: int = -1
    sampled: list[list[int]] = field(default_factory=list)
    copy_done: Any = None
    read_done: Any = None
    states: Any = None


@dataclass(frozen=True, slots=True)
class Options:
    """How the scheduler schedules.

    Attributes:
        chunk: tokens of a prefill chunk; 0: prompts are not cut.
        mixed: prefill batches take the decoding requests along (``--enable-mixed-chunk``).
        exclusive: of ``extend`` and ``decode``, the forwards that must not share the SMs with write-back
        work.
        forward_ms: model time of a forward that computes so many tokens, for timelines.
    """

    chunk: int
    mixed: bool
    exclusive: frozenset[str] = frozenset()
    forward_ms: Callable[[str, int], float] | None = None
