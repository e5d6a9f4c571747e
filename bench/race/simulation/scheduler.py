"""A model of SGLang's scheduler under overlap: what it does to the cache and to streams, in its order.

Requests are SGLang's ``Req``, and whatever touches the cache is SGLang's own function (``release_kv_cache``,
``checkpoint_kv_cache``, ``match_kv_cache``, the tree, the controller). Modelled are the loop, admission
without its many budgets, and allocation of rows by whole pages. Comments name the function of SGLang 0.5.23
(srt/managers/scheduler.py, unless they say otherwise) that a step stands for.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ....io_backends.virtual import gpu
from ....io_backends.virtual.operations import Operation
from . import forward as model
from .batches import Options, ScheduleBatch
from .cache import REQUESTS, Cache
from .ledger import Ledger
from .rows import RowAllocator

VOCABULARY = 1 << 20
MAX_RUNNING = REQUESTS - 2


class Scheduler:
    """One scheduler on the present virtual device.

    Args:
        cache: restarted by this.
        options: see there.
        rng: of tokens, and of what others decide.

    Attributes:
        enable_overlap, forward_stream: as of SGLang's ``Scheduler``, for the forward fence.
        speculative: whether ``spec_algorithm`` is one.
        max_running: requests that decode together.
        before_forward: called with each batch before it is launched, as hooks before ``run_batch`` are.
    """

    enable_overlap = True
    speculative = False
    max_running = MAX_RUNNING

    def __init__(self, cache: Cache, options: Options, rng: random.Random) -> None:
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        self._modes = ForwardMode
        self._cache = cache
        self._options = options
        self._rng = rng
        # Scheduler.init_overlap and run_event_loop: three streams, none of them the legacy one.
        self.schedule_stream = _stream("schedule")
        self.forward_stream = _stream("forward")
        self.copy_stream = _stream("results")
        gpu.set_stream(self.schedule_stream)
        self._restart()
        self.ledger = Ledger(cache)
        self._rows = RowAllocator(cache)
        self.before_forward: Callable[[ScheduleBatch], None] = lambda batch: None
        self.waiting: list[Any] = []
        self._running: list[Any] = []
        self._chunked: Any = None
        self._chunked_abort: Any = None
        self._last: ScheduleBatch | None = None
        self._results: deque[ScheduleBatch] = deque()
        # All tokens of a request, those included that a forward in flight is to sample.
        self._tokens: dict[str, list[int]] = {}
        self._promised = 0
        self._forward = model.Forward(cache.layers, self._waits_of_layers())

    def _restart(self) -> None:
        """``init_cache``: the forward stream goes to the cache's controller as the stream to wait for."""
        self._cache.restart(self.forward_stream)

    @property
    def wrong_reads(self) -> int:
        """Rows of a context that held something else when a forward read them."""
        return self._forward.wrong_reads

    @property
    def idle(self) -> bool:
        """``is_fully_idle``."""
        return not (self.waiting or self._running or self._chunked or self._last or self._results)

    @property
    def running(self) -> list[Any]:
        """Requests that decode."""
        return self._running

    def add(self, name: str, tokens: Sequence[int], output: int) -> None:
        """A request arrives."""
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        parameters = SamplingParams(max_new_tokens=output, ignore_eos=True)
        parameters.normalize(None)
        request = Req(name, "", array("q", tokens), parameters, vocab_size=VOCABULARY)
        self._tokens[name] = list(tokens)
        self.waiting.append(request)

    def tokens_of(self, name: str) -> list[int]:
        return self._tokens[name]

    def abort(self, nth: int) -> None:
        """``abort_request`` of the nth request there is, wherever it is."""
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        there = [*self.running, *([self._chunked] if self._chunked else []), *self.waiting]
        if not there:
            return
        request = there[nth % len(there)]
        if request is self._chunked:
            self._chunked_abort = request
        elif request in self.waiting:
            self.waiting.remove(request)
        elif not request.finished():
            request.to_finish = FINISH_ABORT()

    def flush_cache(self) -> bool:
        """``flush_cache``: only while nothing runs. Writes may still be on their way."""
        if not self.idle:
            return False
        self._cache.tree.reset()
        self._cache.requests.clear()
        self._cache.allocator.clear()
        self.ledger.forget()
        return True

    def step(self) -> None:
        """One round of ``event_loop_overlap``."""
        batch = self._next_batch()
        if batch is not None:
            self._run_batch(batch)
            self._apply_war_barrier(batch)
            self._results.append(batch)
        if self._last is not None:
            self._process(self._results.popleft())
        elif batch is None:
            # on_idle: nothing to do but to wait for transfers, for as long as they take.
            gpu.gpu.finish()
        self._last = batch

    def _next_batch(self) -> ScheduleBatch | None:
        """``get_next_batch_to_run``."""
        self._abort_chunked()
        # _process_hicache_events
        self._cache.tree.check_hicache_events()
        self.ledger.check_acknowledged()
        chunked = self._chunked
        if chunked is not None and chunked.extend_end > chunked.prefix_len:
            # stash_chunked_request: the chunk's forward may still run.
            self._checkpoint(chunked)
        if self._last is not None and self._last.forward_mode.is_extend():
            left_out = {id(chunked), id(self._last.chunked)}
            self._running += [
                each for each in self._last.requests if id(each) not in left_out and each not in self._running
            ]
        self._running = [each for each in self._running if not each.finished() and not each.is_retracted]
        return self._prefill_batch() or self._decode_batch()

    def _abort_chunked(self) -> None:
        """``process_pending_chunked_abort``."""
        from sglang.srt.managers.schedule_batch import FINISH_ABORT
        from sglang.srt.mem_cache.common import release_kv_cache

        request, self._chunked_abort = self._chunked_abort, None
        if request is None or request is not self._chunked:
            return
        request.finished_reason = FINISH_ABORT()
        release_kv_cache(request, self._cache.tree, checkpoint=False)
        self._chunked = None

    def _checkpoint(self, request: Any) -> None:
        from sglang.srt.mem_cache.common import checkpoint_kv_cache

        checkpoint_kv_cache(request, self._cache.tree)

    def _prefill_batch(self) -> ScheduleBatch | None:
        """``get_new_batch_prefill`` and schedule_policy.py's ``PrefillAdder``."""
        admitted: list[Any] = []
        self._promised = 0
        left = self._options.chunk or 1 << 30
        if self._chunked is not None:
            request = self._chunked
            if self._set_extent(request, left):
                admitted.append(request)
                left -= request.extend_end - request.prefix_len
                if request.extend_end == len(request.full_untruncated_fill_ids):
                    self._chunked = None
        for request in list(self.waiting):
            if left < self._rows.page_size or len(self._running) + len(admitted) >= self.max_running:
                break
            if self._chunked is not None or not self._admit(request, left):
                break
            admitted.append(request)
            self.waiting.remove(request)
            left -= request.extend_end - request.prefix_len
        if not admitted:
            return None
        if self._chunked is not None and self._chunked in admitted:
            self._chunked.inflight_middle_chunks += 1
        consumer = self._cache.tree.ready_to_load_host_cache()
        spans = [(each.prefix_len, each.extend_end) for each in admitted]
        self._rows.extend(admitted)
        batch = ScheduleBatch(
            self._modes.EXTEND, admitted, spans, chunked=self._chunked, hicache_consumer_index=consumer
        )
        if self._options.mixed and self._running:
            decode = self._decode_batch()
            if decode is not None:
                # ScheduleBatch.mix_with_running
                for each, (_, stop) in zip(decode.requests, decode.spans, strict=True):
                    each.refresh_fill_ids()
                    each.extend_end = stop
                batch.forward_mode = self._modes.MIXED
                batch.requests = [*admitted, *decode.requests]
                batch.spans = [*spans, *decode.spans]
                batch.decoding = decode.requests
        return batch

    def _admit(self, request: Any, left: int) -> bool:
        """``PrefillAdder.add_one_req``: match, load back, lock."""
        from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams

        tree = self._cache.tree
        request.init_next_round_input(tree)
        pinned = tree.lock(request.last_node)
        try:
            wanted = len(request.full_untruncated_fill_ids) - request.prefix_len + 1
            if self._rows.free - self._promised < self._rows.whole_pages(wanted):
                return False
            if request.needs_host_load_back():
                loaded, request.last_node = tree.init_load_back(
                    InitLoadBackParams(request.best_match_node, request.host_hit_length, req=request)
                )
                request.prefix_len += loaded
                request.kv.cache_protected_len = request.prefix_len
            if not self._set_extent(request, left):
                raise RuntimeError("a request that fitted does not fit")
            request.lock = tree.lock(request.last_node)
        finally:
            tree.unlock(pinned)
        request.is_retracted = False
        if request.extend_end < len(request.full_untruncated_fill_ids):
            self._chunked = request
        return True

    def _set_extent(self, request: Any, left: int) -> bool:
        """How much of the prompt the next forward computes: all, or whole pages. False: memory lacks."""
        wanted = len(request.full_untruncated_fill_ids) - request.prefix_len
        if wanted > left:
            wanted = left // self._rows.page_size * self._rows.page_size
        if self._rows.free - self._promised < self._rows.whole_pages(wanted):
            return False
        self._promised += self._rows.whole_pages(wanted)
        request.extend_end = request.prefix_len + wanted
        return True

    def _decode_batch(self) -> ScheduleBatch | None:
        """``update_running_batch`` and ``ScheduleBatch.prepare_for_decode``."""
        self._retract()
        if not self._running:
            return None
        spans = [self._rows.grow(request) for request in self._running]
        return ScheduleBatch(self._modes.DECODE, list(self._running), spans, decoding=list(self._running))

    def _retract(self) -> None:
        """``ScheduleBatch.retract_decode``: the last ones give way until the others' next rows fit."""
        from sglang.srt.managers.schedule_batch import FINISH_ABORT
        from sglang.srt.mem_cache.common import release_kv_cache

        while self._must_retract():
            request = self._running.pop()
            if self._running and self._retracted_is_saved(request):
                release_kv_cache(request, self._cache.tree, checkpoint=False)
                request.reset_for_retract()
                self._tokens[request.rid] = [*request.origin_input_ids, *request.output_ids]
                self._requeue(request)
            else:
                request.finished_reason = FINISH_ABORT()
                release_kv_cache(request, self._cache.tree, checkpoint=False)

    def _must_retract(self) -> bool:
        return bool(self._running) and self._rows.needed_to_grow(self._running) > self._rows.free

    def _retracted_is_saved(self, request: Any) -> bool:
        """Whether it can go on later; here it is computed again."""
        return True

    def _requeue(self, request: Any) -> None:
        """``_add_request_to_queue`` of one that was retracted."""
        self.waiting.insert(0, request)

    def _run_batch(self, batch: ScheduleBatch) -> None:
        """``run_batch``, the part under ``enable_overlap``."""
        self.before_forward(batch)
        described = self._describe(batch)
        with gpu.stream(self.forward_stream):
            self.forward_stream.wait_stream(self.schedule_stream)
            self._launch(batch, described)
            # _copy_result_to_cpu
            self.copy_stream.wait_stream(self.forward_stream)
        self._copy_results(batch, self.copy_stream)

    def _launch(self, batch: ScheduleBatch, described: model.ForwardBatch) -> None:
        """``forward_batch_generation``, on the current stream."""
        # tp_worker.py: set_hicache_consumer
        self._cache.controller.layer_done_counter.set_consumer(batch.hicache_consumer_index)
        gpu.current_stream().launch(Operation(f"{described.name}, metadata"))
        if batch.forward_mode.is_decode():
            # decode_cuda_graph_runner.py: _publish_read_done
            batch.read_done = gpu.current_stream().record_event()
        self._forward.launch_layers(described)

    def _copy_results(self, batch: ScheduleBatch, stream: gpu.Stream) -> None:
        """``GenerationBatchResult.copy_to_cpu``."""
        stream.launch(Operation("results to the host", engine="copy_d2h"))
        batch.copy_done = stream.record_event()

    def _describe(self, batch: ScheduleBatch) -> model.ForwardBatch:
        """What the forward works on; samples what it will give."""
        computed = {}
        for request, (_, stop) in zip(batch.requests, batch.spans, strict=True):
            tokens = self._tokens[request.rid]
            computed[request.rid] = tokens[:stop]
            finished_prompt = batch.chunked is not request
            batch.sampled.append([self._rng.randrange(VOCABULARY)] if finished_prompt else [])
            tokens += batch.sampled[-1]
        return self._described(batch, computed)

    def _described(self, batch: ScheduleBatch, computed: Mapping[str, Sequence[int]]) -> model.ForwardBatch:
        """``computed``: of each request, its tokens up to the last that this forward writes."""
        written: list[torch.Tensor] = []
        read: list[torch.Tensor] = []
        written_tags, read_tags = [], []
        for request, (start, stop) in zip(batch.requests, batch.spans, strict=True):
            tags = model.contents(computed[request.rid], np.arange(stop))
            row = self._rows.of(request)
            written.append(row[start:stop])
            read.append(row[:stop])
            written_tags.append(tags[start:])
            read_tags.append(tags)
        kind = "decode" if batch.forward_mode.is_decode() else "extend"
        slots = torch.cat(written).numpy().astype(np.int64)
        tags = np.concatenate(written_tags)
        self.ledger.forward_writes(slots, tags)
        lasts = self._options.forward_ms
        return model.ForwardBatch(
            name=f"forward {kind}",
            written=slots,
            written_tags=tags,
            read=torch.cat(read).numpy().astype(np.int64),
            read_tags=np.concatenate(read_tags),
            exclusive=kind in self._options.exclusive,
            ms=None if lasts is None else lasts(kind, len(slots)) / len(self._cache.layers),
        )

    def _apply_war_barrier(self, batch: ScheduleBatch) -> None:
        """``_apply_war_barrier``: the forward's last read of what the scheduler writes next.

        With HiCache a prefill publishes no such event (runner_utils/shared_read_event.py), so the schedule
        stream waits for all of it.
        """
        if batch.read_done is not None:
            self.schedule_stream.wait_event(batch.read_done)
        else:
            self.schedule_stream.wait_stream(self.forward_stream)

    def _process(self, batch: ScheduleBatch) -> None:
        """``process_batch_result``: batch_result_processor.py's ``process_batch_result_prefill`` and
        ``_decode``.
        """
        batch.copy_done.synchronize()
        for request, sampled in zip(batch.requests, batch.sampled, strict=True):
            if request.inflight_middle_chunks > 0 and request not in batch.decoding:
                request.inflight_middle_chunks -= 1
            elif not request.finished() and not request.is_retracted:
                self._commit(request, sampled, prefilled=request not in batch.decoding)
        # Submit this batch's queued host backups before the next scheduler step.
        self._cache.tree.flush_pending_backups()

    def _commit(self, request: Any, sampled: list[int], *, prefilled: bool) -> None:
        request.output_ids.extend(sampled)
        request.update_finish_state(len(sampled))
        if request.finished():
            self._release_finished(request)
        elif prefilled:
            self._checkpoint(request)

    def _release_finished(self, request: Any) -> None:
        from sglang.srt.mem_cache.common import release_kv_cache

        release_kv_cache(request, self._cache.tree, checkpoint=True)

    def _waits_of_layers(self) -> list[Callable[[], None]]:
        """memory_pool.py: ``get_key_buffer`` waits for the layer's load; a draft for the last
        (base_spec_worker.py).
        """
        cache = self._cache
        target = cache.setup.layers

        def wait(layer: int) -> None:
            cache.controller.layer_done_counter.wait_until(min(layer, target - 1))

        return [lambda layer=layer: wait(layer) for layer in range(len(cache.layers))]  # type: ignore[misc]


def _stream(name: str) -> gpu.Stream:
    stream = gpu.Stream()
    stream.name = name
    return stream
