"""Every write to host memory passes here: each of its pools takes a route, between the fences of
:mod:`~.fences`.

SGLang's ``L2TransferEngine.submit_device_to_host`` keeps its own body (streams, events, error path); it is
handed pools whose copy method comes back here. A pool that no backend of ours supports takes SGLang's own
path, which counts as SM work.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from ....policy.log import logger_of
from ...copy_engine import BREAK_EVEN_ENTRY_BYTES
from ...device.base import Device, Event
from ...interface import Backend, Submission, Transfer
from ...plan.geometry import PoolGeometry
from ...plan.staged_write import is_whole
from ...routes import Route, distinct, write_facts
from .. import versions
from ..metrics import Metrics
from ..pools.geometry import WITHOUT_BYTES, label_of, translated
from ..pools.host_pools import bytes_of
from . import kernels
from .deferred_event import deferred
from .fences import Fences
from .indices import PlainIndices
from .pool_registry import PoolRegistry
from .writes import UPSTREAM, Counters, PoolWrite, Write

logger = logger_of(__name__)

_NO_SLOTS = np.empty(0, dtype=np.int64)

NOT_WHOLE = "a write was not whole pages, each in order"
"""Why a write takes SGLang's own path though a backend serves its pool. SGLang writes nothing else (0.5.18 to
0.5.23, see :mod:`~sglang_hicache.io_backends.plan.staged_write`), so this is looked at, and never seen."""

TRANSLATED = "SGLang translates or shards its indices"
"""The same, of a write whose indices no backend can read."""


class WriteBack:
    """The D2H side of one scheduler.

    Args:
        device: the seam.
        routes: the decision's; the last one holds for every write.
        fences: between these writes and the scheduler's forwards.

    Raises:
        ValueError: one backend instance is in routes with different fences.
    """

    def __init__(self, device: Device, routes: Sequence[Route], fences: Fences) -> None:
        self._device = device
        self._routes = tuple(routes)
        self._backends = distinct(routes)
        if len({(id(route.backend), route.forwards) for route in routes}) > len(self._backends):
            raise ValueError("one backend instance serves routes with different fences")
        self.fences = fences
        # Forwards that wait for SM work which no single route answers for: of SGLang's own path, and of what
        # a backend left for later.
        self._forwards = frozenset[str]().union(*(route.forwards for route in routes))
        self._deferred: list[Write] = []
        """Writes of which something is pending, oldest first."""
        self.pools = PoolRegistry(device, self._backends)
        self._indices = PlainIndices(self.pools.serves)
        self.move_write_operation = self._indices.move_write_operation
        self._in_flight: deque[tuple[Any, Sequence[str], Write]] = deque()
        # When writes began that are not seen complete, seconds since 1970, oldest first; with metrics only.
        self._begun: dict[Write, float] = {}
        self.counters = Counters()
        self.metrics: Metrics | None = None

    def submit(self, original: Callable[..., Any], engine: Any, transfers: Sequence[Any]) -> Any:
        """Hook around ``submit_device_to_host``: returns SGLang's own ``TransferCompletion``."""
        device = self._device
        chosen = [self._choose(transfer, engine.io_backend) for transfer in transfers]
        # After that: moving indices is work on the current stream.
        write = Write(engine, self.fences.ready())
        for event in write.ready:
            device.wait(engine.device_to_host_stream, event)
        self.counters.producer_fences += self.fences.producer
        self.counters.writes += 1
        # Kernels on the transfer stream first: behind another pool's drain, a forward that waits for them
        # would wait for the link.
        chosen.sort(key=lambda choice: choice[1] is not None and not choice[1].upstream_indices)
        try:
            completion = original(
                engine,
                [
                    transfer._replace(
                        host_pool=_RoutedPool(self, PoolWrite(write, transfer.host_pool, route, by_host, why))
                    )
                    for transfer, route, by_host, why in chosen
                ],
            )
        except BaseException:
            if write.pending:  # not a pool's copy failed, but what SGLang does besides
                self.give_up(write)
            raise
        if write.pending:
            self._forget_enqueued()
            self._deferred.append(write)
        if write.pending or self.metrics is not None:
            completion = completion._replace(
                finish_event=deferred(
                    completion.finish_event,
                    completion.timing_enabled,
                    engine.device_to_host_stream,
                    [part for _, part in write.pending],
                    self.advance,
                    functools.partial(self._flush, write),
                    functools.partial(self._seen_done, write) if self.metrics is not None else None,
                )
            )
        by = [UPSTREAM if route is None else route.backend.name for _, route, *_ in chosen]
        self._keep(completion, by, write)
        return completion

    def start(self, step_tokens: int) -> None:
        """All pools that are known before serving are prepared, and SGLang has allocated its own memory.

        Args:
            step_tokens: that a forward makes rows of at most.
        """
        sharers = sum(backend.staging_bytes[1] > 0 for backend in self._backends)
        for backend in self._backends:
            wait = any(route.forwards for route in self._routes if route.backend is backend)
            line = backend.start(step_tokens=step_tokens, forwards_wait=wait, sharers=sharers)
            if line is not None:
                logger.info("hicache-io: %s", line)
        self.pools.serving = True
        if self.metrics is not None:
            self._gauge()

    def expect(self, pool: Any) -> None:
        """A host pool is known before serving: prepare the backends for it, and start its counters at 0."""
        known = self.pools[pool]
        if self.metrics is None:
            return
        served = known.geometry is not None
        names = [each.name for each in self._backends if served and known.reason(each) is None]
        whys = [*([NOT_WHOLE] if served else []), known.reasons[0] if known.reasons else TRANSLATED]
        label = known.geometry.label if known.geometry is not None else label_of(pool)
        self.metrics.expect(label, list(dict.fromkeys(names)), whys)

    def before_forward(self) -> None:
        """A forward is about to be launched: the last chance for what runs in the gap before it.

        What a write left in its first gap goes in the second one, if it must wait for the link there: so no
        more than a forward's rows are ever left, and write-back keeps pace at the price of time.
        """
        self.advance(launching=True)
        for write in self._deferred:
            write.late = True
        for backend in self._backends:
            backend.launched()
        if self.metrics is not None:
            self._gauge()

    def advance(self, *, launching: bool = False) -> None:
        """Enqueue what earlier writes left for a gap between forwards, if there is anything.

        Args:
            launching: a forward is launched next; else SGLang polls.
        """
        if not self._deferred:
            return
        with self._gap():
            ready: tuple[Event, ...] = ()
            blocked: list[Backend] = []
            for write in self._deferred:
                late = launching and write.late
                for backend, part in write.pending:
                    if backend in blocked:
                        continue
                    with self._given_up_on_error(write):
                        # Nothing is recorded or waited for at a poll that finds no memory free.
                        if part.can_advance() or (late and not part.enqueued()):
                            ready = ready or self.fences.ready()
                            self.fences.sm_work(backend, self._forwards, part.advance(ready, wait=late))
                        if not part.enqueued():
                            blocked.append(backend)
                if len(blocked) == len(self._backends):
                    break
            self._forget_enqueued()

    def _flush(self, write: Write) -> None:
        """Enqueue the rest of this one at once: somebody waits for it. Forwards wait for its SM work too."""
        with self._gap():
            ready = self.fences.ready()
            with self._given_up_on_error(write):
                for backend, part in write.pending:
                    self.fences.sm_work(backend, self._forwards, part.advance(ready, wait=True))

    @contextmanager
    def _gap(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.counters.gap_seconds += time.perf_counter() - began

    @contextmanager
    def _given_up_on_error(self, write: Write) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.give_up(write)
            raise

    def give_up(self, write: Write) -> None:
        """A part of this write failed: forget what is pending of all of it.

        SGLang gives the slots of all its pools to others once the transfer stream is through. A write before
        it that failed instead, where a backend went on with that first, goes the same way.
        """
        for each in dict.fromkeys((*self._deferred, write)):
            if each is write or each.failed:
                for _, part in each.pending:
                    part.abandon()
                each.pending.clear()
                # Its SM work is among what that stream waits for by now.
                each.given_up = self._device.record(each.engine.device_to_host_stream)
                self.fences.sm_work(None, self._forwards, each.given_up, each.engine)
        self._forget_enqueued()

    def _forget_enqueued(self) -> None:
        self._deferred = [
            write for write in self._deferred if not all(part.enqueued() for _, part in write.pending)
        ]

    def abandon(self) -> None:
        """The cache is being reset: nobody will ask for what is not enqueued."""
        for write in self._deferred:
            for _, part in write.pending:
                part.abandon()
        self._deferred.clear()
        self._begun.clear()  # SGLang forgets their completions too
        if self.metrics is not None:
            self._gauge()

    def copying(self) -> bool:
        """Whether the last write is on its way to the host. Metrics hear of it if it is seen to be over."""
        return bool(self._in_flight) and not self._is_over(*self._in_flight[-1][::2])

    def _choose(self, transfer: Any, io_backend: str) -> tuple[Any, Route | None, bool, str | None]:
        """The way a pool's rows take, with the indices where that wants them, whether by host slot, and why
        this write does not take the way of its pool.

        None: SGLang's own path.
        """
        pool = transfer.host_pool
        move = self._indices.move_of(pool)
        served = self.pools[pool]
        route, by_host, why = None, False, None
        # Host indices on the GPU were moved by SGLang, for its own copy.
        plain = not transfer.host_indices.is_cuda and not translated(transfer.device_pool)
        if served.geometry is not None and plain:
            route = self._route(served.geometry, transfer.host_indices)
            # Without a move of ours SGLang has left them for its own copy, which may be the staged one.
            if served.reason(route.backend) is not None or (route.upstream_indices and move is None):
                route = None
            elif route.upstream_indices and io_backend == "kernel":
                # Asked while they are on the host. SGLang's direct copies have an order of their own.
                by_host = kernels.host_order_pays(served.geometry, transfer.host_indices)
            elif (route.backend.whole_pages or served.geometry.as_a_whole) and not is_whole(
                served.geometry, transfer.host_indices
            ):
                route, why = None, NOT_WHOLE
        if move is not None and (route is None or route.upstream_indices):
            host, device = move(transfer.host_indices, transfer.device_indices, may_stage=route is None)
            transfer = transfer._replace(host_indices=host, device_indices=device)
        return transfer, route, by_host, why

    def _route(self, geometry: PoolGeometry, host_indices: Any) -> Route:
        if len(self._routes) == 1:
            return self._routes[0]
        facts = write_facts(geometry, host_indices)
        return next(route for route in self._routes if route.holds(facts))

    def copy(
        self, part: PoolWrite, upstream: Callable[..., None], device_pool: Any, host: Any, device: Any
    ) -> None:
        """Copy one pool's rows; the transfer stream is current.

        Args:
            part: what is written.
            upstream: SGLang's own copy of the pool.
            device_pool: as SGLang gives it to ``upstream``.
            host: host indices, int64 [n], likewise.
            device: device indices, int64 [n], likewise.

        Raises:
            ValueError: there are not as many of one as of the other, where several stand for one slot.
        """
        write, route = part.write, part.route
        engine = write.engine
        stream = engine.device_to_host_stream
        known = self.pools[part.pool]
        geometry = known.geometry
        if type(part.pool).__name__ in WITHOUT_BYTES:
            upstream(device_pool, host, device, engine.io_backend)  # nothing that a forward could wait for
            return
        if geometry is None or route is None:
            upstream(device_pool, host, device, engine.io_backend)
            self.fences.sm_work(None, self._forwards, self._device.record(stream), engine)
            self._count_fallback(part, len(host))
            return

        if geometry.index_step > 1 and len(host) != int(device.shape[0]):
            raise ValueError(f"{len(host)} host indices for {int(device.shape[0])} device indices")

        def upstream_copy(*, block_quota: int | None = None) -> None:
            # Here, and not where indices are moved: sorting is SM work, and between this copy's fences.
            pairs = kernels.in_host_order(host, device) if part.by_host else (host, device)
            with kernels.without_staging(part.pool), kernels.limited_to(block_quota):
                upstream(device_pool, *pairs, engine.io_backend)

        transfer = Transfer(
            geometry=geometry,
            host_slots=_NO_SLOTS
            if route.upstream_indices
            else geometry.slots_of(np.asarray(host, dtype=np.int64)),
            device_slots=device,
            ready=write.ready,
            indices_ready=write.ready[-1],
            forwards_wait=bool(route.forwards),
            upstream_copy=upstream_copy,
        )
        submission = route.backend.submit(transfer, stream)
        self.fences.sm_work(route.backend, route.forwards, submission.sm_done, engine)
        if submission.pending is not None:
            write.pending.append((route.backend, submission.pending))
        write.keep.extend(submission.keep)
        self._count(route.backend, geometry, submission, by_host=part.by_host)

    def _count(
        self, backend: Backend, geometry: PoolGeometry, submission: Submission, *, by_host: bool
    ) -> None:
        short = submission.nbytes < submission.copies * BREAK_EVEN_ENTRY_BYTES
        self.counters.copies += submission.copies
        self.counters.bytes += submission.nbytes
        self.counters.served_by(backend.name)
        self.counters.short_entry_writes += short
        self.counters.ordered_writes += by_host
        if self.metrics is not None:
            self.metrics.wrote(backend, geometry.label, submission, short=short)

    def _count_fallback(self, part: PoolWrite, indices: int) -> None:
        self.counters.fallback_writes += 1
        self.counters.served_by(UPSTREAM)
        self.counters.bytes += bytes_of(part.pool, indices)
        if self.metrics is not None:
            reasons = self.pools[part.pool].reasons
            reason = part.why or (reasons[0] if reasons else TRANSLATED)
            self.metrics.fell_back(label_of(part.pool), reason)

    def _keep(self, completion: Any, backends: Sequence[str], write: Write) -> None:
        """Hold what the write needs until it is done, and let go of what earlier ones did."""
        while self._in_flight and self._is_over(*self._in_flight[0][::2]):
            done, by, over = self._in_flight.popleft()
            if self.metrics is not None and done.timing_enabled and over.given_up is None:
                self.metrics.transferred(by, done.start_event.elapsed_time(done.finish_event) / 1e3)
        self._in_flight.append((completion, backends, write))
        if self.metrics is not None:
            self._begun[write] = time.time()
            self._gauge()

    def _is_over(self, completion: Any, write: Write) -> bool:
        """Whether nothing that was enqueued of a write is still to run.

        Enqueues nothing and raises nothing, which ``query`` may: the present write is none of its business.
        """
        if write.given_up is not None:
            return self._device.query(write.given_up)
        if write.failed or not all(part.enqueued() for _, part in write.pending):
            return False
        return bool(completion.finish_event.query())

    def _seen_done(self, write: Write) -> None:
        """A write is seen complete."""
        self._begun.pop(write, None)
        if self.metrics is not None:
            self._gauge()

    def _gauge(self) -> None:
        """What is on its way now.

        SGLang's endpoint shows what was set last. So it is set whenever that changes: as a write begins, as a
        forward is launched, and as SGLang sees a write complete, the last one before an idle time too.
        """
        assert self.metrics is not None
        staged: dict[str, tuple[int, int, int]] = {}
        for backend in self._backends:
            used, total = backend.staging_bytes
            before = staged.get(backend.name, (0, 0, 0))
            staged[backend.name] = (before[0] + used, before[1] + total, before[2] + backend.waiting_bytes)
        self.metrics.on_its_way(staged, next(iter(self._begun.values()), 0.0))

    def summary(self) -> dict[str, Any]:
        """Counters and fallbacks, for ``/server_info``."""
        counters = asdict(self.counters)
        written_by = counters.pop("by_backend")
        staging = sum(backend.staging_bytes[1] for backend in self._backends)
        return {
            "counters": counters,
            "written_by": written_by,
            "staging_bytes": staging,
            "fallbacks": self.pools.fallbacks(),
        }


class _RoutedPool:
    """A host pool, except that its copy to the host asks the router."""

    def __init__(self, router: WriteBack, part: PoolWrite) -> None:
        self._router = router
        self._part = part

    def __getattr__(self, name: str) -> Any:
        if name in versions.POOL_COPIES:
            return functools.partial(self._copy, name)
        return getattr(self._part.pool, name)

    def _copy(self, method: str, device_pool: Any, host: Any, device: Any, io_backend: str) -> None:
        upstream = getattr(self._part.pool, method)
        try:
            self._router.copy(self._part, upstream, device_pool, host, device)
        except BaseException:
            # Before SGLang waits for the transfer stream.
            self._router.give_up(self._part.write)
            raise
