"""Every write to host memory passes here: producer fence, a route for each pool, forward fence.

SGLang's ``L2TransferEngine.submit_device_to_host`` keeps its own body (streams, events, error path); it is
handed pools whose copy method comes back here. A pool that no backend of ours supports takes SGLang's own
path, which counts as SM work.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sglang_hicache.io_backends.copy_engine import BREAK_EVEN_ENTRY_BYTES
from sglang_hicache.io_backends.device.base import Device, Event, Stream
from sglang_hicache.io_backends.geometry import PoolGeometry
from sglang_hicache.io_backends.interface import Backend, Deferring, Pending, Transfer
from sglang_hicache.io_backends.sglang import kernels
from sglang_hicache.io_backends.sglang.completion import deferred
from sglang_hicache.io_backends.sglang.indices import PlainIndices, translated
from sglang_hicache.io_backends.sglang.known_pools import KnownPools, label_of
from sglang_hicache.io_backends.sglang.metrics import Metrics
from sglang_hicache.io_backends.sglang.routes import Route, distinct, write_facts

UPSTREAM = "upstream"
"""Where a count by backend stands for SGLang's own path."""

_NO_SLOTS = np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class Counters:
    """What happened in this process.

    ``by_backend`` counts pools written, by who copied them. Of those written in copy-engine entries,
    ``short_entry_writes`` had entries that were shorter on average than
    :data:`~sglang_hicache.io_backends.copy_engine.BREAK_EVEN_ENTRY_BYTES`. ``ordered_writes`` are those that
    SGLang's kernel was given by ascending host slot.
    """

    bytes: int = 0
    writes: int = 0
    copies: int = 0
    producer_fences: int = 0
    forward_fences: int = 0
    fallback_writes: int = 0
    short_entry_writes: int = 0
    ordered_writes: int = 0
    by_backend: dict[str, int] = field(default_factory=dict)

    def served_by(self, name: str) -> None:
        self.by_backend[name] = self.by_backend.get(name, 0) + 1


