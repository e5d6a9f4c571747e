"""Every write to host memory passes here: producer fence, route per pool, forward fence.

SGLang's ``L2TransferEngine.submit_device_to_host`` keeps its own body (streams, events, error path); it is
handed pools whose copy method asks the router first. A pool that no backend of ours supports takes SGLang's
own path, which counts as SM work.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sglang_hicache.io_backends.device.base import Device, Event, Stream
from sglang_hicache.io_backends.geometry import PoolGeometry
from sglang_hicache.io_backends.interface import Backend, Deferring, Pending, Transfer
from sglang_hicache.io_backends.sglang.completion import deferred
from sglang_hicache.io_backends.sglang.pools import UnsupportedPoolError, describe, host_buffers

logger = logging.getLogger(__name__)

_BACKEND, _UPSTREAM = "backend", "upstream"

_NO_SLOTS = np.empty(0, dtype=np.int64)

_REGISTERED_RANGES = "_sglang_cuda_host_registered_ranges"
"""Where SGLang leaves (address, bytes) of each registration of a host buffer."""


@dataclass(slots=True)
class Counters:
    """What happened in this process. ``fallback_writes`` are pools copied by SGLang's own path."""

    bytes: int = 0
    writes: int = 0
    copies: int = 0
    producer_fences: int = 0
    forward_fences: int = 0
    fallback_writes: int = 0


@dataclass(frozen=True, slots=True)
class _Route:
    """How one pool is served: by the backend with this geometry, or by SGLang for this reason."""

    fingerprint: tuple[int, ...]
    geometry: PoolGeometry | None
    reason: str | None


