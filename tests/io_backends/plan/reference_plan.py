"""A second planner, which the tests hold the first one to: page by page and token by token, for any write.

``WritePlan`` takes runs of slots, and whole pages only. This one looks at every token, and takes pages that
are written in part too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sglang_hicache.io_backends import Component, CopyBatch, HostStrides, PoolGeometry
from sglang_hicache.io_backends.plan.chunks import Staged, ring_units, staged, write_chunks
from sglang_hicache.io_backends.plan.copies import as_addresses, run_lengths, run_starts, slot_addresses


class Piece(NamedTuple):
    """Tokens ``[start, stop)`` of a write; token ``start`` goes to staging slot ``first_slot``.

    That is below the page size, and not zero only in a paged layout, for one that starts inside a page.
    """

    start: int
    stop: int
    first_slot: int


def reference_plan(
    geometry: PoolGeometry, host_slots: np.ndarray, ring_bytes: int
) -> list[tuple[Piece, Staged, CopyBatch]]:
    """Every piece of a write, its place in staging, and the copies that drain it from address 0."""
    planned = []
    for piece in pieces(geometry, host_slots, ring_bytes):
        slots = piece.first_slot + piece.stop - piece.start
        place = staged(geometry, -(-slots // geometry.unit_slots) * geometry.unit_slots)
        planned.append((piece, place, drain_copies(geometry, place, piece, host_slots)))
    return planned


def pieces(geometry: PoolGeometry, host_slots: np.ndarray, ring_bytes: int) -> Iterator[Piece]:
    """Split a write into pieces of which any two neighbours fit a ring of ``ring_bytes``.

    In a paged layout each token keeps its offset within a page, so that a whole host page is one block in
    staging too; where the host indices break that rule a new piece starts.
    """
    n = len(host_slots)
    if not n:
        return
    page = geometry.unit_slots
    breaks: list[int] = []
    if geometry.paged:
        offsets, pages = host_slots % page, host_slots // page
        # A token may follow its predecessor when it is the next one of the same page, or when one page
        # has just ended and another begins.
        follows = (np.diff(offsets) == 1) & (np.diff(pages) == 0) | (offsets[1:] == 0) & (
            offsets[:-1] == page - 1
        )
        breaks = (np.flatnonzero(~follows) + 1).tolist()
    # Around a break neighbours are of different stretches: halves of a ring fit together whatever they are.
    half = ring_units(geometry, ring_bytes) // 2
    for start, stop in zip([0, *breaks], [*breaks, n], strict=True):
        first = int(host_slots[start]) % page
        units = -(-(stop - start + first) // page)
        lengths = [half] * -(-units // half) if breaks else write_chunks(geometry, units, ring_bytes)
        for length in lengths:
            end = min(stop, start + length * page - first)
            yield Piece(start, end, first)
            start, first = end, 0


def drain_copies(geometry: PoolGeometry, place: Staged, piece: Piece, host_slots: np.ndarray) -> CopyBatch:
    """Copies from staging to host memory for one piece, as few and as long as the host slots allow."""
    host = host_slots[piece.start : piece.stop]
    local = piece.first_slot + np.arange(len(host), dtype=np.int64)
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


def _split_pages(
    host: np.ndarray, local: np.ndarray, page: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Split tokens into (host pages, staging pages) that are complete, and the remaining tokens."""
    # pieces() made offsets advance by one within a page, so a page is complete when it has `page` tokens.
    _, first, counts = np.unique(local // page, return_index=True, return_counts=True)
    complete = counts == page
    in_whole = np.repeat(complete, counts)
    pages = (host[first[complete]] // page, local[first[complete]] // page)
    return pages, (host[~in_whole], local[~in_whole])


def _page_runs(
    part: Component, to: HostStrides, host_pages: np.ndarray, local_pages: np.ndarray
) -> CopyBatch:
    starts = run_starts(host_pages, local_pages, None)
    return _batch(
        part.host.base + host_pages[starts] * part.host.page,
        to.base + local_pages[starts] * to.page,
        run_lengths(starts, len(host_pages)) * part.host.page,
    )


def _token_runs(
    geometry: PoolGeometry, part: Component, to: HostStrides, host: np.ndarray, local: np.ndarray
) -> CopyBatch:
    starts = run_starts(host, local, geometry.page_size if geometry.paged else None)
    if part.host.token == part.row_bytes and part.host.pieces == 1:
        layers = np.arange(geometry.layers, dtype=np.int64)[:, None]
        outer_host, outer_local = layers * part.host.layer, layers * to.layer
    else:
        # All layers of a token (of a head, in page_head) lie together: one copy for all of them.
        pieces = np.arange(part.host.pieces, dtype=np.int64)[:, None]
        outer_host, outer_local = pieces * part.host.piece, pieces * to.piece
    dst = slot_addresses(part.host, host[starts], geometry) + outer_host
    src = slot_addresses(to, local[starts], geometry) + outer_local
    return _batch(dst, src, np.broadcast_to(run_lengths(starts, len(host)) * part.host.token, dst.shape))


def _batch(dst: np.ndarray, src: np.ndarray, nbytes: np.ndarray) -> CopyBatch:
    return CopyBatch(*map(as_addresses, (dst, src, nbytes)))
