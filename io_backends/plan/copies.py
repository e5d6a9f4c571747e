"""What to copy, as arrays of source, destination and bytes: pure functions of geometry and indices.

:func:`direct_copies` goes straight from device rows to host rows; its copies are as long as the rows that
are contiguous on *both* sides. The other plan, through a staging buffer, is in :mod:`~.staged_write`.

Addresses are plain integers, so all of this runs and is tested byte for byte on ordinary memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .geometry import Component, HostStrides, PoolGeometry

Slots = npt.NDArray[np.int64]
Addresses = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class CopyBatch:
    """Copies with no order among them, each of at least one byte, as arrays uint64 [copies].

    Attributes:
        dst: address that each writes first.
        src: address that each reads first.
        nbytes: its length in bytes.
    """

    dst: Addresses
    src: Addresses
    nbytes: Addresses

    def __len__(self) -> int:
        return len(self.nbytes)

    def split(self, copies: int | None) -> Sequence[CopyBatch]:
        """Batches of at most ``copies`` copies; this one as it is for None."""
        if copies is None or len(self) <= copies:
            return (self,)
        parts = [slice(start, start + copies) for start in range(0, len(self), copies)]
        return [CopyBatch(self.dst[part], self.src[part], self.nbytes[part]) for part in parts]

    @property
    def total_bytes(self) -> int:
        """Bytes of all copies together."""
        return int(self.nbytes.sum()) if len(self) else 0


def as_slots(indices: npt.ArrayLike, limit: int, what: str) -> Slots:
    """Indices as a contiguous int64 vector, checked to lie in ``[0, limit)``.

    Args:
        indices: integers, of any shape.
        limit: the first index that is not there.
        what: what they are of, for the message.

    Returns:
        int64 [n]; ``indices`` itself where it is that already.

    Raises:
        ValueError: an index is out of range: copying there would write over foreign memory.
    """
    slots: Slots
    if (
        isinstance(indices, np.ndarray)
        and indices.dtype == np.int64
        and indices.ndim == 1
        and indices.flags.c_contiguous
    ):
        slots = indices
    else:
        slots = np.ascontiguousarray(indices, dtype=np.int64).reshape(-1)
    # Unsigned, a negative index is far above any limit: one look at the values instead of two. (The method
    # max() goes through Python, which takes several times as long where that code has left the CPU's caches.)
    if slots.size and int(np.maximum.reduce(slots.view(np.uint64))) >= limit:
        raise ValueError(
            f"{what} index {int(slots.max())} (min {int(slots.min())}) is outside 0..{limit - 1}"
        )
    return slots


def as_addresses(values: Slots) -> Addresses:
    """Addresses or byte counts, int64 of any shape, as the uint64 [n] that a :class:`CopyBatch` holds."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint64)


def direct_copies(geometry: PoolGeometry, host_slots: Slots, device_slots: Slots) -> CopyBatch:
    """Copies from device rows to host rows, one copy per run that is contiguous on both sides.

    Args:
        geometry: the pool.
        host_slots: int64 [n], destination slot of each token.
        device_slots: int64 [n], source slot of each token.

    Raises:
        ValueError: the vectors differ in length, or an index is out of range.
    """
    parts = list(direct_batches(geometry, host_slots, device_slots))
    return CopyBatch(
        dst=np.concatenate([part.dst for part in parts]),
        src=np.concatenate([part.src for part in parts]),
        nbytes=np.concatenate([part.nbytes for part in parts]),
    )


def direct_batches(geometry: PoolGeometry, host_slots: Slots, device_slots: Slots) -> Iterator[CopyBatch]:
    """:func:`direct_copies` of one component after the other: one may be copied while the next is planned.

    Raises:
        ValueError: as there, before the first one.
    """
    host_slots = as_slots(host_slots, geometry.host_slots, f"{geometry.label} host")
    device_slots = as_slots(device_slots, geometry.device_slots, f"{geometry.label} device")
    if len(host_slots) != len(device_slots):
        raise ValueError(f"{len(host_slots)} host indices for {len(device_slots)} device indices")
    # K and V break into the same runs, unless only one of them has strided rows.
    by_kind: dict[bool, tuple[Slots, Slots, Slots]] = {}
    for index, part in enumerate(geometry.components):
        kind = _mergeable(part)
        if kind not in by_kind:
            by_kind[kind] = _runs(geometry, kind, host_slots, device_slots)
        yield _direct_part(geometry, index, *by_kind[kind])


def _mergeable(part: Component) -> bool:
    """Whether rows of one layer that follow each other on the device can do so on the host too."""
    return (
        part.host.pieces == 1
        and part.host.token == part.row_bytes
        and part.device_row_stride == part.row_bytes
    )


