"""States of linear layers (Mamba): a slot a request, which each forward writes in place, beside the rows.

A forward writes the state of each request into the request's own slot; at checkpoints also into one of the
slots that the request tracks with (``extra_buffer``), and that slot is then given to the tree. Without those
(``no_buffer``) a finished request gives its own, an unfinished one a copy. Which slots those are is for
SGLang's own functions to say: they are called with what they read of SGLang's batch.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Sequence
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ....io_backends.virtual import gpu
from ....io_backends.virtual.operations import Operation
from ....io_backends.virtual.sites import hide
from .batches import Options, ScheduleBatch
from .cache import Cache
from .forward import ForwardBatch, Ints, LayerBuffer, Words, bytes_of
from .linear_layers import CHUNK, SLOTS
from .loops import Callers, NoOverlap
from .scheduler import Scheduler

# Reports name the scheduler.
hide(__name__)


_PRESSED = 0.3
"""How often others want the slots."""

_RESULT = SimpleNamespace(num_correct_drafts_per_req_cpu=None)
"""What SGLang's functions read of a forward's result without speculative decoding."""


def state_of(tokens: Sequence[int]) -> int:
    """What makes the state after these tokens its own; never 0."""
    return zlib.crc32(np.asarray(tokens, dtype=np.int64).tobytes()) << 16 | len(tokens)


class StateForward:
    """What forwards do to states, on the current stream.

    Attributes:
        wrong_reads: states that held something else when a forward went on from them.
    """

    def __init__(self, cache: Cache, device_tags: Words) -> None:
        assert cache.states is not None
        self._layers = cache.states.layers
        self._counter = cache.controller.layer_done_counter
        self._first = cache.setup.layers
        self._tags = device_tags
        self.wrong_reads = 0

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """``MambaPool.copy_from``."""
        sources, targets = _slots(src), _slots(dst)
        self._tags[targets] = self._tags[sources]
        memories = [memory for memories in self._layers for memory in memories]
        gpu.current_stream().launch(
            Operation(
                "states copied",
                work=[functools.partial(memory.copy, targets, sources) for memory in memories],
                reads=bytes_of(memories, sources),
                writes=bytes_of(memories, targets),
                engine="sm",
            )
        )

    def clear(self, slots: Ints) -> None:
        """``MambaPool.clear_slots``."""
        self._tags[slots] = 0
        memories = [memory for memories in self._layers for memory in memories]
        gpu.current_stream().launch(
            Operation(
                "states cleared",
                work=[functools.partial(memory.clear, slots) for memory in memories],
                writes=bytes_of(memories, slots),
                engine="sm",
            )
        )

    def launch(
        self, name: str, read: dict[int, int], written: dict[int, int], *, exclusive: bool, ms: float | None
    ) -> None:
        """A forward's linear layers; ``read`` and ``written`` are states by slot."""
        from_slots, from_tags = _by_slot(read)
        to_slots, to_tags = _by_slot(written)
        self._tags[to_slots] = to_tags
        for nth, memories in enumerate(self._layers):
            self._counter.wait_until(self._first + nth)
            gpu.current_stream().launch(
                Operation(
                    f"{name}, states of layer {nth}",
                    work=[
                        *(functools.partial(self._read, each, from_slots, from_tags) for each in memories),
                        *(functools.partial(each.write, to_slots, to_tags) for each in memories),
                    ],
                    reads=bytes_of(memories, from_slots),
                    writes=bytes_of(memories, to_slots),
                    engine="sm",
                    exclusive_sms=exclusive,
                    ms=ms,
                )
            )

    def _read(self, memory: LayerBuffer, slots: Ints, tags: Words) -> None:
        self.wrong_reads += memory.wrong(slots, tags)


