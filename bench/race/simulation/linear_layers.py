"""SGLang's pools of a model that has linear layers beside its attention, small."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ....io_backends.virtual.ranges import ByteRanges
from .forward import Ints, LayerBuffer, Words
from .kernels import StridedRows

if TYPE_CHECKING:
    from .cache import Setup

LAYERS = 2
SLOTS = 32
"""Of states: three for each request that runs, and some for the tree, so that it must give up some."""
CHUNK = 4
"""Tokens at whose multiples a prefill can leave a state; a page, where pages are larger."""
INTERVAL = 8
"""Tokens at whose multiples a decode leaves one (``--mamba-track-interval``)."""
_FIRST_NUMBER = 100
"""Of memories, so that no state looks like a row."""


def request_table(setup: Setup, requests: int) -> Any:
    """The table of requests, which has the states (``HybridReqToTokenPool``)."""
    from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
    from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool

    layers = list(range(setup.layers, setup.layers + LAYERS))
    shape = Mamba2StateShape.create(
        tp_world_size=1,
        intermediate_size=16,
        n_groups=1,
        num_heads=2,
        head_dim=4,
        state_size=8,
        conv_kernel=5,
    )
    return HybridReqToTokenPool(
        size=requests,
        mamba_size=SLOTS,
        mamba_spec_state_size=requests,
        max_context_len=2 * setup.tokens,
        device="cpu",
        enable_memory_saver=False,
        cache_params=Mamba2CacheParams(shape=shape, layers=layers),
        mamba_layer_ids=layers,
        enable_mamba_extra_buffer=setup.states != "no_buffer",
        enable_mamba_extra_buffer_lazy=setup.states == "extra_buffer_lazy",
        enable_overlap_schedule=setup.states != "no_buffer",
    )


def hybrid_pool(setup: Setup, rows: Any, requests: Any) -> Any:
    """``HybridLinearKVPool``: the rows of the attention layers, and where the states are."""
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool

    return HybridLinearKVPool(
        size=setup.tokens,
        dtype=rows.dtype,
        page_size=setup.page_size,
        head_num=1,
        head_dim=64,
        full_attention_layer_ids=list(range(setup.layers)),
        device="cpu",
        mamba_pool=requests.mamba_pool,
        use_mla=setup.kv_kind == "mla",
        full_kv_pool=rows,
    )


class StateMemory:
    """Device and host memory of the states.

    Attributes:
        host_pool: ``MambaPoolHost``.
        slots: on the device, the one for padding included.
        layers: device memories of each linear layer, its temporal state first.
    """

    def __init__(self, requests: Any, host_pool: Any) -> None:
        cache = requests.mamba_pool.mamba_cache
        numbers = iter(range(_FIRST_NUMBER, 1 << 8))
        arrays = [cache.temporal, *cache.conv]
        self.host_pool = host_pool
        self.slots = SLOTS + 1
        self.layers = [
            [LayerBuffer(next(numbers), array[layer]) for array in arrays] for layer in range(LAYERS)
        ]
        buffers = [host_pool.temporal_buffer, *host_pool.conv_buffer]
        self._host = [[StridedRows.of(buffer[:, layer, 0]) for buffer in buffers] for layer in range(LAYERS)]

    def device_bytes(self) -> Ints:
        """Of all states: [start, stop) addresses, int64 [n, 2]."""
        slots = np.arange(self.slots)
        return np.concatenate([each.rows.spans(slots) for memories in self.layers for each in memories])

    def wrong_on_host(self, slots: Ints, tags: Words) -> int:
        """How many of these host states, by layer and array, are others."""
        return sum(
            int((rows.view(slots)[slots].view(np.uint64) != memory.expected(tags)).any(axis=1).sum())
            for memories, refs in zip(self.layers, self._host, strict=True)
            for memory, rows in zip(memories, refs, strict=True)
        )

    def host_bytes(self, slots: Ints) -> ByteRanges:
        """Where these host states are."""
        return ByteRanges.of(np.concatenate([rows.spans(slots) for refs in self._host for rows in refs]))