class WriteBack:
    """The D2H side of one scheduler.

    Args:
        device: the seam.
        backend: the decision's backend.
        forward_stream: gives the stream that forwards run on, once the scheduler has it.
        forwards_wait: whether any forward waits for SM-side D2H work.
    """

    def __init__(
        self,
        device: Device,
        backend: Backend,
        forward_stream: Callable[[], Stream],
        *,
        forwards_wait: bool = False,
    ) -> None:
        self._device = device
        self._backend = backend
        self._forward_stream = forward_stream
        self._forwards_wait = forwards_wait
        self._pending: list[Pending] = []
        self._routes: dict[int, _Route] = {}
        self._in_flight: deque[tuple[Event, tuple[object, ...]]] = deque()
        # One event for each stream that SM work runs on: the backend's own, and SGLang's transfer stream
        # for pools that fall back. Neither covers the other.
        self._sm_done: dict[str, Event] = {}
        self.counters = Counters()

    def serves(self, host_pool: Any) -> bool:
        """Whether the backend copies this pool. Asked first, it prepares the backend."""
        return self._route(host_pool).geometry is not None

    def serve_alike(self, pools: Sequence[Any]) -> None:
        """These pools share their indices: if one of them takes SGLang's own path, all do."""
        if len({self.serves(pool) for pool in pools}) > 1:
            for pool in pools:
                reason = "it shares its indices with a pool that takes SGLang's own path"
                self._routes[id(pool)] = _Route(_fingerprint(pool), None, reason)

    def fallbacks(self) -> list[str]:
        """Why pools seen so far take SGLang's own path."""
        return [route.reason for route in self._routes.values() if route.reason is not None]

    def submit(self, original: Callable[..., Any], engine: Any, transfers: Sequence[Any]) -> Any:
        """Hook around ``submit_device_to_host``: returns SGLang's own ``TransferCompletion``."""
        device = self._device
        ready = self._ready()
        for event in ready:
            device.wait(engine.device_to_host_stream, event)
        self.counters.producer_fences += 1
        self.counters.writes += 1
        kept: list[object] = []
        self._pending = [part for part in self._pending if not part.enqueued()]
        earlier = len(self._pending)
        # Fallbacks first: behind a served pool their kernel, which forwards may wait for, would wait for its
        # drain.
        routed = [
            transfer._replace(host_pool=_RoutedPool(self, transfer.host_pool, engine, ready, kept))
            for transfer in sorted(transfers, key=lambda transfer: self.serves(transfer.host_pool))
        ]
        completion = original(engine, routed)
        pending = self._pending[earlier:]
        if pending:
            completion = completion._replace(
                finish_event=deferred(
                    completion.finish_event,
                    completion.timing_enabled,
                    engine.device_to_host_stream,
                    pending,
                    self.advance,
                    self.flush,
                )
            )
        self._keep(completion.finish_event, tuple(kept))
        return completion

    def advance(self) -> None:
        """Enqueue what earlier writes left for a gap between forwards, if there is anything."""
        if not self._pending or not isinstance(self._backend, Deferring):
            return
        gathered = self._backend.advance(self._ready())
        if gathered is not None:
            self._sm_done[_BACKEND] = gathered
        self._pending = [part for part in self._pending if not part.enqueued()]

    def flush(self, parts: Sequence[Pending]) -> None:
        """Enqueue the rest of these at once: somebody waits for them. Forwards wait for their SM work too."""
        for part in parts:
            gathered = part.flush()
            if gathered is not None:
                self._sm_done[_BACKEND] = gathered

    def abandon(self) -> None:
        """The cache is being reset: nobody will ask for what is not enqueued."""
        if isinstance(self._backend, Deferring):
            self._backend.abandon()
        self._pending.clear()

    def _ready(self) -> tuple[Event, Event]:
        """Events that a read of device rows must wait for: the producer fence.

        Under overlap forwards run on the forward stream; without it they run on the stream that is current
        here, as does the work that made the indices.
        """
        device = self._device
        return device.record(self._forward_stream()), device.record(device.current_stream())

    def move_write_operation(self, original: Callable[..., Any], controller: Any, operation: Any) -> Any:
        """Hook around ``_move_write_operation``: leave indices where our backends want them.

        SGLang moves host indices to the GPU or device indices to the host here, the latter with a wait
        for the forward in flight. Our backends take host indices on the host, device indices on the device.
        """
        group = controller.mem_pool_host
        anchor = getattr(group, "anchor_entry", None)
        pool = group if anchor is None else anchor.host_pool
        side = operation.pool_transfers or []
        sides = [group.entry_map[transfer.name].host_pool for transfer in side]
        if getattr(controller, "is_kv_sharded", False) or not any(
            self._takes_plain_indices(controller, each) for each in [pool, *sides]
        ):
            return original(controller, operation)
        host, device = self._move(controller, pool, operation.host_indices, operation.device_indices)
        if anchor is None:
            return host, device, None
        moved = None
        if side:
            moved = []
            for transfer, side_pool in zip(side, sides, strict=True):
                side_host, side_device = self._move(
                    controller, side_pool, transfer.host_indices, transfer.device_indices
                )
                moved.append(replace(transfer, host_indices=side_host, device_indices=side_device))
        return host, device, moved

    def _takes_plain_indices(self, controller: Any, pool: Any) -> bool:
        if getattr(self._backend, "upstream_indices", False) or not self.serves(pool):
            return False
        entries = getattr(controller.mem_pool_host, "entries", ())
        device_pools = [entry.device_pool for entry in entries if entry.host_pool is pool]
        return not any(map(_translated, device_pools or [getattr(controller, "mem_pool_device", None)]))

    def _move(self, controller: Any, pool: Any, host: Any, device: Any) -> tuple[Any, Any]:
        if self._takes_plain_indices(controller, pool):
            return host, device
        # SGLang's rule for a pool of its own, as in each version's _move_write_operation.
        staged = controller.io_backend == "kernel" and controller.mem_pool_host.layout == "page_first"
        per_pool = getattr(controller, "_move_pool_indices", None)
        if per_pool is not None:
            moved: tuple[Any, Any] = per_pool(pool, host, device, write_back_jit=staged)
            return moved
        if staged and getattr(pool, "can_use_write_back_jit", False):
            return (host.cpu() if host.is_cuda else host), device
        moved = controller.move_indices(host, device)
        return moved

    def take_sm_done(self) -> tuple[Event, ...]:
        """Events after all SM-side D2H work that no forward has waited for yet; then forget them."""
        events, self._sm_done = tuple(self._sm_done.values()), {}
        return events

    def copy(
        self,
        host_pool: Any,
        upstream: Callable[..., None],
        engine: Any,
        ready: tuple[Event, ...],
        kept: list[object],
        device_pool: Any,
        host_indices: Any,
        device_indices: Any,
    ) -> None:
        """Copy one pool's rows; the transfer stream is current."""
        stream = engine.device_to_host_stream

        def upstream_copy() -> None:
            upstream(device_pool, host_indices, device_indices, engine.io_backend)

        geometry = self._route(host_pool).geometry
        if geometry is None or _translated(device_pool):
            upstream_copy()
            self._sm_done[_UPSTREAM] = self._device.record(stream)
            self.counters.fallback_writes += 1
            self.counters.bytes += len(host_indices) * int(host_pool.size_per_token)
            return
        transfer = Transfer(
            geometry=geometry,
            host_slots=(
                _NO_SLOTS
                if getattr(self._backend, "upstream_indices", False)
                else np.asarray(host_indices, dtype=np.int64)
            ),
            device_slots=device_indices,
            ready=ready,
            indices_ready=ready[-1],
            forwards_wait=self._forwards_wait,
            upstream_copy=upstream_copy,
        )
        submission = self._backend.submit(transfer, stream)
        if submission.sm_done is not None:
            self._sm_done[_BACKEND] = submission.sm_done
        if submission.pending is not None:
            self._pending.append(submission.pending)
        kept.extend(submission.keep)
        self.counters.copies += submission.copies
        self.counters.bytes += submission.nbytes

    def _keep(self, finish_event: Event, objects: tuple[object, ...]) -> None:
        while self._in_flight and self._in_flight[0][0].query():
            self._in_flight.popleft()
        self._in_flight.append((finish_event, objects))

    def _route(self, host_pool: Any) -> _Route:
        known = self._routes.get(id(host_pool))
        fingerprint = _fingerprint(host_pool)
        if known is not None and known.fingerprint == fingerprint:
            return known
        try:
            geometry: PoolGeometry | None = describe(host_pool)
            reason = self._backend.supports(geometry) if geometry is not None else None
        except UnsupportedPoolError as error:
            geometry, reason = None, str(error)
        if reason is not None:
            geometry = None
            logger.warning(
                "sglang-hicache-io: pool %s goes through SGLang's own path, fenced: %s",
                getattr(host_pool, "pool_label", type(host_pool).__name__),
                reason,
            )
        if geometry is not None:
            registered = [
                extent
                for buffer in host_buffers(host_pool)
                for extent in getattr(buffer, _REGISTERED_RANGES, ())
            ]
            self._device.prepare_copies(geometry, registered)
            self._backend.prepare(geometry)
        route = _Route(fingerprint, geometry, reason)
        self._routes[id(host_pool)] = route
        return route

    def summary(self) -> dict[str, Any]:
        """Counters and fallbacks, for ``/server_info``."""
        return {"counters": asdict(self.counters), "fallbacks": self.fallbacks()}


