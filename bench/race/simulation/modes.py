"""The ways in which a server runs forwards and asks for writes, as ``hicache-io race --mode`` names them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .cache import Setup
from .decode_server import (
    Offload,
    Retraction,
    SynchronizeOffload,
    SynchronizeRetraction,
)
from .loops import (
    NoOverlap,
    Pipeline,
    Synchronize,
    SynchronizeNoOverlap,
    SynchronizePipeline,
)
from .scheduler import Scheduler
from .speculative import Speculative, SynchronizeSpeculative
from .states import States, SynchronizeStates


@dataclass(frozen=True, slots=True)
class ServingMode:
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


MODES: dict[str, ServingMode] = {
    "overlap": ServingMode(Scheduler, Synchronize),
    "pipeline": ServingMode(Pipeline, SynchronizePipeline),
    "synchronize": ServingMode(Synchronize, Synchronize),
    "offload": ServingMode(Offload, SynchronizeOffload, {"offload": True, "draft": False}),
    "retraction": ServingMode(Retraction, SynchronizeRetraction),
    "no-overlap": ServingMode(NoOverlap, SynchronizeNoOverlap),
    "speculative": ServingMode(Speculative, SynchronizeSpeculative, {"eagle": True}),
    "states": ServingMode(States, SynchronizeStates, {"states": "extra_buffer", "draft": False}),
}
