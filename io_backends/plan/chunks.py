"""How a write is cut into chunks, and how a chunk lies in the staging ring: laid out like the host."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from .geometry import HostStrides, PoolGeometry, host_strides

STAGING_ALIGNMENT = 256
"""Bytes. cudaMalloc's alignment, so that 16-byte accesses in the gather never straddle."""


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """How one chunk lies in staging. Compared by identity, which makes it a cheap key.

    Attributes:
        geometry: the pool.
        slots: staging slots, whole pages in a paged layout.
        parts: strides of each component; addresses are relative to the chunk's first byte.
        nbytes: bytes it occupies, padding included.
    """

    geometry: PoolGeometry
    slots: int
    parts: tuple[HostStrides, ...]
    nbytes: int


class Chunk(NamedTuple):
    """Tokens ``[start, stop)`` of a write, whole pages in a paged layout; ``start`` is staging slot 0."""

    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.stop - self.start


@functools.lru_cache(maxsize=256)
def staged(geometry: PoolGeometry, slots: int) -> Staged:
    """Layout of ``slots`` staging slots. Cached: a long write has many chunks of the same size."""
    parts: list[HostStrides] = []
    base = 0
    for part in geometry.components:
        parts.append(
            host_strides(
                geometry.layout,
                base=base,
                layers=geometry.layers,
                page_size=geometry.page_size,
                slots=slots,
                row_bytes=part.row_bytes,
                heads=geometry.heads,
            )
        )
        # Every component begins aligned.
        base += _aligned(geometry.layers * slots * part.row_bytes)
    return Staged(geometry, slots, tuple(parts), base)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // STAGING_ALIGNMENT) * STAGING_ALIGNMENT


LEAD_BYTES = 64 * 2**20
"""From here on a write that fits the ring is cut in two. An H100 gathers twice this in 134 us (64 blocks,
bench/results/2026-11-25-h100/profile.json); half of that is about what a second chunk costs the scheduler's
thread."""


def ring_units(geometry: PoolGeometry, ring_bytes: int) -> int:
    """Tokens (pages, in a paged layout) that two chunks which fill a ring hold together."""
    return max(0, ring_bytes - 2 * STAGING_ALIGNMENT * len(geometry.components)) // geometry.unit_bytes


def staged_bytes(geometry: PoolGeometry, units: int) -> int:
    """Bytes of staging that a chunk of ``units`` takes: :attr:`Staged.nbytes`, by itself."""
    nbytes, even = _unit(geometry)
    if even:
        return nbytes * units
    slots = geometry.layers * geometry.unit_slots * units
    return sum(_aligned(slots * part.row_bytes) for part in geometry.components)


def staged_units(geometry: PoolGeometry, nbytes: int) -> int:
    """Units of the longest chunk that fits ``nbytes`` of staging."""
    unit, even = _unit(geometry)
    units = nbytes // unit
    if even:
        return units
    # Padding of a chunk is below STAGING_ALIGNMENT a component: of tiny units that may be several.
    while units and staged_bytes(geometry, units) > nbytes:
        units -= 1
    return units


@functools.lru_cache(maxsize=64)
def _unit(geometry: PoolGeometry) -> tuple[int, bool]:
    """Bytes of a unit, and whether chunks are without padding, however many units they have."""
    slots = geometry.layers * geometry.unit_slots
    even = all(slots * part.row_bytes % STAGING_ALIGNMENT == 0 for part in geometry.components)
    return geometry.unit_bytes, even


def chunk_units(total: int, ring: int) -> tuple[int, int]:
    """Units of every other chunk of a write that is larger than the ring, and of those between them.

    Two fill the ring, so that one is filled while the other drains; not more, because each chunk costs the
    scheduler's thread a launch, two events and a batch of copies, and a gather is so much faster than the
    link (18 times, H100, 64 blocks) that finer chunks would hide little more of it. Neighbours need not be
    equal for that: where a chunk of a little over half a ring would be left, the two sizes are moved apart to
    save one.

    Args:
        total: units in the write.
        ring: units that two chunks hold together, at least 2.
    """
    half = ring - ring // 2
    rest = total % ring
    # A large chunk takes the place of the large one before it, behind its drain, while the small one between
    # them drains: up to 5/8, the link stays busy if gathers are more than 5/3 times as fast as it.
    first = rest if half < rest <= ring * 5 // 8 else half
    return first, ring - first