class _RoutedPool:
    """A host pool, except that its copy to the host asks the router."""

    def __init__(
        self, router: WriteBack, pool: Any, engine: Any, ready: tuple[Event, ...], kept: list[object]
    ) -> None:
        self._router = router
        self._pool = pool
        self._engine = engine
        self._ready = ready
        self._kept = kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def _copy(
        self, method: str, device_pool: Any, host_indices: Any, device_indices: Any, io_backend: str
    ) -> None:
        upstream = getattr(self._pool, method)
        self._router.copy(
            self._pool,
            upstream,
            self._engine,
            self._ready,
            self._kept,
            device_pool,
            host_indices,
            device_indices,
        )

    def backup_from_device_all_layer(self, *args: Any) -> None:
        """0.5.18 to 0.5.20 call this."""
        self._copy("backup_from_device_all_layer", *args)

    def backup_from_device_all_layer_physical(self, *args: Any) -> None:
        """0.5.21 and later call this."""
        self._copy("backup_from_device_all_layer_physical", *args)


def _fingerprint(host_pool: Any) -> tuple[int, ...]:
    """Changes when a pool's memory does: a described geometry holds raw addresses."""
    rows = getattr(host_pool, "device_k_buffers", None) or getattr(host_pool, "device_kv_buffers", None)
    return (
        *(buffer.data_ptr() for buffer in host_buffers(host_pool)),
        rows[0].data_ptr() if rows else 0,
    )


def _translated(device_pool: Any) -> bool:
    """Whether SGLang translates this pool's indices on its transfer stream (unified memory): not ours."""
    return getattr(device_pool, "host_transfer_translate", None) is not None
