"""SGLang's host pools described as geometry, or a reason why one is not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ...plan.geometry import LAYOUTS, Component, PoolGeometry, host_strides
from .. import versions
from . import records
from .errors import ShortHostRowsError, UnsupportedPoolError, check_rows

OTHER_KINDS: Mapping[str, tuple[str, str]] = {
    "DeepSeekV4StateHostPool": (
        "DeepSeek V4 states",
        "holds states that forwards write in place, which were not compared with ours on a GPU",
    ),
    "MHATokenToKVPoolMXFP8Host": ("MXFP8", "holds the scales of its blocks beside its rows"),
    "MiniMaxM3Nvfp4MainKVPoolHost": ("NVFP4", "holds packed pages of keys, values and scales"),
    "MiniMaxM3Nvfp4IndexKPoolHost": ("NVFP4 index", "holds packed pages of keys and scales"),
    "HiSparseMHATokenToKVPoolHost": ("HiSparse", "is copied by HiSparse itself"),
    "UnifiedPageEnvelopeHostPool": ("unified memory", "moves whole pages whose indices SGLang translates"),
    "PageInterleaveHostPool": ("sharded KV", "keeps the pages of one rank, whose indices SGLang translates"),
}
"""Host pools of SGLang (0.5.18 to 0.5.23) that its own copy writes back: class, what it holds, and why."""

_COMPARED_IN = " and ".join(release.version for release in versions.RELEASES if release.index_steps)

NOT_COMPARED: Mapping[str, tuple[str, str]] = {
    "DeepSeekV4PagedHostPool": (
        "DeepSeek V4",
        f"holds pages of several sub-pools, which were compared with ours on a GPU in SGLang {_COMPARED_IN} "
        "only",
    ),
}
"""The same of releases without :attr:`~sglang_hicache.io_backends.sglang.versions.Release.index_steps`."""

WITHOUT_BYTES = frozenset({"LogicalHostPool"})
"""Host pools that hold slots and nothing that is copied."""


_WINDOWS = frozenset({"swa", "draft_swa"})
"""SGLang's labels of pools whose rows are of sliding layers, in all releases."""

TRANSLATED = "unified memory translates its indices while the copy is submitted"


def translated(device_pool: Any) -> bool:
    """Whether SGLang translates this pool's indices on its transfer stream (unified memory): not ours."""
    return getattr(device_pool, "host_transfer_translate", None) is not None


def refuse_lost_scales(name: str, host_pool: Any, device_pool: Any) -> None:
    """Refuse rows whose scales lie beside them (MXFP8, FP4) and are not held on the host.

    SGLang before 0.5.21 has such a host pool for MXFP8, before 0.5.23 for ``fp4_mx_block16``.

    Raises:
        ShortHostRowsError: what is loaded back would be read with the scales of others.
    """
    scaled = getattr(device_pool, "k_scale_buffer", None)
    if scaled and type(host_pool).__name__ in _ROWS:
        raise ShortHostRowsError(
            f"pool {name}: its device rows have scales beside them, and {type(host_pool).__name__} of this "
            "SGLang holds none: what is loaded back would be read with scales of other rows"
        )


def refuse_lost_index(cache: Any, kinds: Collection[str]) -> None:
    """Refuse a cache with compressed index keys (QSA) of which the host holds none.

    SGLang 0.5.20 and 0.5.21 write back only the keys and values of such a model (Qwen4-Exp).

    Args:
        cache: the whole device cache, or None where it is not known.
        kinds: classes of the host pools, by name.

    Raises:
        ShortHostRowsError: what is loaded back would be searched by the index keys of others.
    """
    if getattr(cache, "qsa_compressed_k_buffer_pool", None) and "QSAIndexerPoolHost" not in kinds:
        raise ShortHostRowsError(
            "the device cache has compressed index keys (QSA) beside its rows, and no host pool of this "
            "SGLang holds them: what is loaded back would be searched by index keys of other rows"
        )


def label_of(host_pool: Any, otherwise: str | None = None) -> str:
    """SGLang's name for a pool (``kv``, ``swa``, ...); without one, ``otherwise`` or its class."""
    named = getattr(host_pool, "pool_label", None) or getattr(host_pool, "pool_name", None)
    return str(named or otherwise or type(host_pool).__name__)


