"""The plan through a staging buffer: what drains each chunk of a write to the host.

Staging is laid out like the host: a gather packs scattered device rows into it, after which every run of
consecutive host slots is one copy, whatever the device side looked like. A write is cut at once
(:func:`plan_write`), which is cheap; chunks are made when they are asked for, and the copies that drain one
when its gather is on its way.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .chunks import (
    Chunk,
    Staged,
    chunk_slots,
    chunks,
    ring_units,
    staged,
    write_chunks,
)
from .copies import (
    Addresses,
    CopyBatch,
    Slots,
    as_addresses,
    as_slots,
    ascending,
    is_one_run,
    run_lengths,
    run_starts,
    slot_addresses,
)
from .geometry import Component, HostStrides, PoolGeometry


class PlannedChunk(NamedTuple):
    """A chunk, its place in staging, and the copies that drain it.

    Attributes:
        chunk: which tokens.
        staged: how they lie in staging.
        room: bytes of the ring it takes. The short first chunk of a write that is larger than the ring takes
            as much as the third one, which comes there after it: else the third one would lie across the
            second, and wait for its drain too.
        drain: plans the copies when it is called, with the address in staging at which the chunk begins.
    """

    chunk: Chunk
    staged: Staged
    room: int
    drain: Callable[[int], CopyBatch]


class WritePlan(Protocol):
    """A write cut into chunks."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int, /) -> PlannedChunk:
        """One of them; made when it is asked for."""
        ...

    def copies(self) -> int:
        """How many copies drain them all.

        Raises:
            ValueError: a host slot is out of range.
        """
        ...


def plan_write(
    geometry: PoolGeometry, host_slots: npt.ArrayLike, ring_bytes: int, *, fine: bool = False
) -> WritePlan:
    """Cut a write into chunks.

    Only what the first gather needs is done here: a link that idles waits for it. ``host_slots`` may be
    changed as soon as ``copies`` or any chunk's ``drain`` was called, not before.

    Args:
        geometry: the pool.
        host_slots: int64 [n]; where each token goes.
        ring_bytes: any two neighbours fit this.
        fine: by :func:`~.chunks.fine_lengths`, for a write whose gathers forwards wait for.

    Raises:
        ValueError: the ring is too small, or an index is out of range, which is found here only in a layout
            where it decides how the write is cut: else ``copies`` and the first ``drain`` find it.
    """
    if not geometry.paged:
        return _Units(geometry, host_slots, ring_bytes, fine)
    slots = _checked(geometry, host_slots)
    units = whole_pages(slots, geometry.page_size)
    if units is None:
        return _Loose(geometry, slots, ring_bytes, fine)
    return _Units(geometry, units, ring_bytes, fine)


def _checked(geometry: PoolGeometry, host_slots: npt.ArrayLike) -> Slots:
    return as_slots(host_slots, geometry.host_slots, f"{geometry.label} host")


class _Loose:
    """A write of pages of which some are not whole, or not in order."""

    def __init__(self, geometry: PoolGeometry, slots: Slots, ring_bytes: int, fine: bool) -> None:
        self._geometry = geometry
        self._slots = slots.copy()
        self._chunks = list(chunks(geometry, slots, ring_bytes, fine=fine))

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> PlannedChunk:
        chunk = self._chunks[index]
        place = staged(self._geometry, chunk_slots(self._geometry, chunk))
        drain = functools.partial(drain_copies, self._geometry, place, chunk, self._slots)
        return PlannedChunk(chunk, place, place.nbytes, drain)

    def copies(self) -> int:
        return sum(len(self[index].drain(0)) for index in range(len(self)))


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