class WriteBack:
    """The D2H side of one scheduler.

    Args:
        device: the seam.
        routes: the decision's; the last one holds for every write.
        forward_stream: gives the stream that forwards run on, once the scheduler has it.
    """

    def __init__(self, device: Device, routes: Sequence[Route], forward_stream: Callable[[], Stream]) -> None:
        self._device = device
        self._routes = tuple(routes)
        self._backends = distinct(routes)
        if len({(id(route.backend), route.forwards) for route in routes}) > len(self._backends):
            raise ValueError("one backend instance serves routes with different fences")
        self._forward_stream = forward_stream
        # Forwards that wait for SM work which no single route answers for: of SGLang's own path, and of what
        # a backend left for later.
        self._forwards = frozenset[str]().union(*(route.forwards for route in routes))
        self._pending: list[tuple[Backend, Pending]] = []
        self._earlier = 0
        """How many of them are of writes before the present one."""
        self.pools = KnownPools(device, self._backends)
        self._indices = PlainIndices(self.pools.serves)
        self.move_write_operation = self._indices.move_write_operation
        self._in_flight: deque[tuple[Any, Sequence[str], tuple[object, ...]]] = deque()
        # The last event of each backend (of SGLang's own path: None), set of forwards that wait, and transfer
        # stream (None: the backend's own). They may be on streams of their own: none of them covers another.
        # With the engine whose stream it is, which holds it: another one could get its id.
        self._sm_done: dict[tuple[Backend | None, frozenset[str], int | None], tuple[Event, Any]] = {}
        self.counters = Counters()
        self.metrics: Metrics | None = None

    def submit(self, original: Callable[..., Any], engine: Any, transfers: Sequence[Any]) -> Any:
        """Hook around ``submit_device_to_host``: returns SGLang's own ``TransferCompletion``."""
        device = self._device
        chosen = [self._choose(transfer, engine.io_backend) for transfer in transfers]
        # After that: moving indices is work on the current stream.
        ready = self._ready()
        for event in ready:
            device.wait(engine.device_to_host_stream, event)
        self.counters.producer_fences += 1
        self.counters.writes += 1
        kept: list[object] = []
        self._forget_enqueued()
        earlier = self._earlier = len(self._pending)
        # Kernels on the transfer stream first: behind another pool's drain, a forward that waits for them
        # would wait for the link.
        chosen.sort(key=lambda choice: choice[1] is not None and not choice[1].upstream_indices)
        completion = original(
            engine,
            [
                transfer._replace(
                    host_pool=_RoutedPool(self, transfer.host_pool, route, by_host, engine, ready, kept)
                )
                for transfer, route, by_host in chosen
            ],
        )
        pending = self._pending[earlier:]
        if pending:
            completion = completion._replace(
                finish_event=deferred(
                    completion.finish_event,
                    completion.timing_enabled,
                    engine.device_to_host_stream,
                    [part for _, part in pending],
                    self.advance,
                    functools.partial(self._flush, pending),
                )
            )
        by = [UPSTREAM if route is None else route.backend.name for _, route, _ in chosen]
        self._keep(completion, by, tuple(kept))
        return completion

    def advance(self) -> None:
        """Enqueue what earlier writes left for a gap between forwards, if there is anything."""
        if not self._pending:
            return
        for backend in self._backends:
            # Nothing is recorded or waited for at a poll that finds no memory free.
            if isinstance(backend, Deferring) and backend.can_advance():
                self._sm_work(backend, self._forwards, backend.advance(self._ready()))
        self._forget_enqueued()

    def _flush(self, pending: Sequence[tuple[Backend, Pending]]) -> None:
        """Enqueue the rest of these at once: somebody waits for them. Forwards wait for their SM work too."""
        for backend, part in pending:
            self._sm_work(backend, self._forwards, part.flush())

    def _forget_enqueued(self) -> None:
        self._pending = [each for each in self._pending if not each[1].enqueued()]

    def _sm_work(
        self, backend: Backend | None, forwards: frozenset[str], done: Event | None, engine: Any = None
    ) -> None:
        if done is not None and forwards:
            self._sm_done[backend, forwards, None if engine is None else id(engine)] = done, engine

    def abandon(self) -> None:
        """The cache is being reset: nobody will ask for what is not enqueued."""
        for backend in self._backends:
            if isinstance(backend, Deferring):
                backend.abandon()
        self._pending.clear()

    def _ready(self) -> tuple[Event, Event]:
        """Events that a read of device rows must wait for: the producer fence.

        Under overlap forwards run on the forward stream; without it they run on the stream that is current
        here, as does the work that made the indices.
        """
        device = self._device
        return device.record(self._forward_stream()), device.record(device.current_stream())

    def _choose(self, transfer: Any, io_backend: str) -> tuple[Any, Route | None, bool]:
        """The way a pool's rows take, with the indices where that wants them, and whether by host slot.

        None: SGLang's own path.
        """
        pool = transfer.host_pool
        move = self._indices.move_of(pool)
        served = self.pools[pool]
        route, by_host = None, False
        # Host indices on the GPU were moved by SGLang, for its own copy.
        plain = not transfer.host_indices.is_cuda and not translated(transfer.device_pool)
        if served.geometry is not None and plain:
            route = self._route(served.geometry, transfer.host_indices)
            # Without a move of ours SGLang has left them for its own copy, which may be the staged one.
            if route.backend.name in served.reasons or (route.upstream_indices and move is None):
                route = None
            elif route.upstream_indices and io_backend == "kernel":
                # Asked while they are on the host. SGLang's direct copies have an order of their own.
                by_host = kernels.host_order_pays(served.geometry, transfer.host_indices)
        if move is not None and (route is None or route.upstream_indices):
            host, device = move(transfer.host_indices, transfer.device_indices, may_stage=route is None)
            transfer = transfer._replace(host_indices=host, device_indices=device)
        return transfer, route, by_host

    def _route(self, geometry: PoolGeometry, host_indices: Any) -> Route:
        if len(self._routes) == 1:
            return self._routes[0]
        facts = write_facts(geometry, host_indices)
        return next(route for route in self._routes if route.holds(facts))

    def take_sm_done(self, forwards: frozenset[str]) -> tuple[Event, ...]:
        """Events after all SM-side D2H work that one of ``forwards`` must wait for and none has yet.

        Forgotten then: what is launched later is behind them too.
        """
        taken = [key for key in self._sm_done if key[1] & forwards]
        return tuple(self._sm_done.pop(key)[0] for key in taken)

    def copy(
        self,
        host_pool: Any,
        upstream: Callable[..., None],
        route: Route | None,
        by_host: bool,
        engine: Any,
        ready: tuple[Event, ...],
        kept: list[object],
        device_pool: Any,
        host_indices: Any,
        device_indices: Any,
    ) -> None:
        """Copy one pool's rows; the transfer stream is current."""
        stream = engine.device_to_host_stream
        known = self.pools[host_pool]
        geometry = known.geometry
        if geometry is None or route is None:
            upstream(device_pool, host_indices, device_indices, engine.io_backend)
            self._sm_work(None, self._forwards, self._device.record(stream), engine)
            self.counters.fallback_writes += 1
            self.counters.served_by(UPSTREAM)
            self.counters.bytes += len(host_indices) * int(host_pool.size_per_token)
            if self.metrics is not None:
                reason = next(iter(known.reasons.values()), "SGLang translates or shards its indices")
                self.metrics.fell_back(label_of(host_pool), reason)
            return

        def upstream_copy() -> None:
            # Here, and not where indices are moved: sorting is SM work, and between this copy's fences.
            pairs = host_indices, device_indices
            if by_host:
                pairs = kernels.in_host_order(*pairs)
            with kernels.without_staging(host_pool):
                upstream(device_pool, *pairs, engine.io_backend)

        transfer = Transfer(
            geometry=geometry,
            host_slots=_NO_SLOTS if route.upstream_indices else np.asarray(host_indices, dtype=np.int64),
            device_slots=device_indices,
            ready=ready,
            indices_ready=ready[-1],
            forwards_wait=bool(route.forwards),
            upstream_copy=upstream_copy,
        )
        submission = route.backend.submit(transfer, stream)
        self._sm_work(route.backend, route.forwards, submission.sm_done, engine)
        if submission.pending is not None:
            self._pending.append((route.backend, submission.pending))
        kept.extend(submission.keep)
        self.counters.copies += submission.copies
        self.counters.bytes += submission.nbytes
        self.counters.served_by(route.backend.name)
        short = submission.nbytes < submission.copies * BREAK_EVEN_ENTRY_BYTES
        self.counters.short_entry_writes += short
        self.counters.ordered_writes += by_host
        if self.metrics is not None:
            self.metrics.wrote(route.backend, geometry.label, submission, short=short)

    def failed(self, engine: Any) -> None:
        """A pool of the present write was not copied: forget what the others left for later.

        SGLang waits for the transfer stream next, and gives the slots of all of them to others.
        """
        for _, part in self._pending[self._earlier :]:
            part.abandon()
        del self._pending[self._earlier :]
        # Its SM work is among what that stream waits for by now.
        self._sm_work(None, self._forwards, self._device.record(engine.device_to_host_stream), engine)

    def _keep(self, completion: Any, backends: Sequence[str], objects: tuple[object, ...]) -> None:
        while self._in_flight and self._in_flight[0][0].finish_event.query():
            done, by, _ = self._in_flight.popleft()
            if self.metrics is not None and done.timing_enabled:
                self.metrics.transferred(by, done.start_event.elapsed_time(done.finish_event) / 1e3)
        self._in_flight.append((completion, backends, objects))

    def summary(self) -> dict[str, Any]:
        """Counters and fallbacks, for ``/server_info``."""
        counters = asdict(self.counters)
        written_by = counters.pop("by_backend")
        return {"counters": counters, "written_by": written_by, "fallbacks": self.pools.fallbacks()}


class _RoutedPool:
    """A host pool, except that its copy to the host asks the router."""

    def __init__(
        self,
        router: WriteBack,
        pool: Any,
        route: Route | None,
        by_host: bool,
        engine: Any,
        ready: tuple[Event, ...],
        kept: list[object],
    ) -> None:
        self._router = router
        self._pool = pool
        self._route = route
        self._by_host = by_host
        self._engine = engine
        self._ready = ready
        self._kept = kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def _copy(
        self, method: str, device_pool: Any, host_indices: Any, device_indices: Any, io_backend: str
    ) -> None:
        upstream = getattr(self._pool, method)
        try:
            self._router.copy(
                self._pool,
                upstream,
                self._route,
                self._by_host,
                self._engine,
                self._ready,
                self._kept,
                device_pool,
                host_indices,
                device_indices,
            )
        except BaseException:
            self._router.failed(self._engine)
            raise

    def backup_from_device_all_layer(self, *args: Any) -> None:
        """0.5.18 to 0.5.20 call this."""
        self._copy("backup_from_device_all_layer", *args)

    def backup_from_device_all_layer_physical(self, *args: Any) -> None:
        """0.5.21 and later call this."""
        self._copy("backup_from_device_all_layer_physical", *args)
