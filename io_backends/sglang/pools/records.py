"""Pools whose indices stand for something other than a row of keys or values: pages and states.

A record is what one index moves in one layer. Where it is a state (Mamba, linear attention), the pool is one
with pages of one record. Where it is a page (indexers of sparse attention), SGLang's indices still count
tokens, whole pages of them in order, on both sides; its own copy takes the first of each page. A page lies in
one piece on both sides, so it is described as that many rows of an equal part each, which are moved together:
the same bytes, and no index is translated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...plan.geometry import Component, PoolGeometry, host_strides
from .errors import UnsupportedPoolError, check_rows

STATE, INDEX = "state", "index"
"""Values of :attr:`~sglang_hicache.io_backends.plan.geometry.PoolGeometry.kv_kind` for these pools."""

FOLLOWING = frozenset({"DSAIndexerPoolHost", "QSAIndexerPoolHost", "MHATokenToKOnlyPoolHost"})
"""Host pools that are given the indices of the pool of keys and values, by class."""

STATES = frozenset({"MambaPoolHost"})
"""Host pools of states, by class. Forwards write a state in place: a copy may read it later only where SGLang
holds its slot for that long (:attr:`~sglang_hicache.io_backends.sglang.versions.Release.states_held`).
"""


def states(pool: Any) -> PoolGeometry:
    """A ``MambaPoolHost``: temporal state and convolution states, a record each a slot and layer.

    Host buffers are (slots, L, 1, state) in both layouts that SGLang allows it
    (``MambaPoolHost.init_kv_buffer``).

    Raises:
        UnsupportedPoolError: it is of a form that is not described here; the message says which.
    """
    if getattr(pool, "slot_state_device_tensors", None):
        raise UnsupportedPoolError("it holds side states that are not by layer")
    if pool.layout not in ("page_first", "page_first_direct"):
        raise UnsupportedPoolError(f"layout {pool.layout} is not covered for states")
    if pool.page_size != 1:
        raise UnsupportedPoolError(f"its pages hold {pool.page_size} states, not one")
    temporal, conv = _state_layers(pool)
    buffers = {"temporal": pool.temporal_buffer} | {
        f"conv{nth}": buffer for nth, buffer in enumerate(pool.conv_buffer)
    }
    layers = {"temporal": temporal} | {f"conv{nth}": each for nth, each in enumerate(conv)}
    parts = [
        _part(name, layers[name], buffer, int(pool.size), 1, pool.num_mamba_layers, "page_first")
        for name, buffer in buffers.items()
        if buffer.numel()  # a model may have convolutions only
    ]
    if not parts:
        raise UnsupportedPoolError("its states are empty")
    slots = min(int(each.shape[0]) for part in layers.values() for each in part)
    return _geometry(pool, "mamba", STATE, "page_first", parts, page=1, device_slots=slots)


def _state_layers(pool: Any) -> tuple[Sequence[Any], list[Sequence[Any]]]:
    """Device tensors (slots, *state) by layer: of the temporal state, and of each convolution."""
    if hasattr(pool, "temporal_device_layers"):  # from 0.5.22 on, packed drafts included
        return list(pool.temporal_device_layers), [list(each) for each in pool.conv_device_layers]
    cache = pool.device_pool.mamba_cache
    return list(cache.temporal.unbind(0)), [list(each.unbind(0)) for each in cache.conv]


def index_pages(pool: Any) -> PoolGeometry:
    """A ``DSAIndexerPoolHost``: keys of a page, then their scales, one record a page and layer.

    Host buffers are (L, P, page) or (P, L, 1, page) (``DSAIndexerPoolHost.init_kv_buffer``).

    Raises:
        UnsupportedPoolError: it is of a form that is not described here; the message says which.
    """
    if getattr(pool, "_is_dummy", False):
        raise UnsupportedPoolError("it holds no host buffer (allocator only)")
    rows = getattr(pool, "packed_device_index_buffers", None)
    if not rows:  # 0.5.18
        if getattr(pool, "mtp_draft_device_pools", ()):
            raise UnsupportedPoolError("its packed draft buffers are not exposed by this SGLang")
        rows = pool.device_pool.index_k_with_scale_buffer
    return _pages(pool, list(rows), pool.index_k_with_scale_buffer, "indexer")


def packed_pages(pool: Any) -> PoolGeometry:
    """A ``QSAIndexerPoolHost``: the compressed keys of a page, one record a page and layer.

    Host buffers are L times (P, page), (P, L, page) or (P, L, 1, page) (``DeepSeekV4PagedHostPool``).

    Raises:
        UnsupportedPoolError: it is of a form that is not described here; the message says which.
    """
    if isinstance(pool.kv_buffer, list):
        raise UnsupportedPoolError("each of its layers has a host buffer of its own (layer_first)")
    return _pages(pool, list(pool.device_buffers), pool.kv_buffer, "indexer")


def page_rows(pool: Any) -> PoolGeometry:
    """A ``DeepSeekV4PagedHostPool``: a page of latent rows or of indexer keys, one row here.

    Its bytes are no whole number a token (values, then scales, padded), so that as many indices as a page has
    tokens stand for one row. Host buffers are (P, L, page) or (P, L, 1, page).

    Raises:
        UnsupportedPoolError: it is of a form that is not described here; the message says which.
    """
    if isinstance(pool.kv_buffer, list):
        raise UnsupportedPoolError("each of its layers has a host buffer of its own (layer_first)")
    rows = list(pool.device_buffers)
    if any(not each.is_contiguous() or not each.shape[0] for each in rows):
        raise UnsupportedPoolError("its device pages are not contiguous, or there are none")
    pages = int(pool.num_host_pages)
    rows = [each.reshape(int(each.shape[0]), -1) for each in rows]
    part = _part("page", rows, pool.kv_buffer, pages, 1, len(rows), "page_first")
    if part.row_bytes != pool.item_bytes:
        raise UnsupportedPoolError(f"its host pages are of {part.row_bytes} bytes, not {pool.item_bytes}")
    label = str(pool.pool_name)
    slots = min(int(each.shape[0]) for each in rows)
    return PoolGeometry(
        label=label,
        kv_kind=INDEX if "indexer" in label else "mla",
        layout="page_first",
        dtype=str(pool.dtype).removeprefix("torch."),
        heads=1,
        layers=len(rows),
        page_size=1,
        host_slots=pages,
        device_slots=slots,
        components=(part,),
        index_step=int(pool.slot_page_size),
    )


def keys_only(pool: Any) -> PoolGeometry:
    """A ``MHATokenToKOnlyPoolHost``: rows of keys without values, (L, T, row) or (T, L, row).

    ``page_first_direct`` is (P, L, page, row), as of ``MHATokenToKVPoolHost``.
    """
    rows = list(pool.device_pool.k_buffer)
    part = _part("k", rows, pool.k_buffer, int(pool.size), pool.page_size, pool.layer_num, pool.layout)
    slots = min(int(each.shape[0]) for each in rows)
    return _geometry(
        pool, "indexer", INDEX, pool.layout, [part], page=int(pool.page_size), device_slots=slots
    )


def _pages(pool: Any, rows: list[Any], buffer: Any, label: str) -> PoolGeometry:
    if pool.layout not in ("layer_first", "page_first", "page_first_direct"):
        raise UnsupportedPoolError(f"layout {pool.layout} is not covered for pages")
    page = int(pool.page_size)
    nbytes = {int(each[0].numel()) * each.element_size() for each in rows if each.shape[0]}
    if len(nbytes) != 1 or any(not each.shape[0] for each in rows):
        raise UnsupportedPoolError("its device pages differ in size between layers, or some have none")
    of_a_page = nbytes.pop()
    if of_a_page % page or of_a_page // page % 4:
        # A gather moves words of what divides every row: it would move single bytes.
        raise UnsupportedPoolError(f"pages of {of_a_page} bytes are not {page} rows of whole words")
    if any(not each.is_contiguous() for each in rows):
        raise UnsupportedPoolError("its device pages are not contiguous")
    layers, pages = len(rows), int(buffer.shape[1 if pool.layout == "layer_first" else 0])
    # (P, L, page): the rows of a page and layer together, as page_first_direct has them.
    layout = "layer_first" if pool.layout == "layer_first" else "page_first_direct"
    rows = [each.reshape(-1, of_a_page // page // each.element_size()) for each in rows]
    part = _part("page", rows, buffer, pages * page, page, layers, layout)
    slots = min(int(each.shape[0]) for each in rows)
    return _geometry(pool, label, INDEX, layout, [part], page=page, device_slots=slots, record_slots=page)


def _part(
    name: str, rows: Sequence[Any], buffer: Any, slots: int, page: int, layers: int, layout: str
) -> Component:
    """One component; the host buffer holds ``slots`` rows of each of ``layers``, in ``layout``."""
    if len(rows) != layers:
        raise UnsupportedPoolError(f"{len(rows)} device layers for {layers} host layers")
    host_bytes = int(buffer.numel()) * buffer.element_size()
    row_bytes, rest = divmod(host_bytes, layers * slots)
    if rest or not buffer.is_contiguous():
        raise UnsupportedPoolError(f"its host buffer is not {layers} layers of {slots} rows")
    stride = check_rows(name, rows, row_bytes)
    return Component(
        name=name,
        row_bytes=row_bytes,
        device_rows=tuple(int(each.data_ptr()) for each in rows),
        device_row_stride=stride,
        host=host_strides(
            layout,
            base=int(buffer.data_ptr()),
            layers=layers,
            page_size=page,
            slots=slots,
            row_bytes=row_bytes,
        ),
    )


def _geometry(
    pool: Any,
    label: str,
    kind: str,
    layout: str,
    parts: Sequence[Component],
    *,
    page: int,
    device_slots: int,
    record_slots: int = 1,
) -> PoolGeometry:
    return PoolGeometry(
        label=label,
        kv_kind=kind,
        layout=layout,
        dtype=str(pool.dtype).removeprefix("torch."),
        heads=1,
        layers=len(parts[0].device_rows),
        page_size=page,
        host_slots=int(pool.size),
        device_slots=device_slots,
        components=tuple(parts),
        record_slots=record_slots,
    )
