"""SGLang's own radix cache with its pools, allocator and controller, small enough to run a thousand times.

Built once for a setup, as ``create_unified_radix_cache`` in SGLang's mem_cache/registry.py does, and given a
new virtual device for each run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ....io_backends.sglang.pools.geometry import host_buffers
from ....io_backends.virtual import gpu
from ....io_backends.virtual.ranges import ByteRanges
from . import machine
from .forward import Ints, LayerBuffer, Words
from .kernels import PagedRows, StridedRows
from .linear_layers import CHUNK, INTERVAL, StateMemory, hybrid_pool, request_table
from .offload import offload_manager, restart_offload
from .published import published

REQUESTS = 8
"""Rows of the table of requests."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated.

    Attributes:
        kv_kind, mem_layout, page_size, gpu_arch: as in the policy's facts.
        io_backend: what SGLang itself is told.
        draft: whether a draft model has a pool of its own, written with the target's.
        eagle: whether it is EAGLE's, and decodes with the target.
        offload: whether a decode server offloads by a controller and a host pool of its own, beside the tree.
        states: ``--mamba-radix-cache-strategy`` of a model that has linear layers too; empty: it has none.
        write_policy: ``--hicache-write-policy``.
        layers: of the target.
        pages: of the device pool.
        host_ratio: the host pool's size, in device pools.
    """

    kv_kind: str
    mem_layout: str
    page_size: int
    gpu_arch: str
    io_backend: str
    draft: bool = True
    eagle: bool = False
    offload: bool = False
    states: str = ""
    write_policy: str = "write_through"
    layers: int = 2
    pages: int = 16
    host_ratio: float = 4.0

    @property
    def tokens(self) -> int:
        """Of the device pool: pages of at least 4 tokens' worth, so that requests differ in length."""
        return self.pages * max(self.page_size, 4)


class Cache:
    """One setup's cache.

    Attributes:
        tree: ``UnifiedRadixCache``.
        offload: ``DecodeKVCacheOffloadManager``, or None.
        controller: the ``HiCacheController`` of whichever writes to the host.
        allocator, requests: the device pool's allocator, and the table of requests.
        layers: device memory of each layer, the draft's last.
        states: of the linear layers, or None.
        host_pools: of rows.
    """

    def __init__(self, setup: Setup) -> None:
        machine.install()
        machine.set_arch(setup.gpu_arch)
        gpu.reset()
        self._server_args = server_args = _server_args(setup)
        _publish(server_args)
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        self.setup = setup
        dtype = torch.bfloat16
        rows = _device_pool(setup, setup.kv_kind, setup.layers)
        components = [ComponentType.FULL]
        if setup.states:
            self.requests = request_table(setup, REQUESTS)
            self.device_pool = hybrid_pool(setup, rows, self.requests)
            components.append(ComponentType.MAMBA)
        else:
            self.requests = ReqToTokenPool(REQUESTS, 2 * setup.tokens, "cpu", False)
            self.device_pool = rows
        if setup.page_size == 1:
            self.allocator = TokenToKVPoolAllocator(setup.tokens, dtype, "cpu", self.device_pool, False)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(
                setup.tokens, setup.page_size, dtype, "cpu", self.device_pool, False
            )
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.requests,
            token_to_kv_pool_allocator=self.allocator,
            page_size=setup.page_size,
            tree_components=tuple(components),
            is_eagle=setup.eagle,
            enable_mamba_extra_buffer=setup.states.startswith("extra_buffer"),
            enable_mamba_extra_buffer_lazy=setup.states == "extra_buffer_lazy",
        )
        self.tree = UnifiedRadixCache(params)
        device_pools = [rows]
        self.states: StateMemory | None = None
        self.offload = offload_manager(self) if setup.offload else None
        if self.offload is None:
            self.tree.init_hicache(server_args, params)
            self.controller = self.tree.cache_controller
            if setup.draft:
                device_pools.append(self._add_draft())
            self.host_pools = [entry.host_pool for entry in self.controller.mem_pool_host.entries]
            if setup.states:
                self.states = StateMemory(self.requests, self.host_pools.pop())
        else:
            self.controller = self.offload.cache_controller
            self.host_pools = [self.offload.decode_host_mem_pool]
        self.layers = _layers(device_pools)
        self._host_layers = _host_layers(self.host_pools)

    def _add_draft(self) -> Any:
        """A draft model's pool beside the target's, as in SGLang's mem_cache/kv_cache_builder.py."""
        from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import build_hicache_draft_sidecars

        pool = _device_pool(self.setup, self.setup.kv_kind, 1)
        specs, entries = build_hicache_draft_sidecars(draft_device_pools=(pool,), tree_cache=self.tree)
        for spec, entry in zip(specs, entries, strict=True):
            self.tree.register_sidecar_pool(spec, entry)
        return pool

    def restart(self, forward_stream: Any | None) -> None:
        """As after a start of the server, on the present virtual device.

        The forward stream is handed over as ``Scheduler.__init__`` (managers/scheduler.py) does, to the
        fences that this version of SGLang has; None: it hands none over.
        """
        from sglang.srt.managers.cache_controller import LayerDoneCounter
        from sglang.srt.mem_cache.l2_transfer import L2TransferEngine

        if self.states is not None:
            _publish(self._server_args)  # another cache may have been built since; its strategy is looked up
        controller = self.controller
        vars(controller).pop("reset", None)
        vars(self.tree).pop("_pp_sync", None)
        self.tree.disable, self.tree.pp_rank, self.tree.pp_size = False, 0, 1
        self.tree.reset()
        self.requests.clear()
        self.allocator.clear()
        if self.offload is not None:
            restart_offload(self.offload)
        controller.l2_transfer_engine = engine = L2TransferEngine(self.setup.io_backend)
        engine.device_to_host_stream.name = "transfer"
        engine.host_to_device_stream.name = "load"
        counter = LayerDoneCounter(controller.transfer_layer_id_max)
        controller.layer_done_counter = counter
        self.device_pool.register_layer_transfer_counter(counter)
        if self.states is not None:
            self.requests.register_layer_transfer_counter(counter)
        if published().load_fence:
            controller.load_fence_stream = forward_stream
        if published().write_fence:
            controller.write_fence_stream = forward_stream
        of_states = [] if self.states is None else [self.states]
        for memories in [*self.layers, *(layer for each in of_states for layer in each.layers)]:
            for memory in memories:
                memory.fill(machine.POISON)
        for pool in [*self.host_pools, *(each.host_pool for each in of_states)]:
            for buffer in host_buffers(pool):
                buffer.view(torch.uint8).fill_(machine.POISON)

    def device_bytes(self) -> ByteRanges:
        """All device rows, and states."""
        slots = np.arange(self.setup.tokens + self.setup.page_size)
        spans = [memory.rows.spans(slots) for memories in self.layers for memory in memories]
        if self.states is not None:
            spans.append(self.states.device_bytes())
        return ByteRanges.of(np.concatenate(spans))

    def wrong_on_host(self, slots: Ints, tags: Words) -> int:
        """How many of these host rows, of all layers and components, hold something else."""
        wrong = 0
        for memories, refs in zip(self.layers, self._host_layers, strict=True):
            for memory, (rows, pages) in zip(memories, refs, strict=True):
                where = slots if pages is None else pages.at(slots)
                found = rows.view(where)[where].view(np.uint64)
                wrong += int((found != memory.expected(tags)).any(axis=1).sum())
        return wrong

    def host_bytes(self, slots: Ints) -> ByteRanges:
        """Where these host rows are."""
        return ByteRanges.of(
            np.concatenate(
                [
                    rows.spans(slots if pages is None else pages.at(slots))
                    for refs in self._host_layers
                    for rows, pages in refs
                ]
            )
        )