class States(Scheduler):
    """The overlap loop of a model that has linear layers too, without mixed batches."""

    def __init__(self, cache: Cache, options: Options, rng: random.Random) -> None:
        super().__init__(cache, replace(options, mixed=False), rng)
        self._requests = cache.requests
        self._states = StateForward(cache, self.ledger.device_states)
        self._requests.mamba_pool.copy_from = self._states.copy
        self._tracks = bool(self._requests.enable_mamba_extra_buffer)
        self._processor = _processor(cache)
        self._processed: ScheduleBatch | None = None
        self._admitted = 0

    @property
    def wrong_reads(self) -> int:
        return super().wrong_reads + self._states.wrong_reads

    def _next_batch(self) -> ScheduleBatch | None:
        if self._rng.random() < _PRESSED:
            self._others_want_slots()
        return super()._next_batch()

    def _others_want_slots(self) -> None:
        """Requests that are not followed take what the tree gives up, and every free slot of states, which
        a forward then writes.
        """
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

        tree, slots = self._cache.tree, self._requests.mamba_allocator
        pages = self._rng.choice((0, 0, 1, 4)) * self._rows.page_size
        tree.evict(EvictParams(num_tokens=pages, mamba_num=self._rng.choice((1, 2, SLOTS))))
        if self._rng.random() < 0.2:
            tree.evict_host(self._rng.choice((1, 2)), ComponentType.MAMBA)
        free = slots.alloc(slots.available_size())
        if free is not None and len(free):
            forwards = self.forward_stream if self.enable_overlap else gpu.current_stream()
            with gpu.stream(forwards):
                forwards.wait_stream(self.schedule_stream)
                self._states.clear(_slots(free))
            slots.free(free)

    def _admit(self, request: Any, left: int) -> bool:
        """Only where it, and each that runs, can have what its checkpoints take."""
        pool = self._requests
        each = 1 + pool.mamba_initial_tracking_slots
        there = pool.mamba_allocator.available_size() + self._cache.tree.mamba_evictable_size()
        spare = len(self._running) + self._admitted + 2
        if there < each * (self._admitted + 1) + spare:
            return False
        if not super()._admit(request, left):
            self._take_back_state(request)
            return False
        self._admitted += 1
        return True

    def _take_back_state(self, request: Any) -> None:
        """``get_new_batch_prefill``, of a request that matched and was not added after all."""
        request.kv.mamba_cow_src_index, request.kv.mamba_needs_clear = None, False
        if request.kv.holds_mamba:
            self._requests.mamba_allocator.free(request.kv.mamba_pool_idx.unsqueeze(-1))
            request.kv.mamba_pool_idx = None

    def _prefill_batch(self) -> ScheduleBatch | None:
        self._admitted = 0
        batch = super()._prefill_batch()
        if batch is not None:
            batch.states = self._prepare_for_extend(batch)
        return batch

    def _prepare_for_extend(self, batch: ScheduleBatch) -> Any:
        from sglang.srt.managers.schedule_batch import ScheduleBatch as Published

        config = SimpleNamespace(hf_text_config=SimpleNamespace(mamba_chunk_size=CHUNK))
        states = SimpleNamespace(
            model_config=config,
            tree_cache=self._cache.tree,
            req_to_token_pool=self._requests,
            tracked={},
        )
        for request in batch.requests if self._tracks else ():
            slots = request.kv.mamba_ping_pong_track_buffer
            slot = int(slots[request.kv.mamba_next_track_idx])
            entry = Published._mamba_radix_cache_v2_req_prepare_for_extend(states, request)
            if entry.track_mask:
                states.tracked[slot] = state_of(
                    self._tokens[request.rid][: request.kv.mamba_last_track_seqlen]
                )
        Published._collect_deferred_mamba_cow_and_clear(states, batch.requests)
        return states

    def _decode_batch(self) -> ScheduleBatch | None:
        batch = super()._decode_batch()
        if batch is not None:
            batch.states = self._prepare_for_decode(batch)
        return batch

    def _prepare_for_decode(self, batch: ScheduleBatch) -> Any:
        """``prepare_for_decode``, from where it counts the batch."""
        from sglang.srt.managers.schedule_batch import ScheduleBatch as Published
        from sglang.srt.managers.schedule_batch import set_mamba_track_indices_from_reqs
        from sglang.srt.runtime_context import mamba_track_grid

        for request in batch.requests:
            request.decode_batch_idx += 1
        states = SimpleNamespace(
            reqs=list(batch.requests),
            req_to_token_pool=self._requests,
            req_pool_indices=torch.tensor([each.kv.req_pool_idx for each in batch.requests]),
            spec_algorithm=SimpleNamespace(is_none=lambda: True),
            mamba_track_mask_cpu=None,
            mamba_track_buffer_indices=None,
            mamba_decode_batch_idx_cpu=[each.decode_batch_idx for each in batch.requests],
            tracked={},
        )
        if self._tracks:
            interval = mamba_track_grid(self._cache.tree.page_size)
            lengths = [stop for _, stop in batch.spans]
            if self._requests.enable_mamba_extra_buffer_lazy:
                states.seq_lens_cpu = torch.tensor(lengths)
                Published.mamba_lazy_prealloc_at_boundary(states, interval)
            set_mamba_track_indices_from_reqs(states)
            states.mamba_track_mask_cpu = [length % interval == 0 for length in lengths]
            states.mamba_track_mask_next_cpu = [length % interval == interval - 1 for length in lengths]
        return states

    def _launch(self, batch: ScheduleBatch, described: ForwardBatch) -> None:
        super()._launch(batch, described)
        states = batch.states
        if getattr(states, "mamba_clear_indices", None) is not None:
            self._states.clear(_slots(states.mamba_clear_indices))
        if getattr(states, "mamba_cow_src_indices", None) is not None:
            self._requests.copy_mamba_state(states.mamba_cow_src_indices, states.mamba_cow_dst_indices)
        read, written = {}, dict(states.tracked)
        for nth, (request, (start, stop)) in enumerate(zip(batch.requests, batch.spans, strict=True)):
            tokens, slot = self._tokens[request.rid], int(request.kv.mamba_pool_idx)
            if start:
                read[slot] = state_of(tokens[:start])
            written[slot] = state_of(tokens[:stop])
            decodes = batch.forward_mode.is_decode()
            if decodes and states.mamba_track_mask_cpu and states.mamba_track_mask_cpu[nth]:
                written[int(states.mamba_track_indices[nth])] = written[slot]
        self._states.launch(described.name, read, written, exclusive=described.exclusive, ms=described.ms)

    def _process(self, batch: ScheduleBatch) -> None:
        self._processed = batch
        super()._process(batch)

    def _commit(self, request: Any, sampled: list[int], *, prefilled: bool) -> None:
        if prefilled:
            super()._commit(request, sampled, prefilled=prefilled)
            return
        batch = self._processed
        assert batch is not None
        nth = next(at for at, each in enumerate(batch.requests) if each is request)
        request.output_ids.extend(sampled)
        request.update_finish_state(len(sampled))
        self._processor._handle_finish_state_updated_req(request, batch.states, _RESULT, nth, None)


class StatesNoOverlap(States, NoOverlap):
    """The loop without overlap, of such a model."""


class SynchronizeStates(Callers, States):
    """The overlap loop of such a model, and callers that wait for a write."""


def _processor(cache: Cache) -> Any:
    """``SchedulerBatchResultProcessor``, with what it reads of a server that only serves text."""
    from sglang.srt.managers.scheduler_components.batch_result_processor import (
        SchedulerBatchResultProcessor,
    )

    nothing: dict[str, Any] = dict.fromkeys(each.name for each in fields(SchedulerBatchResultProcessor))
    return SchedulerBatchResultProcessor(**{**nothing, "tree_cache": cache.tree})


def _by_slot(states: dict[int, int]) -> tuple[Ints, Words]:
    return (
        np.fromiter(states.keys(), dtype=np.int64, count=len(states)),
        np.fromiter(states.values(), dtype=np.uint64, count=len(states)),
    )


def _slots(indices: Any) -> Ints:
    return np.asarray(indices, dtype=np.int64).reshape(-1)
