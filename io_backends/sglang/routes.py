"""The ways a write may take: backends with the fences of the rule that chose them, tried in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_hicache.io_backends.geometry import PoolGeometry
from sglang_hicache.io_backends.interface import Backend
from sglang_hicache.io_backends.staged_plan import count_runs, drain_entries
from sglang_hicache.policy.routes import WriteFacts

if TYPE_CHECKING:
    from sglang_hicache.policy.decide import Decision


@dataclass(frozen=True, slots=True)
class Route:
    """One way for a write.

    Attributes:
        backend: who moves its bytes.
        forwards: the forwards that wait for its SM-side work.
        holds: which writes take it, of those that took none before.
    """

    backend: Backend
    forwards: frozenset[str]
    holds: Callable[[WriteFacts], bool]

    @property
    def upstream_indices(self) -> bool:
        """Whether the backend calls SGLang's own copy, with indices where that wants them."""
        return bool(getattr(self.backend, "upstream_indices", False))


def one_route(backend: Backend, forwards: Iterable[str] = ()) -> tuple[Route, ...]:
    """Every write by one backend."""
    return (Route(backend, frozenset(forwards), lambda write: True),)


def routes_of(decision: Decision, make: Callable[[str, Any], Backend]) -> tuple[Route, ...]:
    """The decision's routes; those with the same backend and options share one instance.

    Args:
        decision: what the policy decided.
        make: makes a backend from its name and options.
    """
    made: list[tuple[str, dict[str, Any], Backend]] = []

    def backend(name: str, options: dict[str, Any]) -> Backend:
        for known, with_options, instance in made:
            if (known, with_options) == (name, options):
                return instance
        made.append((name, options, make(name, options)))
        return made[-1][2]

    return tuple(
        Route(backend(route.backend, dict(route.options)), frozenset(route.fence_forward), route.holds)
        for route in decision.routes
    )


def write_facts(geometry: PoolGeometry, host_indices: Any) -> WriteFacts:
    """What rules may ask of a write, from its host indices int64 [n] alone: no device index is read."""
    slots = np.asarray(host_indices, dtype=np.int64)
    return WriteFacts(
        tokens=len(slots),
        entries=drain_entries(geometry, slots),
        nbytes=len(slots) * geometry.bytes_per_token,
        runs=count_runs(slots),
    )


def distinct(routes: Sequence[Route]) -> list[Backend]:
    """Every backend of the routes, once."""
    return list({id(route.backend): route.backend for route in routes}.values())