class _Units:
    """A write of units: tokens, or whole pages in a paged layout.

    That is host memory in which one run is one copy (a copy a layer in layer_first), which makes planning
    a handful of array operations a chunk.

    Args:
        geometry: the pool.
        units: int64 [n]; pages are in range.
        ring_bytes: any two neighbouring chunks fit this.
        fine: see :func:`plan_write`.
    """

    def __init__(self, geometry: PoolGeometry, units: npt.ArrayLike, ring_bytes: int, fine: bool) -> None:
        self._geometry = geometry
        self._given = np.asarray(units)
        self._per = geometry.page_size if geometry.paged else 1
        self._limit = geometry.host_slots // self._per
        total = self._given.size
        lengths = write_chunks(geometry, total, ring_bytes, fine=fine) if total else []
        self._edges = [0, *itertools.accumulate(lengths)]
        self._wraps = not fine and total > ring_units(geometry, ring_bytes)
        self._places: dict[int, Staged] = {}

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __getitem__(self, index: int) -> PlannedChunk:
        start, stop, per = self._edges[index], self._edges[index + 1], self._per
        slots = (stop - start) * per
        place = self._places.get(slots)
        if place is None:
            place = self._places[slots] = staged(self._geometry, slots)
        room = place.nbytes
        if index == 0 and self._wraps:
            room = max(room, self[2].room)
        drain = functools.partial(self._drain, place, start, stop)
        return PlannedChunk(Chunk(start * per, stop * per, 0), place, room, drain)

    @functools.cached_property
    def _runs(self) -> tuple[Slots, npt.NDArray[np.bool_] | None]:
        """The units, in range, which nobody changes; and [n - 1] whether a new run begins behind each.

        None where all are one run: then only the first of them is kept.
        """
        units = self._given
        if units.dtype != np.int64 or units.ndim != 1:
            units = np.asarray(units, dtype=np.int64).reshape(-1)
        if is_one_run(units) and units[0] >= 0 and units[-1] < self._limit:
            return units[:1].copy(), None
        units = units.copy()
        if not self._geometry.paged:
            _checked(self._geometry, units)
        return units, units[1:] != units[:-1] + 1

    def copies(self) -> int:
        """Every run is cut where a chunk after the first one begins inside it."""
        if not len(self):
            return 0
        (_, breaks), cuts = self._runs, self._edges[1:-1]
        count = 1 + len(cuts)
        if breaks is not None:
            count += int(np.count_nonzero(breaks)) - sum(bool(breaks[cut - 1]) for cut in cuts)
        return count * len(self._host[0])

    @functools.cached_property
    def _host(self) -> tuple[Addresses, Addresses]:
        return _host_side(self._geometry)

    def _drain(self, place: Staged, start: int, stop: int, base: int) -> CopyBatch:
        """Copies of units ``[start, stop)`` as [component, layer, run], runs by ascending host address."""
        strides, host = self._host
        src, nbytes = _one_run(place)
        units, breaks = self._runs
        inner = None if breaks is None else breaks[start : stop - 1].nonzero()[0]
        if inner is None or not len(inner):
            first = int(units[0]) + start if breaks is None else int(units[start])
            return CopyBatch(host + strides * np.uint64(first), src + np.uint64(base), nbytes)
        edges = np.empty(len(inner) + 2, dtype=np.int64)
        edges[0], edges[1:-1], edges[-1] = 0, inner + 1, stop - start
        begins, lengths = edges[:-1], edges[1:] - edges[:-1]
        slots = units[start:stop][begins]
        order = ascending(slots)
        dsts, srcs, sizes = np.empty((3, len(host), len(order)), dtype=np.uint64)
        by_run = strides[:, None]
        np.add(slots[order].view(np.uint64) * by_run, host[:, None], out=dsts)
        np.add(begins[order].view(np.uint64) * by_run, (src + np.uint64(base))[:, None], out=srcs)
        np.multiply(lengths[order].view(np.uint64), by_run, out=sizes)
        return CopyBatch(dsts.reshape(-1), srcs.reshape(-1), sizes.reshape(-1))


@functools.lru_cache(maxsize=64)
def _host_side(geometry: PoolGeometry) -> tuple[Addresses, Addresses]:
    """Bytes of a unit, and where unit 0 begins on the host, both [component * layer].

    There is one layer here where all of a unit's layers lie together.
    """
    parts = geometry.components
    layers = geometry.layers if not geometry.paged and _layer_by_layer(parts[0]) else 1
    strides = [part.host.page if geometry.paged else part.host.token for part in parts]
    return (
        np.repeat(np.array(strides, dtype=np.uint64), layers),
        _of_layers([part.host for part in parts], layers),
    )


@functools.lru_cache(maxsize=256)
def _one_run(place: Staged) -> tuple[Addresses, Addresses]:
    """Sources relative to ``place``, and bytes, [component * layer], of one run that fills it.

    Cached; not to be written.
    """
    strides, host = _host_side(place.geometry)
    src = _of_layers(place.parts, len(host) // len(place.parts))
    nbytes = strides * np.uint64(place.slots // (place.geometry.page_size if place.geometry.paged else 1))
    for array in (src, nbytes):
        array.flags.writeable = False
    return src, nbytes


def _of_layers(parts: Sequence[HostStrides], layers: int) -> Addresses:
    """Where unit 0 begins in each component and layer, [component * layer]."""
    first = np.array([(each.base, each.layer) for each in parts], dtype=np.int64)
    return as_addresses(first[:, :1] + first[:, 1:] * np.arange(layers))


def drain_copies(
    geometry: PoolGeometry, place: Staged, chunk: Chunk, host_slots: Slots, base: int = 0
) -> CopyBatch:
    """Copies from staging to host memory for one chunk, as few and as long as the host slots allow.

    For any chunk, also one of loose tokens in a paged layout.

    Args:
        geometry: the pool.
        place: :func:`staged` of the chunk.
        host_slots: int64 [n] of the whole transfer, in range.
        base: address of the chunk's first byte in staging.
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
        src=np.concatenate([p.src for p in parts]) + np.uint64(base),
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
    return CopyBatch(*map(as_addresses, (dst, src, nbytes)))