def chunk_lengths(total: int, ring: int, lead: int) -> list[int]:
    """Units of each chunk of a write, of which any two neighbours fit the ring.

    The link idles while the first chunk is gathered, so that is the short one: what is left over, or an
    eighth where all fits the ring at once. Of such a write none is longer than half a ring, so that the next
    write's first can be gathered while its last drains.

    Args:
        total: units in the write, at least 1.
        ring: units that fit the ring, at least 2.
        lead: units from which a write that fits the ring is worth a chunk more.
    """
    lengths: list[int] = []
    if total <= ring:
        first = total // 8 if total >= lead else 0
        rest = total - first
        later = [rest] if rest <= ring - ring // 2 else [rest - rest // 2, rest // 2]
        return [first, *later] if first else later
    sizes = chunk_units(total, ring)
    while total > 0:
        lengths.append(min(total, sizes[len(lengths) % 2]))
        total -= lengths[-1]
    return lengths[::-1]


RING_PARTS = 8
"""Where forwards wait a chunk that needs memory which is not drained is at least one part in so many of the
ring long, if so much is left."""


class RingRoom(NamedTuple):
    """What a ring has in one piece where the next chunk would begin, in bytes or in a pool's units.

    Attributes:
        free: as far as no drain has to be waited for that is not waited for already.
        first: as far as the end of the oldest memory beyond, whose drain is the next to end.
        most: as far as memory is handed out.
    """

    free: int
    first: int
    most: int


def gap_chunk(left: int, ring: int, lead: int, room: RingRoom, *, idle: bool) -> int:
    """Units of the next chunk of a write whose gathers forwards wait for.

    Each chunk costs the scheduler's thread a launch, its events, and planning its copies: some 0.1 ms, as its
    profiler tells (bench/results/2026-11-27-h200-alone/thread-auto.txt). So a chunk is as long as the memory
    that is drained at this place. Where too little is, it waits for a drain, and takes all that comes with
    it: its forward waits for no more of the link than it must. Of two neighbours both fit the ring, as in
    :func:`chunk_lengths`.

    Args:
        left: units of the write, at least 1.
        ring: units that fit the ring, at least 2.
        lead: units from which a write is worth a chunk more.
        room: where a chunk of :func:`least_chunk` units would begin.
        idle: nothing is being drained: the link waits for the first gather, which is a short one then.
    """
    least = least_chunk(left, ring, lead)
    units = room.free if room.free >= least else min(room.most, max(least, room.first))
    if idle and left >= lead:
        units = min(units, max(1, left // 8))
    return min(units, left, ring // 2)


def least_chunk(left: int, ring: int, lead: int) -> int:
    """Units that :func:`gap_chunk` must have room for. What is left at the ring's end is shorter than that,
    so that the ring must be longer by as much than what a gap is to take.
    """
    return min(left, max(ring // RING_PARTS, lead), ring // 2)


def write_chunks(geometry: PoolGeometry, units: int, ring_bytes: int) -> list[int]:
    """:func:`chunk_lengths` of a write to a pool.

    Args:
        geometry: the pool.
        units: tokens in the write (pages, in a paged layout), at least 1.
        ring_bytes: size of the staging ring.

    Returns:
        Units of each chunk, in order.

    Raises:
        ValueError: not even two units fit the ring.
    """
    return chunk_lengths(units, *ring_and_lead(geometry, ring_bytes))


@functools.lru_cache(maxsize=64)
def ring_and_lead(geometry: PoolGeometry, ring_bytes: int) -> tuple[int, int]:
    """:func:`ring_units`, at least 2, and :data:`LEAD_BYTES` in units.

    Raises:
        ValueError: not even two units fit the ring.
    """
    ring = ring_units(geometry, ring_bytes)
    if ring < 2:
        raise ValueError(
            f"{geometry.label}: two {'pages' if geometry.paged else 'tokens'} do not fit a staging ring of "
            f"{ring_bytes} bytes; raise staging_mb"
        )
    return ring, -(-LEAD_BYTES // geometry.unit_bytes)
