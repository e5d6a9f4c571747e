"""The plan through a staging buffer: what drains each chunk of a write to the host.

Staging is laid out like the host: a gather packs scattered device rows into it, after which every run of
consecutive host slots is one copy, whatever the device side looked like. Everything is planned at once for
the whole write (:func:`plan_write`), with staging addresses relative to the chunk, which has no memory yet.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_hicache.io_backends.chunks import Chunk, Staged, chunk_sizes, chunk_slots, chunks, staged
from sglang_hicache.io_backends.geometry import Component, HostStrides, PoolGeometry
from sglang_hicache.io_backends.plan import (
    Addresses,
    CopyBatch,
    Slots,
    as_slots,
    run_lengths,
    run_starts,
    slot_addresses,
)


class PlannedChunk(NamedTuple):
    """A chunk, its place in staging, and the copies that drain it, whose sources are relative to that."""

    chunk: Chunk
    staged: Staged
    drain: CopyBatch


def plan_write(geometry: PoolGeometry, host_slots: npt.ArrayLike, ring_bytes: int) -> list[PlannedChunk]:
    """The chunks of a write, with their drains.

    Args:
        geometry: the pool.
        host_slots: int64 [n]; where each token goes.
        ring_bytes: any two neighbours fit this.

    Raises:
        ValueError: an index is out of range, or the ring is too small.
    """
    slots = as_slots(host_slots, geometry.host_slots, f"{geometry.label} host")
    if not len(slots):
        return []
    units = whole_pages(slots, geometry.page_size) if geometry.paged else slots
    if units is not None:
        return _plan_units(geometry, units, ring_bytes)
    planned = []
    for chunk in chunks(geometry, slots, ring_bytes):
        place = staged(geometry, chunk_slots(geometry, chunk))
        planned.append(PlannedChunk(chunk, place, drain_copies(geometry, place, chunk, slots)))
    return planned


def drain_entries(geometry: PoolGeometry, host_slots: npt.ArrayLike) -> int:
    """Copies that drain a write from staging if one chunk holds it all: its runs of host memory.

    What can be known of a write before any device index is on the host. Chunks add copies where they cut a
    run. Whole pages of a paged layout, which is all that HiCache writes, are counted exactly; where a page is
    written in part, every page counts as if it were.

    Args:
        geometry: the pool.
        host_slots: int64 [n]; where each token goes. Not checked: planning the write does that.
    """
    slots = np.asarray(host_slots, dtype=np.int64)
    if not len(slots):
        return 0
    part = geometry.components[0]
    per_run = len(geometry.components) * (geometry.layers if _layer_by_layer(part) else part.host.pieces)
    if not geometry.paged:
        return per_run * count_runs(slots)
    units = whole_pages(slots, geometry.page_size)
    if units is not None:
        return len(geometry.components) * count_runs(units)
    return per_run * len(run_starts(slots, None, geometry.page_size))


def count_runs(units: Slots) -> int:
    """Runs of consecutive slots, or of consecutive pages."""
    return 1 + int(np.count_nonzero(units[1:] - units[:-1] != 1)) if len(units) else 0


def whole_pages(slots: Slots, page: int) -> Slots | None:
    """Page numbers of slots that are whole pages, each in order; None where they are anything else."""
    if len(slots) % page:
        return None
    by_page = slots.reshape(-1, page)
    numbers: Slots = by_page[:, 0] // page
    whole = by_page == numbers[:, None] * page + np.arange(page)
    return numbers if whole.all() else None


def _plan_units(geometry: PoolGeometry, units: Slots, ring_bytes: int) -> list[PlannedChunk]:
    """What the rest of this module does chunk by chunk, for all chunks at once.

    Units are tokens, or whole pages in a paged layout: host memory in which one run is one copy (a copy a
    layer in layer_first). Copies are made as [chunk, run, component, layer], so that a chunk's are a slice.
    """
    n, per = len(units), geometry.page_size if geometry.paged else 1
    sizes = chunk_sizes(geometry, n, ring_bytes)
    begins = [0]
    while begins[-1] + sizes[len(begins) % 2 - 1] < n:
        begins.append(begins[-1] + sizes[len(begins) % 2 - 1])
    cuts = [Chunk(start * per, stop * per, 0) for start, stop in zip(begins, [*begins[1:], n], strict=True)]
    by_size = {size: staged(geometry, size) for size in {cut.tokens for cut in cuts}}
    places = [by_size[cut.tokens] for cut in cuts]
    firsts = np.array(begins, dtype=np.int64)
    starts = run_starts(units, None, None, firsts)
    lengths = run_lengths(starts, n)
    chunk_of = firsts.searchsorted(starts, side="right") - 1

    strides, host = _host_side(geometry)
    there = np.array([[(to.base, to.layer) for to in place.parts] for place in places], dtype=np.int64)
    # [chunk, component, layer]
    in_staging = there[..., :1] + there[..., 1:] * np.arange(host.shape[1])
    # [run, component, layer]
    shape = (len(starts), *host.shape)
    dst, src, nbytes = np.empty((3, *shape), dtype=np.int64)
    np.add(units[starts, None, None] * strides, host, out=dst)
    np.add((starts - firsts[chunk_of])[:, None, None] * strides, in_staging[chunk_of], out=src)
    np.multiply(lengths[:, None, None], strides, out=nbytes)
    dst, src, nbytes = (array.reshape(-1).view(np.uint64) for array in (dst, src, nbytes))
    edges = (starts.searchsorted(firsts) * host.size).tolist()
    return [
        PlannedChunk(cut, place, _in_staging_order(host.size, dst[low:high], src[low:high], nbytes[low:high]))
        for cut, place, low, high in zip(cuts, places, edges, [*edges[1:], len(dst)], strict=True)
    ]


def _in_staging_order(per_run: int, *columns: Addresses) -> CopyBatch:
    """Copies in the order [run, component, layer] as [component, layer, run]: one sweep through staging."""
    if len(columns[0]) > per_run > 1:
        columns = tuple(np.ascontiguousarray(column.reshape(-1, per_run).T).reshape(-1) for column in columns)
    return CopyBatch(*columns)


@functools.lru_cache(maxsize=64)
def _host_side(geometry: PoolGeometry) -> tuple[Slots, Slots]:
    """Bytes of a unit [component, 1], and where unit 0 begins on the host [component, layer].

    There is one layer here where all of a unit's layers lie together.
    """
    parts = geometry.components
    layers = geometry.layers if not geometry.paged and _layer_by_layer(parts[0]) else 1
    strides = [part.host.page if geometry.paged else part.host.token for part in parts]
    host = np.array([(part.host.base, part.host.layer) for part in parts], dtype=np.int64)
    return np.array(strides, dtype=np.int64)[:, None], host[:, :1] + host[:, 1:] * np.arange(layers)


def drain_copies(geometry: PoolGeometry, place: Staged, chunk: Chunk, host_slots: Slots) -> CopyBatch:
    """Copies from staging to host memory for one chunk, as few and as long as the host slots allow.

    For any chunk, also one of loose tokens in a paged layout.

    Args:
        geometry: the pool.
        place: :func:`staged` of the chunk; sources are relative to its first byte.
        host_slots: int64 [n] of the whole transfer, in range.
    """
    host = host_slots[chunk.start : chunk.stop]
    local = np.arange(chunk.first_slot, chunk.first_slot + chunk.tokens, dtype=np.int64)
    parts: list[CopyBatch] = []
    for part, to in zip(geometry.components, place.parts, strict=True):
        if geometry.paged:
            whole, loose = _split_pages(host, local, geometry.page_size)
            parts.append(_page_runs(part, to, *whole))
            parts.append(_token_runs(geometry, part, to, *loose))
        else:
            parts.append(_token_runs(geometry, part, to, host, local))
    return CopyBatch(
        dst=np.concatenate([p.dst for p in parts]),
        src=np.concatenate([p.src for p in parts]),
        nbytes=np.concatenate([p.nbytes for p in parts]),
    )


def _split_pages(host: Slots, local: Slots, page: int) -> tuple[tuple[Slots, Slots], tuple[Slots, Slots]]:
    """Split tokens into (host pages, staging pages) that are complete, and the remaining tokens."""
    # chunks() made offsets advance by one within a page, so a page is complete when it has `page` tokens.
    _, first, counts = np.unique(local // page, return_index=True, return_counts=True)
    complete = counts == page
    in_whole = np.repeat(complete, counts)
    pages = (host[first[complete]] // page, local[first[complete]] // page)
    return pages, (host[~in_whole], local[~in_whole])


def _page_runs(part: Component, to: HostStrides, host_pages: Slots, local_pages: Slots) -> CopyBatch:
    starts = run_starts(host_pages, local_pages, None)
    return _batch(
        part.host.base + host_pages[starts] * part.host.page,
        to.base + local_pages[starts] * to.page,
        run_lengths(starts, len(host_pages)) * part.host.page,
    )


def _token_runs(
    geometry: PoolGeometry, part: Component, to: HostStrides, host: Slots, local: Slots
) -> CopyBatch:
    starts = run_starts(host, local, geometry.page_size if geometry.paged else None)
    if _layer_by_layer(part):
        layers = np.arange(geometry.layers, dtype=np.int64)[:, None]
        outer_host, outer_local = layers * part.host.layer, layers * to.layer
    else:
        # All layers of a token (of a head, in page_head) lie together: one entry for all of them.
        pieces = np.arange(part.host.pieces, dtype=np.int64)[:, None]
        outer_host, outer_local = pieces * part.host.piece, pieces * to.piece
    dst = slot_addresses(part.host, host[starts], geometry) + outer_host
    src = slot_addresses(to, local[starts], geometry) + outer_local
    return _batch(dst, src, np.broadcast_to(run_lengths(starts, len(host)) * part.host.token, dst.shape))


def _layer_by_layer(part: Component) -> bool:
    """Whether one layer's rows follow each other on the host: a run is one copy a layer."""
    return part.host.token == part.row_bytes and part.host.pieces == 1


def _batch(dst: Slots, src: Slots, nbytes: Slots) -> CopyBatch:
    return CopyBatch(*(np.ascontiguousarray(a).reshape(-1).view(np.uint64) for a in (dst, src, nbytes)))
