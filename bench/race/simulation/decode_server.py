"""Decode servers of PD disaggregation: rows arrive over the network, and leave for the host past the tree."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ....io_backends.virtual import gpu
from .batches import Options, ScheduleBatch
from .cache import Cache
from .loops import Callers
from .scheduler import Scheduler


class DecodeServer(Scheduler):
    """disaggregation/decode.py: ``event_loop_overlap_disagg_decode``.

    A prefill server writes a request's rows into the device pool, which the host polls for; then the request
    decodes. Admission is the tree's, without the queues of bootstrap and transfer.
    """

    def __init__(self, cache: Cache, options: Options, rng: random.Random) -> None:
        super().__init__(cache, options, rng)
        self._network = gpu.Stream()
        self._network.name = "network"
        self._arriving: list[tuple[Any, int, gpu.Event]] = []

    @property
    def idle(self) -> bool:
        return super().idle and not self._arriving

    def add(self, name: str, tokens: Sequence[int], output: int) -> None:
        """Most of what is asked is generated instead: rows that are decoded here are what leaves."""
        prompt = max(1, len(tokens) // 4)
        super().add(name, tokens[:prompt], output + len(tokens) - prompt)

    def _next_batch(self) -> ScheduleBatch | None:
        """``process_decode_queue``, ``get_next_disagg_decode_batch_to_run``."""
        self._check_transfers()
        self.ledger.check_acknowledged()
        self._running = [each for each in self._running if not each.finished() and not each.is_retracted]
        if self._resume():
            self._preallocate()
        for arriving in list(self._arriving):
            request, consumer, arrived = arriving
            if arrived.query() and self._cache.tree.is_load_back_event_done(consumer):
                self._arriving.remove(arriving)
                self._prebuilt(request)
        return self._decode_batch()

    def _check_transfers(self) -> None:
        self._cache.tree.check_hicache_events()

    def _resume(self) -> bool:
        """``resume_retracted_reqs``. Returns whether none is left that waits."""
        return True

    def _preallocate(self) -> None:
        """``pop_preallocated``: rows for the whole prompt, which the prefill server then writes."""
        while self.waiting and len(self.running) + len(self._arriving) < self.max_running:
            request = self.waiting[0]
            self._promised = 0
            if not self._admit(request, 1 << 30):
                break
            self.waiting.remove(request)
            consumer = self._cache.tree.ready_to_load_host_cache()
            self._rows.extend([request])
            self._arriving.append((request, consumer, self._receive(request)))

    def _receive(self, request: Any) -> gpu.Event:
        """Rows of the prompt, but for the prefix that is here, and the token that follows it.

        The network card writes them, in no stream's order. A request that has just finished may have one more
        forward in flight, which writes to a row that is free by now; here the rows arrive behind it.
        """
        batch = ScheduleBatch(self._modes.PREBUILT, [request], [(request.prefix_len, request.extend_end)])
        described = self._describe(batch)
        request.output_ids.extend(batch.sampled[0])
        nothing = described.read[:0], described.read_tags[:0]
        rows = replace(
            described, name="rows received", exclusive=False, read=nothing[0], read_tags=nothing[1]
        )
        with gpu.stream(self._network):
            self._network.wait_stream(self.forward_stream)
            self._forward.launch_layers(rows)
            return self._network.record_event()

    def _prebuilt(self, request: Any) -> None:
        """``process_prebuilt`` and ``process_batch_result_prebuilt``."""
        self._checkpoint(request)
        request.update_finish_state()
        if request.finished():
            Scheduler._release_finished(self, request)
        else:
            self._running.append(request)


class Retraction(DecodeServer):
    """``disaggregation_decode_retraction_backup host_pool``: SGLang's ``backup_kv_cache`` and
    ``restore_kv_cache``.

    In half of the seeds the host pool is there for that alone, as by default: the tree keeps nothing, and the
    controller gets no stream to wait for (scheduler.py: only with ``enable_hierarchical_cache``).
    """

    def __init__(self, cache: Cache, options: Options, rng: random.Random) -> None:
        self._alone = rng.random() < 0.5
        super().__init__(cache, options, rng)
        self._retracted: list[Any] = []
        self._retract_one = False

    @property
    def idle(self) -> bool:
        return super().idle and not self._retracted

    def _restart(self) -> None:
        self._cache.restart(None if self._alone else self.forward_stream)
        self._cache.tree.disable = self._alone

    def _must_retract(self) -> bool:
        # TEST_RETRACT: also without need, now and then.
        wanted, self._retract_one = self._retract_one, False
        return super()._must_retract() or (wanted and len(self._running) > 1)

    def _decode_batch(self) -> ScheduleBatch | None:
        self._retract_one = self._rng.random() < 0.2
        return super()._decode_batch()

    def _retracted_is_saved(self, request: Any) -> bool:
        """``release_req``; the forward in flight still writes the request's next row."""
        from sglang.srt.mem_cache.common import backup_kv_cache

        cache = self._cache
        saved: bool = backup_kv_cache(request, cache.tree, cache.requests, cache.allocator, "host_pool")
        if request.kv.retraction_backup is not None:
            # Pages are saved whole (_pad_retraction_indices); the next decode writes over the rest.
            self.ledger.ignore(request.kv.retraction_backup.host_indices[request.seqlen - 1 :])
        return saved

    def _requeue(self, request: Any) -> None:
        self._retracted.append(request)

    def _resume(self) -> bool:
        """``resume_retracted_reqs`` and ``_pre_alloc``."""
        from sglang.srt.disaggregation.decode import _bind_root_prefix
        from sglang.srt.mem_cache.common import restore_kv_cache

        cache = self._cache
        while self._retracted:
            request = self._retracted[0]
            length = len(request.origin_input_ids) + len(request.output_ids) - 1
            needed = self._rows.whole_pages(length) + self._rows.page_size
            if needed > self._rows.free or len(self.running) + len(self._arriving) >= self.max_running:
                return False
            self._retracted.remove(request)
            request.is_retracted = False
            _bind_root_prefix(request, cache.tree)
            request.full_untruncated_fill_ids = request.origin_input_ids + request.output_ids
            request.extend_end = length
            self._rows.extend([request])
            self.schedule_stream.wait_stream(self.forward_stream)
            restore_kv_cache(request, cache.tree, cache.requests, cache.allocator, "host_pool")
            self._prebuilt(request)
        return True


