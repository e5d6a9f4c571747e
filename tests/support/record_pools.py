"""SGLang's own pools of pages and states, on the CPU: built small, filled, and copied by SGLang's own views.

``copied`` is the reference: rows moved by torch indexing alone, as SGLang's load reads them back. It knows
nothing of addresses or of this project's descriptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

LAYERS = 3
POISON = 0xA5
STEPPED = ("page_rows", "dcp")
"""Kinds of which several indices stand for one row."""

KINDS = ("states", "index_pages", "packed_pages", "page_rows", "dcp", "keys_only")
CASES = [
    ("states", "page_first"),
    ("states", "page_first_direct"),
    ("index_pages", "layer_first"),
    ("index_pages", "page_first"),
    ("index_pages", "page_first_direct"),
    ("packed_pages", "page_first"),
    ("packed_pages", "page_first_direct"),
    ("page_rows", "page_first"),
    ("page_rows", "page_first_direct"),
    ("dcp", "layer_first"),
    ("dcp", "page_first"),
    ("dcp", "page_first_direct"),
    ("keys_only", "layer_first"),
    ("keys_only", "page_first"),
    ("keys_only", "page_first_direct"),
]
"""Kinds, and the layouts in which they are described."""


@dataclass
class RecordPool:
    """A host pool, its device pool, and (host rows, device rows) of each array, a record each along axis 0.

    ``per_record`` is how many of SGLang's indices one record takes.
    """

    kind: str
    host: Any
    device: Any
    rows: list[tuple[Any, Any]]
    per_record: int
    device_records: int

    @property
    def indices(self) -> int:
        """That the host pool hands out."""
        return int(getattr(self.host, "logical_size", self.host.size))

    def bytes_of(self, records: int) -> int:
        """Of so many records, in all arrays."""
        return records * sum(each[0].numel() * each.element_size() for each, _ in self.rows)

    def slots(self, records: int, seed: int = 0) -> tuple[Any, Any]:
        """Host and device indices of that many records, fragmented, each record's whole and in order."""
        import torch

        rng = np.random.default_rng(seed)

        def some(total: int) -> Any:
            picked = rng.permutation(total)[:records]
            return torch.from_numpy((picked[:, None] * self.per_record + np.arange(self.per_record)).ravel())

        return some(self.indices // self.per_record), some(self.device_records)

    def assert_copied(self, host: Any, device: Any) -> None:
        """Every record is where it belongs, and every other byte of the host pool is as it was."""
        import torch

        host, device = (
            host[:: self.per_record] // self.per_record,
            device[:: self.per_record] // self.per_record,
        )
        for on_host, on_device in self.rows:
            got = on_host.reshape(on_host.shape[0], -1).contiguous().view(torch.uint8)
            want = torch.full_like(got, POISON)
            moved = on_device.cpu().reshape(on_device.shape[0], -1).contiguous().view(torch.uint8)
            want[host] = moved[device]
            assert torch.equal(got, want)


def build(kind: str, layout: str, *, strided: bool = False, device: str = "cpu") -> RecordPool:
    """One of :data:`KINDS` in a host layout; device records random, host memory poisoned.

    Args:
        strided: states of a slot together with others, as unified memory has them.
        device: of the records; host memory is pinned where that is a GPU.
    """
    import torch

    torch.manual_seed(0)
    pool = {
        "states": _states,
        "index_pages": _index_pages,
        "packed_pages": _packed_pages,
        "page_rows": _page_rows,
        "dcp": _dcp,
        "keys_only": _keys_only,
    }[kind](layout, strided, device)
    for _, records in pool.rows:
        records.copy_(
            torch.randint(0, 256, (*records.shape, records.element_size()), dtype=torch.uint8)
            .view(records.dtype)
            .squeeze(-1)
        )
    from sglang_hicache.io_backends.sglang.pools.geometry import host_buffers

    for buffer in host_buffers(pool.host):
        buffer.view(-1).view(torch.uint8).fill_(POISON)
    return pool


def _states(layout: str, strided: bool, on: str) -> RecordPool:
    import torch
    from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo
    from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost

    slots = 24
    # Whole 16 bytes each: SGLang's kernel for page_first refuses others.
    temporal = torch.zeros(LAYERS, slots, 2 * (1 + strided), 8, 6, dtype=torch.float32, device=on)[:, :, :2]
    conv = [torch.zeros(LAYERS, slots, width, 3, dtype=torch.bfloat16, device=on) for width in (8, 16)]
    info = MambaStateBufferInfo(conv=tuple(conv), temporal=temporal)
    host = MambaPoolHost(info, 2.0, 0, device_capacity=slots, layout=layout, pin_memory=on != "cpu")
    rows = [
        (buffer[:, layer, 0], device[layer])
        for buffer, device in zip([host.temporal_buffer, *host.conv_buffer], [temporal, *conv], strict=True)
        for layer in range(LAYERS)
    ]
    return RecordPool("states", host, SimpleNamespace(), rows, 1, slots)


class Anchor:
    """What an indexer's host pool reads of the pool of keys and values that it follows."""

    def __init__(self, layout: str, page_size: int, pages: int, on: str) -> None:
        self.layout, self.page_size, self.page_num = layout, page_size, pages
        self.size = pages * page_size
        self.device = "cpu"
        self.pin_memory = on != "cpu"


def _index_pages(layout: str, strided: bool, on: str) -> RecordPool:
    import torch
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
    from sglang.srt.mem_cache.pool_host.dsa import DSAIndexerPoolHost, make_dsa_indexer_pool_decl

    page, pages = 64, 12
    device = DSATokenToKVPool(
        size=pages * page,
        page_size=page,
        kv_lora_rank=64,
        dtype=torch.bfloat16,
        qk_rope_head_dim=16,
        layer_num=LAYERS,
        device=on,
        index_head_dim=128,
        enable_memory_saver=False,
        kv_cache_dim=80,
        # One layer takes the choice of the layer before it, and has no keys of its own.
        skip_topk_layers=[False, True, False],
    )
    decl = make_dsa_indexer_pool_decl(device)
    host = DSAIndexerPoolHost(decl, Anchor(layout, page, 20, on), pin_memory=on != "cpu")
    buffer = host.index_k_with_scale_buffer
    on_host = buffer.unbind(0) if layout == "layer_first" else buffer[:, :, 0].unbind(1)
    rows = list(zip(on_host, host.packed_device_index_buffers, strict=True))
    return RecordPool("index_pages", host, device, rows, page, pages)


def _packed_pages(layout: str, strided: bool, on: str) -> RecordPool:
    import torch
    from sglang.srt.mem_cache.pool_host.qsa import QSAIndexerPoolHost

    page, pages, ratio = 16, 12, 4
    device = SimpleNamespace(
        qsa_compress_ratio=ratio,
        qsa_compressed_k_buffer_pool=[
            torch.zeros(pages * page // ratio, 1, 32, dtype=torch.bfloat16, device=on) for _ in range(LAYERS)
        ],
    )
    anchor = Anchor(layout, page, 20, on)
    host = QSAIndexerPoolHost(device, anchor)
    on_host = [
        host.kv_buffer[:, layer] if layout == "page_first" else host.kv_buffer[:, layer, 0]
        for layer in range(LAYERS)
    ]
    rows = list(zip(on_host, host.device_buffers, strict=True))
    return RecordPool("packed_pages", host, device, rows, page, pages)


def _page_rows(layout: str, strided: bool, on: str) -> RecordPool:
    """Pages of 8 tokens whose bytes are no multiple of 8, in whole 16 bytes."""
    import torch
    from sglang.srt.mem_cache.memory_pool_host import DeepSeekV4PagedHostPool

    page, pages, nbytes = 8, 12, 144 + 16 * 5
    buffers = [torch.zeros(pages, nbytes, dtype=torch.uint8, device=on) for _ in range(LAYERS)]
    host = DeepSeekV4PagedHostPool(
        "deepseek_v4_c4", buffers, nbytes, 20, page, layout, pin_memory=on != "cpu"
    )
    on_host = [
        host.kv_buffer[layer]
        if layout == "layer_first"
        else host.kv_buffer[:, layer]
        if layout == "page_first"
        else host.kv_buffer[:, layer, 0]
        for layer in range(LAYERS)
    ]
    return RecordPool(
        "page_rows", host, SimpleNamespace(), list(zip(on_host, buffers, strict=True)), page, pages
    )


DCP = 4


def _dcp(layout: str, strided: bool, on: str) -> RecordPool:
    """Latent rows of which the ranks of decode context parallelism have every fourth; of rank 1."""
    import torch
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    page, pages = 8, 12
    rows = pages * page
    device = MLATokenToKVPool(
        rows,
        page,
        torch.bfloat16,
        kv_lora_rank=48,
        qk_rope_head_dim=16,
        layer_num=LAYERS,
        device=on,
        enable_memory_saver=False,
    )
    host = MLATokenToKVPoolHost(
        device.get_device_pool_infos()[0].buffer_info,
        2.0,
        0,
        page * DCP,
        layout,
        pin_memory=on != "cpu",
        override_kv_cache_dim=device.kv_cache_dim,
        dcp_size=DCP,
        dcp_rank=1,
        device_capacity_tokens=rows,
        start_layer=0,
        end_layer=LAYERS,
        target_layer_num=LAYERS,
    )
    buffer = host.kv_buffer
    on_host = [
        buffer[layer]
        if layout == "layer_first"
        else buffer[:, layer].reshape(-1, 1, host.kv_cache_dim)
        if layout == "page_first"
        else buffer[:, layer]
        for layer in range(LAYERS)
    ]
    if layout != "page_first_direct":
        return RecordPool("dcp", host, device, list(zip(on_host, device.kv_buffer, strict=True)), DCP, rows)
    paged = [
        (at, each.view(-1, page, 1, host.kv_cache_dim))
        for at, each in zip(on_host, device.kv_buffer, strict=True)
    ]
    return RecordPool("dcp", host, device, paged, page * DCP, pages)


def _keys_only(layout: str, strided: bool, on: str) -> RecordPool:
    import torch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKOnlyPool
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKOnlyPoolHost

    page, pages = 8, 12
    device = MHATokenToKOnlyPool(pages * page, page, torch.bfloat16, 2, 16, LAYERS, on, False)
    host = MHATokenToKOnlyPoolHost(device, Anchor(layout, page, 20, on), layout, pin_memory=on != "cpu")
    buffer = host.k_buffer
    on_host = [
        buffer[layer]
        if layout == "layer_first"
        else buffer[:, layer].reshape(-1, *device.k_buffer[0].shape[1:])
        if layout == "page_first"
        else buffer[:, layer]
        for layer in range(LAYERS)
    ]
    shape = (-1, page, *device.k_buffer[0].shape[1:])
    if layout == "page_first_direct":
        rows = [
            (host_rows, rows.view(shape)) for host_rows, rows in zip(on_host, device.k_buffer, strict=True)
        ]
        return RecordPool("keys_only", host, device, rows, page, pages)
    return RecordPool(
        "keys_only", host, device, list(zip(on_host, device.k_buffer, strict=True)), 1, pages * page
    )
