"""The ways a write may take: backends with the fences of the rule that chose them, tried in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..policy.routes import WriteFacts
from .interface import Backend
from .plan.geometry import PoolGeometry
from .plan.staged_write import copies_to_drain, count_runs

if TYPE_CHECKING:
    from ..policy.decide import Decision


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
        return self.backend.upstream_indices


def one_route(backend: Backend, forwards: Iterable[str] = ()) -> tuple[Route, ...]:
    """Every write by one backend."""
    return (Route(backend, frozenset(forwards), lambda write: True),)


def routes_of(decision: Decision, make: Callable[[str, Any], Backend]) -> tuple[Route, ...]:
    """The decision's routes; those with the same backend, options and fences share one instance.

    Not those with other fences: an instance does its writes in turn, so that a forward which waits for one
    would wait for the others too, or not for chunks of its own that another write has made room for.

    Args:
        decision: what the policy decided.
        make: makes a backend from its name and options.
    """
    made: list[tuple[tuple[str, dict[str, Any], frozenset[str]], Backend]] = []

    def backend(name: str, options: dict[str, Any], forwards: frozenset[str]) -> Backend:
        key = (name, options, forwards)
        for known, instance in made:
            if known == key:
                return instance
        made.append((key, make(name, options)))
        return made[-1][1]

    found = []
    for route in decision.routes:
        forwards = frozenset(route.fence_forward)
        found.append(Route(backend(route.backend, dict(route.options), forwards), forwards, route.holds))
    return tuple(found)


def write_facts(geometry: PoolGeometry, host_indices: Any) -> WriteFacts:
    """What rules may ask of a write, from its host indices int64 [n] alone: no device index is read."""
    indices = np.asarray(host_indices, dtype=np.int64)
    slots = geometry.slots_of(indices)
    return WriteFacts(
        tokens=len(indices),
        entries=copies_to_drain(geometry, indices),
        nbytes=len(slots) * geometry.bytes_per_token,
        runs=count_runs(slots),
    )


def distinct(routes: Sequence[Route]) -> list[Backend]:
    """Every backend of the routes, once."""
    return list({id(route.backend): route.backend for route in routes}.values())
