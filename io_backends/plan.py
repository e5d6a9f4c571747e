"""What to copy, as arrays of source, destination and bytes: pure functions of geometry and indices.

Two plans exist. :func:`direct_copies` goes straight from device rows to host rows; its entries are as long
as the rows that are contiguous on *both* sides. :func:`chunks`, :func:`staging_geometry` and
:func:`drain_copies` go through a staging buffer laid out like the host: a gather packs scattered rows into
it, after which every run of consecutive host slots is one entry, whatever the device side looked like.

Addresses are plain integers, so all of this runs and is tested byte for byte on ordinary memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sglang_hicache.io_backends.geometry import Component, HostStrides, PoolGeometry, host_strides

Slots = npt.NDArray[np.int64]
Addresses = npt.NDArray[np.uint64]

STAGING_ALIGNMENT = 256
"""Bytes. cudaMalloc's alignment, so that 16-byte accesses in the gather never straddle."""


@dataclass(frozen=True, slots=True)
class CopyBatch:
    """Copies with no order among them. Three uint64 arrays of one length; no entry is empty."""

    dst: Addresses
    src: Addresses
    nbytes: Addresses

    def __len__(self) -> int:
        return len(self.nbytes)

    def split(self, entries: int | None) -> Iterator[CopyBatch]:
        """Batches of at most ``entries`` copies; this one as it is for None."""
        if entries is None or len(self) <= entries:
            yield self
            return
        for start in range(0, len(self), entries):
            part = slice(start, start + entries)
            yield CopyBatch(self.dst[part], self.src[part], self.nbytes[part])

    @property
    def total_bytes(self) -> int:
        return int(self.nbytes.sum()) if len(self) else 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, stop)`` of a transfer; token ``start`` goes to staging slot ``first_slot``.

    ``first_slot`` is below the page size and non-zero only for a paged layout's chunk that starts inside
    a page.
    """

    start: int
    stop: int
    first_slot: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def as_slots(indices: npt.ArrayLike, limit: int, what: str) -> Slots:
    """Indices as a contiguous int64 vector, checked to lie in ``[0, limit)``.

    Raises:
        ValueError: an index is out of range: copying there would write over foreign memory.
    """
    slots = np.ascontiguousarray(indices, dtype=np.int64).reshape(-1)
    if len(slots) and (int(slots.min()) < 0 or int(slots.max()) >= limit):
        raise ValueError(
            f"{what} index {int(slots.max())} (min {int(slots.min())}) is outside 0..{limit - 1}"
        )
    return slots


def direct_copies(geometry: PoolGeometry, host_slots: Slots, device_slots: Slots) -> CopyBatch:
    """Copies from device rows to host rows, one entry per run that is contiguous on both sides.

    Args:
        geometry: the pool.
        host_slots: int64 [n], destination slot of each token.
        device_slots: int64 [n], source slot of each token.

    Raises:
        ValueError: the vectors differ in length, or an index is out of range.
    """
    host_slots = as_slots(host_slots, geometry.host_slots, f"{geometry.label} host")
    device_slots = as_slots(device_slots, geometry.device_slots, f"{geometry.label} device")
    if len(host_slots) != len(device_slots):
        raise ValueError(f"{len(host_slots)} host indices for {len(device_slots)} device indices")
    parts = [_direct_part(geometry, part, host_slots, device_slots) for part in geometry.components]
    return _concatenate(parts)


def _direct_part(geometry: PoolGeometry, part: Component, host: Slots, device: Slots) -> CopyBatch:
    strides = part.host
    # Device rows of one layer are the longest thing that is contiguous there; they can only meet host
    # memory in which the same layer's rows follow each other directly.
    mergeable = (
        strides.pieces == 1 and strides.token == part.row_bytes and part.device_row_stride == part.row_bytes
    )
    if mergeable:
        starts = _run_starts(host, device, geometry.page_size if geometry.paged else None)
    else:
        starts = np.arange(len(host), dtype=np.int64)
    lengths = np.diff(starts, append=len(host))
    layers = np.arange(geometry.layers, dtype=np.int64)[:, None, None]
    pieces = np.arange(strides.pieces, dtype=np.int64)[None, None, :]
    dst = (
        _slot_addresses(strides, host[starts], geometry.page_size)[None, :, None]
        + layers * strides.layer
        + pieces * strides.piece
    )
    rows = np.asarray(part.device_rows, dtype=np.int64)[:, None, None]
    src = rows + (device[starts] * part.device_row_stride)[None, :, None] + pieces * part.piece_bytes
    nbytes = np.broadcast_to((lengths * part.piece_bytes)[None, :, None], dst.shape)
    return _batch(dst, src, nbytes)


def chunks(geometry: PoolGeometry, host_slots: Slots, capacity_bytes: int) -> Iterator[Chunk]:
    """Split a transfer into pieces that each fit a staging buffer of ``capacity_bytes``.

    In a paged layout a chunk keeps every token at its offset within a page, so that a whole host page is
    one block in staging too; where the host indices break that rule a new chunk starts.

    Raises:
        ValueError: not even one token (one page in a paged layout) fits.
    """
    n = len(host_slots)
    page = geometry.page_size
    per_unit = geometry.bytes_per_token * (page if geometry.paged else 1)
    # Every component's region starts aligned: leave room for the padding.
    room = capacity_bytes - STAGING_ALIGNMENT * len(geometry.components)
    units = room // per_unit
    if units < 1:
        raise ValueError(
            f"{geometry.label}: a staging buffer of {capacity_bytes} bytes cannot hold one "
            f"{'page' if geometry.paged else 'token'} of {per_unit} bytes; raise staging_mb"
        )
    if not geometry.paged:
        for start in range(0, n, units):
            yield Chunk(start, min(start + units, n), 0)
        return
    offsets = host_slots % page
    # A token may follow its predecessor when it is the next one of the same page, or when one page
    # has just ended and another begins.
    pages = host_slots // page
    follows = (np.diff(offsets) == 1) & (np.diff(pages) == 0) | (offsets[1:] == 0) & (
        offsets[:-1] == page - 1
    )
    breaks = np.flatnonzero(~follows) + 1
    for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), n], strict=True):
        while start < stop:
            first = int(offsets[start])
            end = min(stop, start + int(units) * page - first)
            yield Chunk(start, end, first)
            start = end


def staging_geometry(geometry: PoolGeometry, chunk: Chunk, base: int) -> PoolGeometry:
    """Geometry of ``chunk`` with its host side in a staging buffer at address ``base``; same device side."""
    slots = _staging_slots(geometry, chunk)
    parts: list[Component] = []
    for part in geometry.components:
        strides = host_strides(
            geometry.layout,
            base=base,
            layers=geometry.layers,
            page_size=geometry.page_size,
            slots=slots,
            row_bytes=part.row_bytes,
            heads=geometry.heads,
        )
        parts.append(replace(part, host=strides))
        base += _aligned(geometry.layers * slots * part.row_bytes)
    return replace(geometry, host_slots=slots, components=tuple(parts))


def staging_nbytes(geometry: PoolGeometry, chunk: Chunk) -> int:
    """Bytes that :func:`staging_geometry` of ``chunk`` occupies, padding included."""
    slots = _staging_slots(geometry, chunk)
    return sum(_aligned(geometry.layers * slots * part.row_bytes) for part in geometry.components)


def drain_copies(geometry: PoolGeometry, staged: PoolGeometry, chunk: Chunk, host_slots: Slots) -> CopyBatch:
    """Copies from staging to host memory for ``chunk``, as few and as long as the host slots allow.

    Args:
        geometry: the pool.
        staged: :func:`staging_geometry` of the same chunk.
        host_slots: int64 [n] of the whole transfer.
    """
    host = as_slots(host_slots[chunk.start : chunk.stop], geometry.host_slots, f"{geometry.label} host")
    local = np.arange(chunk.first_slot, chunk.first_slot + chunk.tokens, dtype=np.int64)
    parts: list[CopyBatch] = []
    if geometry.paged:
        whole, loose = _whole_pages(host, local, geometry.page_size)
        for part, staged_part in zip(geometry.components, staged.components, strict=True):
            parts.append(_page_runs(geometry, part, staged_part, *whole))
            parts.append(_token_runs(geometry, part, staged_part, *loose))
    else:
        for part, staged_part in zip(geometry.components, staged.components, strict=True):
            parts.append(_token_runs(geometry, part, staged_part, host, local))
    return _concatenate(parts)


def _staging_slots(geometry: PoolGeometry, chunk: Chunk) -> int:
    slots = chunk.first_slot + chunk.tokens
    return -(-slots // geometry.page_size) * geometry.page_size if geometry.paged else slots


def _aligned(nbytes: int) -> int:
    return -(-nbytes // STAGING_ALIGNMENT) * STAGING_ALIGNMENT


def _whole_pages(host: Slots, local: Slots, page: int) -> tuple[tuple[Slots, Slots], tuple[Slots, Slots]]:
    """Split tokens into (host pages, staging pages) that are complete, and the remaining tokens."""
    # chunks() made offsets advance by one within a page, so a page is complete when it has `page` tokens.
    _, first, counts = np.unique(local // page, return_index=True, return_counts=True)
    complete = counts == page
    in_whole = np.repeat(complete, counts)
    pages = (host[first[complete]] // page, local[first[complete]] // page)
    return pages, (host[~in_whole], local[~in_whole])


def _page_runs(
    geometry: PoolGeometry, part: Component, staged: Component, host_pages: Slots, local_pages: Slots
) -> CopyBatch:
    starts = _run_starts(host_pages, local_pages, None)
    lengths = np.diff(starts, append=len(host_pages))
    return _batch(
        part.host.base + host_pages[starts] * part.host.page,
        staged.host.base + local_pages[starts] * staged.host.page,
        lengths * part.host.page,
    )


def _token_runs(
    geometry: PoolGeometry, part: Component, staged: Component, host: Slots, local: Slots
) -> CopyBatch:
    starts = _run_starts(host, local, geometry.page_size if geometry.paged else None)
    lengths = np.diff(starts, append=len(host))
    layers = np.arange(geometry.layers, dtype=np.int64)[:, None]
    pieces = np.arange(part.host.pieces, dtype=np.int64)[:, None]
    if part.host.token == part.row_bytes and part.host.pieces == 1:
        # One layer's rows follow each other: one entry a layer.
        outer_host, outer_local = layers * part.host.layer, layers * staged.host.layer
    else:
        # All layers of a token (of a head, in page_head) lie together: one entry for all of them.
        outer_host, outer_local = pieces * part.host.piece, pieces * staged.host.piece
    dst = _slot_addresses(part.host, host[starts], geometry.page_size)[None, :] + outer_host
    src = _slot_addresses(staged.host, local[starts], geometry.page_size)[None, :] + outer_local
    return _batch(dst, src, np.broadcast_to((lengths * part.host.token)[None, :], dst.shape))


def _slot_addresses(strides: HostStrides, slots: Slots, page_size: int) -> Slots:
    return strides.base + slots // page_size * strides.page + slots % page_size * strides.token


def _run_starts(a: Slots, b: Slots, page_size: int | None) -> Slots:
    """Where a new run begins: ``a`` or ``b`` does not advance by one, or ``a`` enters a new page."""
    if len(a) == 0:
        return np.empty(0, dtype=np.int64)
    new = (np.diff(a) != 1) | (np.diff(b) != 1)
    if page_size is not None:
        new |= a[1:] % page_size == 0
    return np.concatenate(([0], np.flatnonzero(new) + 1))


def _batch(dst: Slots, src: Slots, nbytes: Slots) -> CopyBatch:
    return CopyBatch(
        dst=np.ascontiguousarray(dst, dtype=np.uint64).reshape(-1),
        src=np.ascontiguousarray(src, dtype=np.uint64).reshape(-1),
        nbytes=np.ascontiguousarray(nbytes, dtype=np.uint64).reshape(-1),
    )


def _concatenate(parts: list[CopyBatch]) -> CopyBatch:
    return CopyBatch(
        dst=np.concatenate([p.dst for p in parts]),
        src=np.concatenate([p.src for p in parts]),
        nbytes=np.concatenate([p.nbytes for p in parts]),
    )
