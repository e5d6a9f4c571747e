"""The ways in which a server runs forwards and asks for writes, as ``hicache-io race --mode`` names them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from sglang_hicache.io_backends.sglang.simulation.cache import Setup
from sglang_hicache.io_backends.sglang.simulation.decode_server import (
    Offload,
    Retraction,
    SynchronizeOffload,
    SynchronizeRetraction,
)
from sglang_hicache.io_backends.sglang.simulation.loops import (
    NoOverlap,
    Pipeline,
    Synchronize,
    SynchronizeNoOverlap,
    SynchronizePipeline,
)
from sglang_hicache.io_backends.sglang.simulation.scheduler import Scheduler
from sglang_hicache.io_backends.sglang.simulation.speculative import Speculative, SynchronizeSpeculative


@dataclass(frozen=True, slots=True)
class Mode:
    """One of them.

    Attributes:
        scheduler: its loop.
        with_callers: the same loop, and callers that wait for writes at any time.
        setup: what it needs of a :class:`~.cache.Setup`.
    """

    scheduler: type[Scheduler]
    with_callers: type[Scheduler]
    setup: dict[str, Any] = field(default_factory=dict)

    def setup_of(self, setup: Setup) -> Setup:
        return replace(setup, **self.setup)


MODES: dict[str, Mode] = {
    "overlap": Mode(Scheduler, Synchronize),
    "pipeline": Mode(Pipeline, SynchronizePipeline),
    "synchronize": Mode(Synchronize, Synchronize),
    "offload": Mode(Offload, SynchronizeOffload, {"offload": True, "draft": False}),
    "retraction": Mode(Retraction, SynchronizeRetraction),
    "no-overlap": Mode(NoOverlap, SynchronizeNoOverlap),
    "speculative": Mode(Speculative, SynchronizeSpeculative, {"eagle": True}),
}