class Offload(DecodeServer):
    """``disaggregation_decode_enable_offload_kvcache``: SGLang's own ``DecodeKVCacheOffloadManager``.

    It waits for every write, finished or not, once a round. A retracted request is not kept
    (``disaggregation_decode_retraction_backup none``).
    """

    def _restart(self) -> None:
        # scheduler.py gives the forward stream to the tree's controller only.
        self._cache.restart(None)
        self._cache.tree.disable = True
        # SGLANG_HICACHE_DECODE_OFFLOAD_STRIDE
        self._manager.offload_stride = self._rng.choice((1, 2, 5)) * self._manager.page_size

    @property
    def _manager(self) -> Any:
        return self._cache.offload

    @property
    def idle(self) -> bool:
        return super().idle and not self._manager.ongoing_offload

    def _check_transfers(self) -> None:
        self._manager.check_offload_progress()

    def _retract(self) -> None:
        """``update_running_batch``: what is retracted must not be read any more."""
        if self._must_retract():
            self._manager.drain_before_retraction()
            super()._retract()

    def _retracted_is_saved(self, request: Any) -> bool:
        return False

    def _commit(self, request: Any, sampled: list[int], *, prefilled: bool) -> None:
        """batch_result_processor.py: ``_handle_finish_state_updated_req``."""
        super()._commit(request, sampled, prefilled=prefilled)
        if not request.finished():
            self._manager.offload_kv_cache(request)

    def _release_finished(self, request: Any) -> None:
        if not self._manager.offload_kv_cache(request):
            self._manager.finalize_release_on_finish(request)


class SynchronizeRetraction(Callers, Retraction):
    """The same, with callers that wait for a write."""


class SynchronizeOffload(Callers, Offload):
    """The same, with callers that wait for a write."""
