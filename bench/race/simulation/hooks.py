"""This project's hooks on the simulated scheduler: the functions that a server registers, on one run's
objects.
"""

from __future__ import annotations

from typing import Any

from ....io_backends.hybrid import HybridBackend
from ....io_backends.plan.ring import Ring
from ....io_backends.registry import make_backend
from ....io_backends.routes import routes_of
from ....io_backends.sglang import unsafe
from ....io_backends.sglang.scheduler import scheduler_hooks
from ....io_backends.sglang.scheduler.fences import Fences
from ....io_backends.sglang.scheduler.scheduler_hooks import Active
from ....io_backends.sglang.scheduler.writeback import WriteBack
from ....io_backends.virtual.device import VirtualDevice
from ....policy.decide import Decision
from .cache import Cache
from .scheduler import Scheduler

RING_PAGES = 4
"""Pages (of 4 tokens at least) in the staging ring: less than a long write, more than a short one."""


def attach(
    scheduler: Scheduler, cache: Cache, decision: Decision, unsafe_fences: str | None = None
) -> Active:
    """What a server does around ``Scheduler.__init__``; the hooks go when the cache is restarted."""
    device = VirtualDevice()

    def make(name: str, options: Any) -> Any:
        backend = make_backend(name, device, options)
        if isinstance(backend, HybridBackend):
            _shrink_ring(backend, device, cache)
        return backend

    fences = Fences(device, scheduler, producer=unsafe.keeps_producer_fence(unsafe_fences))
    writeback = WriteBack(device, routes_of(decision, make), fences)
    active = Active(decision, device, writeback, scheduler, speculative=scheduler.speculative)
    scheduler_hooks._active = active
    controller = cache.controller
    engine = controller.l2_transfer_engine
    engine.submit_device_to_host = lambda transfers: scheduler_hooks._around_submit(
        type(engine).submit_device_to_host, engine, transfers
    )
    controller._move_write_operation = lambda operation: scheduler_hooks._around_move(
        type(controller)._move_write_operation, controller, operation
    )

    def reset() -> None:
        scheduler_hooks._before_reset(controller)
        type(controller).reset(controller)

    controller.reset = reset
    scheduler.before_forward = lambda batch: scheduler_hooks._before_run_batch(scheduler, batch)
    scheduler_hooks._prepare(controller, active)
    return active


def detach(cache: Cache) -> None:
    """SGLang's own functions again."""
    scheduler_hooks._active = None
    for name in ("reset", "_move_write_operation"):
        vars(cache.controller).pop(name, None)


def _shrink_ring(backend: HybridBackend, device: VirtualDevice, cache: Cache) -> None:
    """``staging_mb`` counts in MiB, and a modelled row is a fraction of a real one: so is the ring."""
    tokens = RING_PAGES * max(cache.setup.page_size, 4)
    nbytes = tokens * max(int(pool.size_per_token) for pool in cache.host_pools)
    if cache.states is not None:
        nbytes = max(nbytes, 2 * int(cache.states.host_pool.size_per_token))
    backend._ring = Ring(nbytes, device.query)
