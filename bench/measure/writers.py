"""Who writes back in an overlap loop: this project's backends by route, and SGLang's own copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ...io_backends import Transfer
from ...io_backends.interface import Backend, Pending
from ...io_backends.registry import AUTO, BACKENDS, make_backend, unsupported
from ...io_backends.routes import Route, distinct, one_route, routes_of
from ...policy.backend_spec import BackendSpec, SmWork, spec_of
from ...policy.names import FORWARDS
from . import sglang_pools
from .contenders import Task
from .overlap import Flight

Tasks = Mapping[int, Task]
"""By tokens; of one pool, and with one transfer stream."""


class CannotError(Exception):
    """Why there is no such writer."""


class _Left(NamedTuple):
    """What a backend left of a write that was submitted after ``gap`` launches of forwards."""

    backend: Backend
    pending: Pending
    gap: int


class OwnWriter:
    """This project's backends behind their interface, with the fences of their routes.

    Args:
        tasks: the writes of the loop.
        routes: as in serving; the first one that holds takes a write.

    Raises:
        CannotError: a backend does not serve the pool.
    """

    safe = True

    def __init__(self, tasks: Tasks, routes: Sequence[Route]) -> None:
        self._tasks = tasks
        self._by_tokens: dict[int, tuple[Route, Callable[[], None]]] = {}
        self._backends = distinct(routes)
        self._fences: dict[tuple[int, int], Any] = {}
        self._left: list[_Left] = []
        self._gap = 0
        for tokens, task in tasks.items():
            route = next(route for route in routes if route.holds(task.facts))
            reason = unsupported(route.backend, task.geometry)
            if reason is not None:
                raise CannotError(reason)
            self._by_tokens[tokens] = route, _upstream(task) if route.upstream_indices else _none
        used = {id(route.backend): route.backend for route, _ in self._by_tokens.values()}
        for backend in used.values():
            backend.prepare(next(iter(tasks.values())).geometry)
            wait = any(route.forwards for route, _ in self._by_tokens.values() if route.backend is backend)
            backend.start(step_tokens=max(tasks), forwards_wait=wait)
        self.backend = "+".join(dict.fromkeys(backend.name for backend in used.values()))
        self.sm_work = any(_spec(backend.name).sm_work is not SmWork.NONE for backend in used.values())
        self.forwards_wait = any(route.forwards for route, _ in self._by_tokens.values())

    def submit(self, tokens: int, flight: Flight, forward_stream: Any) -> None:
        task, (route, upstream) = self._tasks[tokens], self._by_tokens[tokens]
        device, stream = task.device, task.stream
        ready = self._ready(device, forward_stream)
        for event in ready:
            device.wait(stream, event)
        transfer = Transfer(
            task.geometry, task.host, task.device_slots, ready, ready[-1], bool(route.forwards), upstream
        )
        with device.use_stream(stream):
            done = route.backend.submit(transfer, stream)
        self._fence(route.backend, 0, done.sm_done, bool(route.forwards))

        def enqueued() -> None:
            flight.done = device.record(stream)

        if done.pending is None:
            enqueued()
        else:
            done.pending.then(enqueued)
            self._left.append(_Left(route.backend, done.pending, self._gap))

    def advance(self, forward_stream: Any, *, launching: bool) -> None:
        device = next(iter(self._tasks.values())).device
        ready: tuple[Any, ...] = ()
        for part in self._left:
            # As in serving (WriteBack.advance): what was left in a write's first gap goes in the second one.
            late = launching and part.gap < self._gap
            if late or part.pending.can_advance():
                ready = ready or self._ready(device, forward_stream)
                self._fence(part.backend, 1, part.pending.advance(ready, wait=late), True)
            elif not part.pending.enqueued():
                break
        self._left = [part for part in self._left if not part.pending.enqueued()]

    def take_fences(self) -> Sequence[Any]:
        self._gap += 1
        for backend in self._backends:
            backend.launched()
        taken, self._fences = list(self._fences.values()), {}
        return taken

    def waiting_bytes(self) -> int:
        return sum(backend.waiting_bytes for backend in self._backends)

    def _fence(self, backend: Backend, kind: int, event: Any, waits: bool) -> None:
        if event is not None and waits:
            self._fences[id(backend), kind] = event

    @staticmethod
    def _ready(device: Any, forward_stream: Any) -> tuple[Any, Any]:
        return device.record(forward_stream), device.record(device.current_stream())


class UpstreamWriter:
    """SGLang as it is: its copy behind the producer fence, and no forward waits.

    Raises:
        CannotError: SGLang has no such copy here.
    """

    forwards_wait = False

    def __init__(self, tasks: Tasks, name: str) -> None:
        self._tasks = tasks
        self._copies: dict[int, Callable[[], None]] = {}
        for tokens, task in tasks.items():
            made = sglang_pools.submission(task, name)
            if isinstance(made, str):
                raise CannotError(made)
            self._copies[tokens] = made
        self.backend = name
        self.sm_work = name != sglang_pools.DIRECT

    def submit(self, tokens: int, flight: Flight, forward_stream: Any) -> None:
        task = self._tasks[tokens]
        device, stream = task.device, task.stream
        device.wait(stream, device.record(forward_stream))
        device.wait(stream, device.record(device.current_stream()))
        with device.use_stream(stream):
            self._copies[tokens]()
        flight.done = device.record(stream)

    def advance(self, forward_stream: Any, *, launching: bool) -> None:
        """Nothing is ever left."""

    def take_fences(self) -> Sequence[Any]:
        return ()

    def waiting_bytes(self) -> int:
        return 0


def writer(name: str, tasks: Tasks) -> OwnWriter | UpstreamWriter:
    """The contender of that name.

    Raises:
        CannotError: it cannot take part; the message says why.
    """
    if name in sglang_pools.CONTENDERS:
        return UpstreamWriter(tasks, name)
    task = next(iter(tasks.values()))
    make = partial(_make, task)
    if name == AUTO:
        return OwnWriter(tasks, routes_of(task.decision, make))
    forwards = FORWARDS if _spec(name).sm_work is SmWork.TRANSFER else task.decision.fences()
    return OwnWriter(tasks, one_route(make(name, task.options.get(name, {})), forwards))


def _make(task: Task, name: str, options: Any) -> Backend:
    return make_backend(name, task.device, options)


def _spec(name: str) -> BackendSpec:
    return spec_of(BACKENDS, name)


def _upstream(task: Task) -> Callable[[], None]:
    found = task.upstream(task)
    if isinstance(found, str):
        raise CannotError(found)
    return found


def _none() -> None:
    raise AssertionError("only a backend with upstream_indices calls SGLang's own copy")
