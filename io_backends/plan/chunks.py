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
        base += -(-geometry.layers * slots * part.row_bytes // STAGING_ALIGNMENT) * STAGING_ALIGNMENT
    return Staged(geometry, slots, tuple(parts), base)


LEAD_BYTES = 64 * 2**20
"""From here on a write that fits the ring is cut in two. An H100 gathers twice this in 134 us (64 blocks,
bench/results/2026-11-25-h100/profile.json); half of that is about what a second chunk costs the scheduler's
thread."""


def ring_units(geometry: PoolGeometry, ring_bytes: int) -> int:
    """Tokens (pages, in a paged layout) that two chunks which fill a ring hold together."""
    return max(0, ring_bytes - 2 * STAGING_ALIGNMENT * len(geometry.components)) // geometry.unit_bytes


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
"""Chunks of a ring at least where forwards wait."""


def fine_lengths(total: int, ring: int, lead: int) -> list[int]:
    """Units of each chunk of a write whose gathers forwards wait for; any two neighbours fit the ring.

    There a forward's gap takes what fits the ring, and what does not waits for the next: a chunk that is left
    out because it does not fit between the place where the last one ends and the end of the ring costs a
    forward's time, and the ring must be larger by the longest chunk than what is to fit. So none is longer
    than an eighth of it, nor are they made shorter than ``lead`` for that, since each costs the host a launch
    and a batch of copies. The link idles while the first one is gathered, which is short as in
    :func:`chunk_lengths`.

    Args:
        total: units in the write, at least 1.
        ring: units that fit the ring, at least 2.
        lead: units from which a write is worth a chunk more, and which a chunk may have at least.
    """
    most = min(max(ring // RING_PARTS, lead), ring // 2)
    first = min(total // 8, most) if total >= lead else 0
    rest = total - first
    count = -(-rest // most)
    later = [rest // count + (nth < rest % count) for nth in range(count)]
    return [first, *later] if first else later


def write_chunks(geometry: PoolGeometry, units: int, ring_bytes: int, *, fine: bool = False) -> list[int]:
    """:func:`chunk_lengths`, or :func:`fine_lengths`, of a write to a pool.

    Args:
        geometry: the pool.
        units: tokens in the write (pages, in a paged layout), at least 1.
        ring_bytes: size of the staging ring.
        fine: whether forwards wait for its gathers.

    Returns:
        Units of each chunk, in order.

    Raises:
        ValueError: not even two units fit the ring.
    """
    ring, lead = _ring_and_lead(geometry, ring_bytes)
    return (fine_lengths if fine else chunk_lengths)(units, ring, lead)


@functools.lru_cache(maxsize=64)
def _ring_and_lead(geometry: PoolGeometry, ring_bytes: int) -> tuple[int, int]:
    """:func:`ring_units`, at least 2, and :data:`LEAD_BYTES` in units."""
    ring = ring_units(geometry, ring_bytes)
    if ring < 2:
        raise ValueError(
            f"{geometry.label}: two {'pages' if geometry.paged else 'tokens'} do not fit a staging ring of "
            f"{ring_bytes} bytes; raise staging_mb"
        )
    return ring, -(-LEAD_BYTES // geometry.unit_bytes)