def _runs(geometry: PoolGeometry, mergeable: bool, host: Slots, device: Slots) -> tuple[Slots, Slots, Slots]:
    """Host and device slots of the first token of each run of one layer, and how many tokens it has."""
    if mergeable and not geometry.paged and len(host) and is_one_run(host) and is_one_run(device):
        return host[:1], device[:1], np.array([len(host)])
    if mergeable:
        starts = run_starts(host, device, geometry.page_size if geometry.paged else None)
        lengths = run_lengths(starts, len(host))
        host, device = host[starts], device[starts]
    else:
        lengths = np.ones(len(host), dtype=np.int64)
    order = ascending(host)
    return host[order], device[order], lengths[order]


def is_one_run(slots: Slots) -> bool:
    """Whether each slot, int64 [n] with n of 1 or more, follows the one before it.

    Looked for first, since one run is what a fresh pool hands out: each numpy function costs ten to fifty
    microseconds where its code has left the CPU's caches, and the link idles until a copy is asked for.
    """
    if int(slots[-1]) - int(slots[0]) != len(slots) - 1:
        return False
    return not np.count_nonzero(slots[1:] != slots[:-1] + 1)


def ascending(slots: Slots) -> Slots:
    """The order, as indices int64 [n], in which to copy runs that begin at these host slots: by host address.

    An H100 took 4,096 tokens of Qwen3-8B (72 KiB for each of K and V) to slots scattered over 9 GiB of host
    memory at 47.9 GB/s in this order and at 42.9 in random order; copies of 128 KiB at 48.6 and 46.0
    (bench/results/2026-11-25-h100/profile.json).
    """
    return slots.argsort()


def _direct_part(geometry: PoolGeometry, index: int, host: Slots, device: Slots, lengths: Slots) -> CopyBatch:
    """One component's copies, as [layer, piece, run]."""
    part = geometry.components[index]
    outer_dst, outer_src = _outer(geometry, index)
    dst, src, nbytes = np.empty((3, len(outer_dst), len(host)), dtype=np.int64)
    np.add(slot_addresses(part.host, host, geometry), outer_dst, out=dst)
    np.add(device * part.device_row_stride, outer_src, out=src)
    nbytes[...] = lengths * part.piece_bytes
    return CopyBatch(*map(as_addresses, (dst, src, nbytes)))


@functools.lru_cache(maxsize=128)
def _outer(geometry: PoolGeometry, index: int) -> tuple[Slots, Slots]:
    """What each layer and piece of a component adds to a slot's address on the host and on the device,
    [layer * piece, 1].

    Cached; not to be written.
    """
    part = geometry.components[index]
    layer = np.arange(geometry.layers, dtype=np.int64)[:, None]
    piece = np.arange(part.host.pieces, dtype=np.int64)
    dst = layer * part.host.layer + piece * part.host.piece
    src = np.array(part.device_rows, dtype=np.int64)[:, None] + piece * part.piece_bytes
    for array in (dst, src):
        array.flags.writeable = False
    return dst.reshape(-1, 1), src.reshape(-1, 1)


def slot_addresses(strides: HostStrides, slots: Slots, geometry: PoolGeometry) -> Slots:
    """Address of the first piece of layer 0 of each slot, int64 [n] of int64 [n]."""
    if not geometry.paged:  # a division an index is most of what this costs
        return strides.base + slots * strides.token
    page = geometry.page_size
    return strides.base + slots // page * strides.page + slots % page * strides.token


def run_starts(a: Slots, b: Slots | None, page_size: int | None) -> Slots:
    """Where a new run begins: ``a`` or ``b`` does not advance by one, or ``a`` enters a new page.

    Args:
        a: slots int64 [n].
        b: likewise, or None: only ``a`` counts.
        page_size: slots in a page of ``a``; None: pages do not count.

    Returns:
        Indices int64 [runs] of the first slot of each run.
    """
    if len(a) == 0:
        return np.empty(0, dtype=np.int64)
    new = np.empty(len(a), dtype=np.bool_)
    new[0] = True
    np.not_equal(a[1:] - a[:-1], 1, out=new[1:])
    if b is not None:
        new[1:] |= b[1:] - b[:-1] != 1
    if page_size is not None:
        new[1:] |= a[1:] % page_size == 0
    return new.nonzero()[0]


def run_lengths(starts: Slots, total: int) -> Slots:
    """How many slots each run has, int64 [runs], when the last one ends at ``total``.

    Args:
        starts: int64 [runs]; index of the first slot of each.
        total: slots in all.
    """
    lengths = np.empty_like(starts)
    if len(starts):
        np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
        lengths[-1] = total - starts[-1]
    return lengths
