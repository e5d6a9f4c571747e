"""Speculative decoding under overlap: a step launches a draft, the verification, a draft extension."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from ....io_backends.virtual import gpu
from ....io_backends.virtual.operations import Operation
from . import forward as model
from .batches import Options, ScheduleBatch
from .cache import Cache
from .loops import Callers
from .scheduler import VOCABULARY, Scheduler

DRAFT_TOKENS = 3
"""``speculative_num_draft_tokens``: rows that a verification writes for each request."""


class Speculative(Scheduler):
    """EAGLE, as speculative/eagle_worker_v2.py runs it: the draft model has the last layers.

    How many tokens a verification accepts is known to the GPU when it is done, and to the host when the
    result is processed; the next step is launched before that. Rows of refused tokens are written again.
    """

    speculative = True

    def __init__(self, cache: Cache, options: Options, rng: random.Random) -> None:
        # Mixed batches decode without drafts.
        super().__init__(cache, replace(options, mixed=False), rng)
        # seq_lens on the GPU: committed rows, those in flight included.
        self._lengths: dict[str, int] = {}

    def _decode_batch(self) -> ScheduleBatch | None:
        """eagle_utils.py: ``eagle_prepare_for_decode``."""
        self._retract()
        if not self._running:
            return None
        for request in self._running:
            self._rows.reserve(request, self._reserved(request))
        spans = [
            (self._lengths[request.rid], self._lengths[request.rid] + DRAFT_TOKENS)
            for request in self._running
        ]
        return ScheduleBatch(self._modes.DECODE, list(self._running), spans, decoding=list(self._running))

    def _reserved(self, request: Any) -> int:
        """allocation_sizing.py: ``page_aligned_decode_alloc_lens``; twice what a step writes."""
        from sglang.srt.mem_cache.allocation_sizing import page_aligned_decode_alloc_lens

        _, (wanted,), _ = page_aligned_decode_alloc_lens(
            [request], reserve=2 * DRAFT_TOKENS, page_size=self._rows.page_size
        )
        return int(wanted)

    def _must_retract(self) -> bool:
        wanted = sum(
            self._reserved(each) - self._rows.whole_pages(each.kv.kv_allocated_len) for each in self._running
        )
        return bool(self._running) and wanted > self._rows.free

    def _describe(self, batch: ScheduleBatch) -> model.ForwardBatch:
        if not batch.forward_mode.is_decode():
            described = super()._describe(batch)
            self._lengths.update(
                (request.rid, stop) for request, (_, stop) in zip(batch.requests, batch.spans, strict=True)
            )
            return described
        guessed = {}
        for request in batch.requests:
            tokens = self._tokens[request.rid]
            drafts = [self._rng.randrange(VOCABULARY) for _ in range(DRAFT_TOKENS)]
            guessed[request.rid] = [*tokens, *drafts[1:]]
            # The accepted drafts, and the token that the target adds.
            accepted = self._rng.randint(1, DRAFT_TOKENS)
            batch.sampled.append([*drafts[1:accepted], drafts[0]])
            tokens += batch.sampled[-1]
            self._lengths[request.rid] += accepted
        return self._described(batch, guessed)

    def _launch(self, batch: ScheduleBatch, described: model.ForwardBatch) -> None:
        """``forward_batch_generation`` of the worker; a prefill is followed by the draft's, on its layers."""
        if not batch.forward_mode.is_decode():
            super()._launch(batch, described)
            return
        target = range(self._cache.setup.layers)
        drafts = range(len(target), len(self._cache.layers))
        extends = "extend" in self._options.exclusive
        self._cache.controller.layer_done_counter.set_consumer(batch.hicache_consumer_index)
        gpu.current_stream().launch(Operation(f"{described.name}, metadata"))
        draft = replace(described, name="forward draft")
        self._forward.launch_layers(draft, drafts)
        # speculative_attention_mode: prefill, so the prefill backend verifies.
        verify = replace(described, name="forward verify", exclusive=extends)
        self._forward.launch_layers(verify, target)
        gpu.current_stream().launch(Operation("forward draft extend, metadata"))
        batch.read_done = gpu.current_stream().record_event()
        self._forward.launch_layers(
            replace(described, name="forward draft extend", exclusive=extends), drafts
        )

    def _commit(self, request: Any, sampled: list[int], *, prefilled: bool) -> None:
        """batch_result_processor.py: ``_resolve_spec_v2_tokens``."""
        if not prefilled:
            request.kv.kv_committed_len += len(sampled)
        super()._commit(request, sampled, prefilled=prefilled)


class SynchronizeSpeculative(Callers, Speculative):
    """The same, with callers that wait for a write."""
