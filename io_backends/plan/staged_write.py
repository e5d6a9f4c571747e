"""A write through staging: chunks, gathered one after the other, and the copies that drain each to the host.

Staging is laid out like the host: a gather packs scattered device rows into it, after which every run of
consecutive host slots is one copy (one a layer in layer_first), whatever the device side looked like. A write
is cut at once, which is cheap; the copies that drain a chunk are planned when its gather is on its way.

Paged layouts take whole pages, each in order. That is all that HiCache writes: its host pools allocate no
less (``HostKVCache.alloc`` asserts it, SGLang 0.5.18 to 0.5.23), radix nodes are split between pages, and
SGLang's own copy to ``page_first_direct`` refuses anything else. :func:`is_whole` tells.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .chunks import (
    Chunk,
    RingRoom,
    Staged,
    gap_chunk,
    least_chunk,
    ring_and_lead,
    ring_units,
    staged,
    staged_bytes,
    staged_units,
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
)
from .geometry import HostStrides, PoolGeometry
from .ring import Ring


class PlannedChunk(NamedTuple):
    """A chunk and its place in staging.

    Attributes:
        chunk: which tokens.
        staged: how they lie in staging.
        room: bytes of the ring it takes. The short first chunk of a write that is larger than the ring takes
            as much as the third one, which comes there after it: else the third one would lie across the
            second, and wait for its drain too.
    """

    chunk: Chunk
    staged: Staged
    room: int


class WritePlan:
    """A write cut into chunks. A sequence of :class:`PlannedChunk`, each made when it is asked for, or when
    it is cut.

    Only what the first gather needs is done when it is made: a link that idles waits for it. ``host_slots``
    may be changed as soon as :meth:`copies` or :meth:`drain` was called, not before.

    Args:
        geometry: the pool.
        host_slots: int64 [n]; where each token goes.
        ring_bytes: any two neighbouring chunks fit this. None: there are no chunks but those that
            :meth:`cut` makes.

    Raises:
        ValueError: the ring is too small, or the tokens are not whole pages in number. That each page is
            whole and in range is looked at by :meth:`copies` and the first :meth:`drain`.
    """

    def __init__(
        self, geometry: PoolGeometry, host_slots: npt.ArrayLike, ring_bytes: int | None = None
    ) -> None:
        self._geometry = geometry
        self._given = np.asarray(host_slots)
        unit = geometry.unit_slots
        units, rest = divmod(self._given.size, unit)
        if rest:
            raise _not_whole(geometry)
        lengths = write_chunks(geometry, units, ring_bytes) if units and ring_bytes is not None else []
        self._edges = [edge * unit for edge in itertools.accumulate(lengths, initial=0)]
        self._wraps = ring_bytes is not None and units > ring_units(geometry, ring_bytes)
        self._places: dict[int, Staged] = {}

    def __len__(self) -> int:
        return len(self._edges) - 1

    @property
    def left(self) -> int:
        """Units (tokens; pages, in a paged layout) that are in no chunk yet."""
        return (self._given.size - self._edges[-1]) // self._geometry.unit_slots

    def cut(self, units: int) -> PlannedChunk:
        """One more chunk, of the next ``units`` of those that are :attr:`left`, from 1 up.

        Raises:
            ValueError: there are not so many.
        """
        if not 0 < units <= self.left:
            raise ValueError(f"a chunk of {units} units, of which {self.left} are left")
        self._edges.append(self._edges[-1] + units * self._geometry.unit_slots)
        return self[len(self) - 1]

    def __getitem__(self, index: int) -> PlannedChunk:
        start, stop = self._edges[index], self._edges[index + 1]
        place = self._places.get(stop - start)
        if place is None:
            place = self._places[stop - start] = staged(self._geometry, stop - start)
        room = place.nbytes
        if index == 0 and self._wraps:
            room = max(room, self[2].room)
        return PlannedChunk(Chunk(start, stop), place, room)

    def copies(self) -> int:
        """How many copies drain it: every run is cut where a chunk after the first begins inside it.

        What is in no chunk yet counts as one.

        Raises:
            ValueError: a host slot is out of range, or a page is not whole.
        """
        if not self._given.size:
            return 0
        (_, breaks), cuts = self._runs, [edge for edge in self._edges if 0 < edge < self._given.size]
        count = 1 + len(cuts)
        if breaks is not None:
            count += int(np.count_nonzero(breaks)) - sum(bool(breaks[cut - 1]) for cut in cuts)
        return count * len(_host_side(self._geometry)[0])

    def drain(self, planned: PlannedChunk, base: int) -> CopyBatch:
        """Copies of one chunk as [component, layer, run], runs by ascending host address.

        Args:
            planned: one of this plan's.
            base: address in staging at which it begins.

        Raises:
            ValueError: as :meth:`copies`.
        """
        (start, stop), place, _ = planned
        slots, breaks = self._runs
        if breaks is None:
            return drain_run(place, int(slots[0]) + start, base)
        inner = breaks[start : stop - 1].nonzero()[0]
        if not len(inner):
            return drain_run(place, int(slots[start]), base)
        begins = np.empty(len(inner) + 1, dtype=np.int64)
        begins[0], begins[1:] = 0, inner + 1
        return drain_runs(place, begins, slots[start:stop][begins], base)

    @functools.cached_property
    def _runs(self) -> tuple[Slots, npt.NDArray[np.bool_] | None]:
        """The host slots, in range, which nobody changes; and [n - 1] whether a run ends before each but the
        first.

        None where all are one run: then only the first of them is kept.
        """
        geometry, slots = self._geometry, self._given
        if slots.dtype != np.int64 or slots.ndim != 1:
            slots = np.asarray(slots, dtype=np.int64).reshape(-1)
        one = is_one_run(slots)
        if not one or slots[0] < 0 or slots[-1] >= geometry.host_slots:
            as_slots(slots, geometry.host_slots, f"{geometry.label} host")
        breaks = None if one else slots[1:] != slots[:-1] + 1
        if not _at_pages(geometry.unit_slots, slots, breaks):
            raise _not_whole(geometry)
        return slots[: 1 if one else None].copy(), breaks


def units_in_gap(geometry: PoolGeometry, left: int, ring: Ring, *, before: int, first: bool) -> int:
    """Units of the next chunk of a write whose gathers forwards wait for: :func:`~.chunks.gap_chunk` of what
    ``ring`` has now. 0: it has no memory for one.

    Args:
        geometry: the pool.
        left: units of the write, at least 1.
        ring: what stages them.
        before: memory that was handed out before this gap may be again, see :meth:`~.ring.Ring.take`.
        first: it is the write's first. Later ones are not short, also where all drains are done by then.
    """
    units, lead = ring_and_lead(geometry, ring.nbytes)
    room = ring.room(staged_bytes(geometry, least_chunk(left, units, lead)), before=before)
    if room is None:
        return 0
    in_units = RingRoom(*(staged_units(geometry, nbytes) for nbytes in room))
    return gap_chunk(left, units, lead, in_units, idle=first and not ring.used)


def _not_whole(geometry: PoolGeometry) -> ValueError:
    return ValueError(
        f"{geometry.label}: a write to {geometry.layout} must be whole pages of {geometry.page_size} tokens, "
        "each in order"
    )


def is_whole(geometry: PoolGeometry, host_slots: npt.ArrayLike) -> bool:
    """Whether these host indices can be written: any, or whole pages in a paged layout or of whole records,
    or all of those that stand for a slot together.

    Args:
        geometry: the pool.
        host_slots: int64 [n]; host indices as SGLang gives them. Whether they are in range is not looked at.
    """
    slots = np.asarray(host_slots, dtype=np.int64)
    if geometry.index_step > 1:
        if not _in_units(geometry.index_step, slots):
            return False
        slots = geometry.slots_of(slots)
    return _in_units(max(geometry.unit_slots, geometry.record_slots), slots)


def _in_units(unit: int, slots: Slots) -> bool:
    """Whether int64 [n] is whole units of so many slots, each in order."""
    if unit == 1 or not len(slots):
        return True
    if len(slots) % unit:
        return False
    return _at_pages(unit, slots, None if is_one_run(slots) else slots[1:] != slots[:-1] + 1)


def _at_pages(unit: int, slots: Slots, breaks: npt.NDArray[np.bool_] | None) -> bool:
    """Whether runs begin where pages do, in the write and in the pool: then whole pages in number are whole.

    Args:
        unit: slots a page.
        slots: int64 [n], at least one.
        breaks: as of :attr:`WritePlan._runs`.
    """
    if unit == 1:
        return True
    if int(slots[0]) % unit:
        return False
    if breaks is None:
        return True
    begins = breaks.nonzero()[0] + 1
    return not ((begins % unit).any() or (slots[begins] % unit).any())


def copies_to_drain(geometry: PoolGeometry, host_slots: npt.ArrayLike) -> int:
    """Copies that drain a write from staging if one chunk holds it all: its runs of host memory.

    What can be known of a write before any device index is on the host. Chunks add copies where they cut a
    run. Where a paged layout's write is not whole pages, which no chunk takes, every page counts a copy a
    layer (a head, in page_head), as if it were written in part.

    Args:
        geometry: the pool.
        host_slots: int64 [n]; host indices as SGLang gives them. Not checked: planning the write does that.
    """
    indices = np.asarray(host_slots, dtype=np.int64)
    slots = geometry.slots_of(indices)
    if is_whole(geometry, indices):
        return count_runs(slots) * len(_host_side(geometry)[0])
    part = geometry.components[0]
    per_page = geometry.layers if _layer_by_layer(part.host, part.row_bytes) else part.host.pieces
    return per_page * len(geometry.components) * len(run_starts(slots, None, geometry.page_size))


def count_runs(slots: Slots) -> int:
    """How many runs of consecutive slots there are in int64 [n]; 0 for none."""
    return 1 + int(np.count_nonzero(slots[1:] - slots[:-1] != 1)) if len(slots) else 0


def drain_run(place: Staged, slot: int, base: int) -> CopyBatch:
    """Copies [component, layer] of a chunk whose host slots are one run, which begins at ``slot``.

    Args:
        place: how the chunk lies in staging.
        slot: host slot of its first token.
        base: address in staging at which it begins.
    """
    strides, host, src, nbytes = _sides(place)
    return CopyBatch(host + strides * np.uint64(slot), src + np.uint64(base), nbytes)


def drain_runs(place: Staged, begins: Slots, slots: Slots, base: int) -> CopyBatch:
    """Copies [component, layer, run] of a chunk of several runs, these by ascending host address.

    Args:
        place: how the chunk lies in staging.
        begins: int64 [runs]; the first token of each run in the chunk.
        slots: int64 [runs]; its host slot. Runs of a paged layout are whole pages.
        base: address in staging at which the chunk begins.
    """
    strides, host, src, _ = _sides(place)
    order = ascending(slots)
    dsts, srcs, sizes = np.empty((3, len(host), len(order)), dtype=np.uint64)
    by_run = strides[:, None]
    np.add(slots[order].view(np.uint64) * by_run, host[:, None], out=dsts)
    np.add(begins[order].view(np.uint64) * by_run, (src + np.uint64(base))[:, None], out=srcs)
    np.multiply(run_lengths(begins, place.slots)[order].view(np.uint64), by_run, out=sizes)
    return CopyBatch(dsts.reshape(-1), srcs.reshape(-1), sizes.reshape(-1))


@functools.lru_cache(maxsize=64)
def _host_side(geometry: PoolGeometry) -> tuple[Addresses, Addresses]:
    """Bytes of a slot in a run, and where slot 0 begins on the host, both [component * layer].

    There is one layer here where all layers of a unit lie together. Cached; not to be written.
    """
    parts = geometry.components
    apart = not geometry.paged and _layer_by_layer(parts[0].host, parts[0].row_bytes)
    layers = geometry.layers if apart else 1
    # A page that begins a run lies where its slots would if they were evenly spaced.
    strides = np.array([part.host.page // geometry.page_size for part in parts], dtype=np.uint64)
    return np.repeat(strides, layers), _of_layers([part.host for part in parts], layers)


@functools.lru_cache(maxsize=256)
def _sides(place: Staged) -> tuple[Addresses, Addresses, Addresses, Addresses]:
    """:func:`_host_side`, and of one run that fills ``place`` sources relative to it, and bytes; all
    [component * layer].

    Cached by identity, which is quick to look up; not to be written.
    """
    strides, host = _host_side(place.geometry)
    src = _of_layers(place.parts, len(host) // len(place.parts))
    nbytes = strides * np.uint64(place.slots)
    for array in (src, nbytes):
        array.flags.writeable = False
    return strides, host, src, nbytes


def _of_layers(parts: Sequence[HostStrides], layers: int) -> Addresses:
    """Where slot 0 begins in each component and layer, [component * layer]."""
    first = np.array([(each.base, each.layer) for each in parts], dtype=np.int64)
    return as_addresses(first[:, :1] + first[:, 1:] * np.arange(layers))


def _layer_by_layer(host: HostStrides, row_bytes: int) -> bool:
    """Whether one layer's rows follow each other on the host: a run is one copy a layer."""
    return host.token == row_bytes and host.pieces == 1