def _host_layers(host_pools: list[Any]) -> list[list[tuple[StridedRows, PagedRows | None]]]:
    """Host rows of each layer and component as SGLang itself indexes them: by slot, or by page and offset."""
    found: list[list[tuple[StridedRows, PagedRows | None]]] = []
    for pool in host_pools:
        buffers = [pool.k_buffer, pool.v_buffer] if hasattr(pool, "k_data_refs") else [pool.kv_buffer]
        refs = [pool.k_data_refs, pool.v_data_refs] if hasattr(pool, "k_data_refs") else [pool.data_refs]
        for layer in range(pool.layer_num):
            if pool.layout == "page_first_direct":
                pages = [PagedRows.of(buffer, layer) for buffer in buffers]
                found.append([(each.rows, each) for each in pages])
            else:
                found.append([(StridedRows.of(each[layer]), None) for each in refs])
    return found


def _server_args(setup: Setup) -> Any:
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(
        model_path="dummy",
        device="cpu",
        enable_hierarchical_cache=True,
        hicache_ratio=setup.host_ratio,
        hicache_mem_layout=setup.mem_layout,
        hicache_io_backend=setup.io_backend,
        hicache_write_policy=setup.write_policy,
        page_size=setup.page_size,
        speculative_algorithm="EAGLE" if setup.eagle else None,
        disaggregation_decode_enable_offload_kvcache=setup.offload,
        mamba_radix_cache_strategy=setup.states or "auto",
        mamba_track_interval=INTERVAL,
    )
    # Else SGLang reads the model's configuration.
    server_args._mamba_cache_chunk_size = max(CHUNK, setup.page_size)
    return server_args


def _publish(server_args: Any) -> None:
    """The process's configuration, which SGLang's pools and controller read."""
    from sglang.srt.runtime_context import publish

    publish(server_args, role="scheduler")


def _device_pool(setup: Setup, kind: str, layers: int) -> Any:
    """Rows of 128 bytes, the smallest that SGLang's kernels take."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    dtype = torch.bfloat16
    if kind == "mha":
        return MHATokenToKVPool(setup.tokens, setup.page_size, dtype, 1, 64, layers, "cpu", False)
    return MLATokenToKVPool(setup.tokens, setup.page_size, dtype, 48, 16, layers, "cpu", False)


def _layers(device_pools: list[Any]) -> list[list[LayerBuffer]]:
    numbers = iter(range(1 << 8))
    layers = []
    for pool in device_pools:
        parts = [pool.k_buffer, pool.v_buffer] if hasattr(pool, "k_buffer") else [pool.kv_buffer]
        layers += [
            [LayerBuffer(next(numbers), tensor) for tensor in tensors] for tensors in zip(*parts, strict=True)
        ]
    return layers
