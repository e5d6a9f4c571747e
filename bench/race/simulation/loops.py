"""Other loops of SGLang's scheduler than the overlap loop, and callers that wait for a write."""

from __future__ import annotations

import random
from typing import Any

import torch

from ....io_backends.virtual import gpu
from .batches import Options, ScheduleBatch
from .cache import Cache
from .scheduler import MAX_RUNNING, Scheduler


class NoOverlap(Scheduler):
    """``event_loop_normal``: forwards run on the stream that is current, and the host waits for each."""

    enable_overlap = False

    def step(self) -> None:
        batch = self._next_batch()
        if batch is None:
            gpu.gpu.finish()
        else:
            self._run_batch(batch)
            self._process(batch)
        self._last = batch

    def _run_batch(self, batch: ScheduleBatch) -> None:
        """``run_batch``, the part without ``enable_overlap``."""
        self.before_forward(batch)
        self._launch(batch, self._describe(batch))
        self._copy_results(batch, gpu.current_stream())


class Pipeline(Scheduler):
    """scheduler_pp_mixin.py: ``event_loop_pp`` on the second of two pipeline ranks.

    A step is one microbatch. Its forward runs on the forward stream, and the schedule stream never waits for
    it (``_apply_war_barrier`` belongs to the overlap loop). Of finished writes and loads the rank takes rank
    0's count, whatever its own events say.
    """

    enable_overlap = False
    microbatches = 2
    max_running = MAX_RUNNING // microbatches

    def __init__(self, cache: Cache, options: Options, rng: random.Random) -> None:
        super().__init__(cache, options, rng)
        self._number = 0
        self._running_mbs: list[list[Any]] = [[] for _ in range(self.microbatches)]
        self._last_mbs: list[ScheduleBatch | None] = [None] * self.microbatches
        self._mbs: list[ScheduleBatch | None] = [None] * self.microbatches

    @property
    def idle(self) -> bool:
        busy = (*self._running_mbs, *self._mbs, *self._last_mbs, self.waiting, self._chunked)
        return not any(busy)

    @property
    def running(self) -> list[Any]:
        return [each for running in self._running_mbs for each in running]

    def _restart(self) -> None:
        super()._restart()
        self._cache.tree.pp_rank, self._cache.tree.pp_size = 1, 2
        self._cache.tree.pp_group = "the pipeline"
        self._cache.tree._pp_sync = self._receive_from_rank_0

    def _receive_from_rank_0(self, counts: torch.Tensor) -> None:
        """``_pp_sync``: what ``_sync_hicache_ready_counts`` asks for comes from the rank before.

        It has the same transfers in the same order; of them any number may be done there.
        """
        controller = self._cache.controller
        for place, queue in enumerate((controller.ack_write_queue, controller.ack_load_queue)):
            counts[place] = self._rng.choice((len(queue), self._rng.randint(0, len(queue))))

    def step(self) -> None:
        number = self._number
        following = self._number = (number + 1) % self.microbatches
        self._running, self._last = self._running_mbs[number], self._last_mbs[number]
        batch = self._mbs[number] = self._next_batch()
        self._running_mbs[number] = self._running
        if batch is not None:
            self._run_batch(batch)
        processed = self._last_mbs[following] = self._mbs[following]
        if processed is not None:
            self._process(processed)
        elif self.idle:
            gpu.gpu.finish()

    def _run_batch(self, batch: ScheduleBatch) -> None:
        """``_pp_launch_batch``; the results come back through the ring of ranks."""
        with gpu.stream(self.forward_stream):
            # _pp_wait_forward_dependencies
            self.forward_stream.wait_stream(self.schedule_stream)
            self.before_forward(batch)
            self._launch(batch, self._describe(batch))
        self.copy_stream.wait_stream(self.forward_stream)
        self._copy_results(batch, self.copy_stream)


class Callers:
    """Mixed into a scheduler: between forwards somebody asks for a write that is on its way.

    SGLang does it where an eviction writes back (``writing_check(write_back=True)``), where memory is
    released or moved (pool_host/unified.py, allocator/unified_sub_pool.py: ``wait_event``), and for metrics.
    """

    _cache: Cache
    _rng: random.Random
    forward_stream: gpu.Stream
    schedule_stream: gpu.Stream

    def _next_batch(self) -> ScheduleBatch | None:
        self._ask()
        batch: ScheduleBatch | None = super()._next_batch()  # type: ignore[misc]
        return batch

    def _process(self, batch: ScheduleBatch) -> None:
        self._ask()
        super()._process(batch)  # type: ignore[misc]
        self._ask()

    def _ask(self) -> None:
        queue = self._cache.controller.ack_write_queue
        if not queue or self._rng.random() < 0.5:
            return
        event = self._rng.choice(queue).finish_event
        how = self._rng.randrange(5)
        if how == 0:
            event.synchronize()
        elif how == 1:
            self.schedule_stream.wait_event(event)
        elif how == 2:
            event.wait(self.forward_stream)
        elif how == 3:
            # On whichever stream is current, as where a load is submitted.
            with gpu.stream(self._cache.controller.l2_transfer_engine.host_to_device_stream):
                event.wait()
        elif self._cache.tree.cache_controller is self._cache.controller:
            self._cache.tree.writing_check(write_back=True)


class Synchronize(Callers, Scheduler):
    """The overlap loop, with such callers."""


class SynchronizeNoOverlap(Callers, NoOverlap):
    """The loop without overlap, with such callers."""


class SynchronizePipeline(Callers, Pipeline):
    """A pipeline rank, with such callers."""