def describe_pool(host_pool: Any) -> PoolGeometry:
    """Geometry of an SGLang host pool and the device buffers it mirrors.

    Raises:
        UnsupportedPoolError: the pool is of a kind, layout or placement that the backends do not cover.
    """
    kind = type(host_pool).__name__
    label = label_of(host_pool, "kv")
    # By exact class: a subclass may hold its rows differently (MXFP8 scales, HiSparse).
    describe_kind = _ROWS.get(kind)
    release = versions.current()
    if describe_kind is None:
        if kind in WITHOUT_BYTES:
            raise UnsupportedPoolError(f"{kind} holds slots and no bytes")
        if kind in NOT_COMPARED and not release.index_steps:
            raise UnsupportedPoolError(f"{kind} {NOT_COMPARED[kind][1]}")
        if kind not in _RECORDS:
            _, why = OTHER_KINDS.get(kind, ("", "is not a plain MHA or MLA pool"))
            raise UnsupportedPoolError(f"{kind} {why}")
        if kind in records.FOLLOWING and kind not in release.index_pools:
            raise UnsupportedPoolError(f"{kind} of this SGLang was not compared with ours on a GPU")
        if kind in records.STATES and not release.states_held:
            raise UnsupportedPoolError(
                f"{kind}: this SGLang may write a state that its cache holds before a later gap between "
                "forwards has read it (speculative decoding with grammars); newer ones do not"
            )
        _refuse_windows(label, release)
        _refuse_translated(host_pool)
        return _RECORDS[kind](host_pool)
    _refuse_windows(label, release)
    if host_pool.layout not in LAYOUTS:
        raise UnsupportedPoolError(f"layout {host_pool.layout} is not covered")
    _refuse_translated(host_pool)
    if getattr(host_pool, "kv_buffer", None) is None:
        raise UnsupportedPoolError("it holds no host buffer (allocator only)")
    return describe_kind(host_pool, label)


def _refuse_windows(label: str, release: versions.Release) -> None:
    if label in _WINDOWS and not release.windows_held:
        raise UnsupportedPoolError(
            "this SGLang is not known to hold rows of sliding layers until a later gap between forwards has "
            "read them; newer ones do"
        )


def _refuse_translated(host_pool: Any) -> None:
    """Refuse pools whose indices mean something else than rows of the buffers that are seen here."""
    if getattr(host_pool, "dcp_size", 1) > 1:
        if type(host_pool).__name__ != "MLATokenToKVPoolHost":
            raise UnsupportedPoolError("decode context parallelism translates its indices inside the pool")
        if not versions.current().index_steps:
            raise UnsupportedPoolError(
                "decode context parallelism shares its rows among ranks, whose copy was compared with ours "
                f"on a GPU in SGLang {_COMPARED_IN} only"
            )
    if getattr(host_pool, "shared_allocation_domain", None) is not None:
        raise UnsupportedPoolError("its host memory is shared with other pools and may move")
    device_pool = getattr(host_pool, "device_pool", None)
    if getattr(host_pool, "_layer_shard_enabled", False) or getattr(
        device_pool, "layer_shard_enabled", False
    ):
        raise UnsupportedPoolError("its layers are sharded over ranks")


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
    if getattr(pool, "dcp_size", 1) > 1 and len({int(each.shape[0]) for each in rows}) > 1:
        # A draft's rows are not shared among ranks: an index is a row of its own there.
        raise UnsupportedPoolError("not all of its layers share their rows among ranks")
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
        index_step=int(getattr(pool, "dcp_size", 1)),
        index_offset=int(getattr(pool, "dcp_rank", 0)),
    )


def _component(
    pool: Any, name: str, rows: Sequence[Any], buffer: Any, row_bytes: int, heads: int
) -> Component:
    if len(rows) != pool.layer_num:
        raise UnsupportedPoolError(f"{len(rows)} device layers for {pool.layer_num} host layers")
    stride = check_rows(name, rows, row_bytes)
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
        device_row_stride=stride,
        host=host,
    )


def host_buffers(host_pool: Any) -> tuple[Any, ...]:
    """The tensors that hold a pool's host memory."""
    for name in ("kv_buffer", "index_k_with_scale_buffer", "k_buffer"):
        buffer = getattr(host_pool, name, None)
        if buffer is not None:
            return tuple(buffer) if isinstance(buffer, tuple | list) else (buffer,)
    return ()


_DEVICE_ROWS = (
    "device_k_buffers",
    "device_v_buffers",
    "device_kv_buffers",
    "packed_device_index_buffers",
    "temporal_device_layers",
    "device_buffers",
)
"""Where SGLang's host pools keep the device tensors of their layers."""


def fingerprint(host_pool: Any) -> tuple[int, ...]:
    """Changes when a pool's memory does: a described geometry holds raw addresses."""
    rows = [getattr(host_pool, name, None) or () for name in _DEVICE_ROWS]
    # SGLang replaces the rows of all layers together: the first and the last tell.
    ends = [each for layers in rows if layers for each in (layers[0], layers[-1])]
    return tuple(buffer.data_ptr() for buffer in (*host_buffers(host_pool), *ends))


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


_ROWS: Mapping[str, Callable[[Any, str], PoolGeometry]] = {
    "MHATokenToKVPoolHost": _mha,
    "AsymmetricMHATokenToKVPoolHost": _mha,
    "MLATokenToKVPoolHost": _mla,
}
_RECORDS: Mapping[str, Callable[[Any], PoolGeometry]] = {
    "MambaPoolHost": records.states,
    "DSAIndexerPoolHost": records.index_pages,
    "QSAIndexerPoolHost": records.packed_pages,
    "DeepSeekV4PagedHostPool": records.page_rows,
    "MHATokenToKOnlyPoolHost": records.keys_only,
}
