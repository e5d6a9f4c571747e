"""SGLang's host pools described as geometry, or a reason why one is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...plan.geometry import LAYOUTS, Component, PoolGeometry, host_strides

OTHER_KINDS: Mapping[str, tuple[str, str]] = {
    "MambaPoolHost": ("Mamba", "holds states, not a row for each token"),
    "DSAIndexerPoolHost": ("DSA indexer", "holds keys page by page, with their scales between them"),
    "QSAIndexerPoolHost": ("QSA indexer", "holds compressed keys page by page"),
    "DeepSeekV4PagedHostPool": ("DeepSeek V4", "holds pages of several sub-pools"),
    "MHATokenToKOnlyPoolHost": ("sparse index", "holds keys without values"),
    "MHATokenToKVPoolMXFP8Host": ("MXFP8", "holds the scales of its blocks beside its rows"),
    "MiniMaxM3Nvfp4MainKVPoolHost": ("NVFP4", "holds packed pages of keys, values and scales"),
    "MiniMaxM3Nvfp4IndexKPoolHost": ("NVFP4 index", "holds packed pages of keys and scales"),
    "HiSparseMHATokenToKVPoolHost": ("HiSparse", "is copied by HiSparse itself"),
    "UnifiedPageEnvelopeHostPool": ("unified memory", "moves whole pages whose indices SGLang translates"),
}
"""Host pools of SGLang (0.5.18 to 0.5.23) that its own copy writes back: class, what it holds, and why."""


class UnsupportedPoolError(ValueError):
    """A pool that cannot be described; the message says why, as a sentence for the operator."""


def describe_pool(host_pool: Any) -> PoolGeometry:
    """Geometry of an SGLang host pool and the device buffers it mirrors.

    Raises:
        UnsupportedPoolError: the pool is of a kind, layout or placement that the backends do not cover.
    """
    kind = type(host_pool).__name__
    label = str(getattr(host_pool, "pool_label", "kv"))
    # By exact class: a subclass may hold its rows differently (MXFP8 scales, HiSparse).
    describe_kind = {
        "MHATokenToKVPoolHost": _mha,
        "AsymmetricMHATokenToKVPoolHost": _mha,
        "MLATokenToKVPoolHost": _mla,
    }.get(kind)
    if describe_kind is None:
        _, why = OTHER_KINDS.get(kind, ("", "is not a plain MHA or MLA pool"))
        raise UnsupportedPoolError(f"{kind} {why}")
    if host_pool.layout not in LAYOUTS:
        raise UnsupportedPoolError(f"layout {host_pool.layout} is not covered")
    if getattr(host_pool, "dcp_size", 1) > 1:
        raise UnsupportedPoolError("decode context parallelism translates its indices inside the pool")
    if getattr(host_pool, "shared_allocation_domain", None) is not None:
        raise UnsupportedPoolError("its host memory is shared with other pools and may move")
    device_pool = getattr(host_pool, "device_pool", None)
    if getattr(host_pool, "_layer_shard_enabled", False) or getattr(
        device_pool, "layer_shard_enabled", False
    ):
        raise UnsupportedPoolError("its layers are sharded over ranks")
    if getattr(host_pool, "kv_buffer", None) is None:
        raise UnsupportedPoolError("it holds no host buffer (allocator only)")
    return describe_kind(host_pool, label)


def _mha(pool: Any, label: str) -> PoolGeometry:
    k_rows = _device_buffers(pool, "k")
    v_rows = _device_buffers(pool, "v")
    element = pool.head_num * pool.dtype.itemsize
    # K and V of different width have a buffer each, or else each half of one buffer.
    v_dim = getattr(pool, "v_head_dim", None) or pool.head_dim
    parts = [
        _component(pool, "k", k_rows, pool.k_buffer, element * pool.head_dim, pool.head_num),
        _component(pool, "v", v_rows, pool.v_buffer, element * v_dim, pool.head_num),
    ]
    return _geometry(pool, label, "mha", k_rows, tuple(parts), pool.head_num)


def _mla(pool: Any, label: str) -> PoolGeometry:
    if getattr(pool, "_native_buffers", None) is not None:
        raise UnsupportedPoolError("its device buffers are split (Ascend)")
    rows = _device_buffers(pool, "kv")
    row = pool.kv_cache_dim * pool.dtype.itemsize
    part = _component(pool, "kv", rows, pool.kv_buffer, row, 1)
    return _geometry(pool, label, "mla", rows, (part,), 1)


def _geometry(
    pool: Any, label: str, kv_kind: str, rows: Sequence[Any], parts: tuple[Component, ...], heads: int
) -> PoolGeometry:
    return PoolGeometry(
        label=label,
        kv_kind=kv_kind,
        layout=pool.layout,
        dtype=str(pool.dtype).removeprefix("torch."),
        heads=heads,
        layers=len(rows),
        page_size=pool.page_size,
        host_slots=pool.size,
        device_slots=int(rows[0].shape[0]),
        components=parts,
    )


def _component(
    pool: Any, name: str, rows: Sequence[Any], buffer: Any, row_bytes: int, heads: int
) -> Component:
    if len(rows) != pool.layer_num:
        raise UnsupportedPoolError(f"{len(rows)} device layers for {pool.layer_num} host layers")
    strides = {int(tensor.stride(0)) * tensor.element_size() for tensor in rows}
    if len(strides) != 1:
        raise UnsupportedPoolError(f"its device rows do not share one stride ({sorted(strides)} bytes)")
    first = rows[0]
    # One row must lie in one piece: every axis after the first is packed.
    if first.numel() and not first[0].is_contiguous():
        raise UnsupportedPoolError(f"its device rows are not contiguous ({tuple(first.stride())})")
    if int(first[0].numel()) * first.element_size() != row_bytes:
        raise UnsupportedPoolError(
            f"a device row has {int(first[0].numel()) * first.element_size()} bytes, a host row {row_bytes}"
        )
    host = host_strides(
        pool.layout,
        base=int(buffer.data_ptr()),
        layers=pool.layer_num,
        page_size=pool.page_size,
        slots=pool.size,
        row_bytes=row_bytes,
        heads=heads,
    )
    expected = pool.layer_num * pool.size * row_bytes
    if int(buffer.numel()) * buffer.element_size() != expected or not buffer.is_contiguous():
        raise UnsupportedPoolError(f"its host buffer is not the {expected} contiguous bytes of {pool.layout}")
    return Component(
        name=name,
        row_bytes=row_bytes,
        device_rows=tuple(int(tensor.data_ptr()) for tensor in rows),
        device_row_stride=strides.pop(),
        host=host,
    )


def host_buffers(host_pool: Any) -> tuple[Any, ...]:
    """The tensors that hold a pool's host memory."""
    buffer = getattr(host_pool, "kv_buffer", None)
    if buffer is None:
        return ()
    return tuple(buffer) if isinstance(buffer, tuple | list) else (buffer,)


def _device_buffers(pool: Any, name: str) -> tuple[Any, ...]:
    """Device tensors of one component, one per layer, packed drafts included."""
    # 0.5.22 and later keep them on the host pool; before, the device pool has them.
    captured = getattr(pool, f"device_{name}_buffers", None)
    if captured:
        return tuple(captured)
    packed = getattr(pool, f"packed_device_{name}_buffers", None)
    if packed:
        return tuple(packed)
    if getattr(pool, "mtp_draft_device_pools", ()):
        raise UnsupportedPoolError("its packed draft buffers are not exposed by this SGLang")
    device_pool = getattr(pool, "device_pool", None)
    buffers = getattr(device_pool, f"{name}_buffer", None)
    if not buffers:
        raise UnsupportedPoolError(f"its device {name} buffers are not exposed")
    return tuple(buffers)
