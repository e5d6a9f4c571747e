"""Which launches a gather takes, and with which arguments: pure arithmetic on a pool's geometry."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass

from ..plan.chunks import Staged
from ..plan.geometry import Component, PoolGeometry

WARPS = 8
"""Warps a thread block. Unmeasured."""

UNITS_PER_THREAD = 8
"""Accesses each thread has in flight: with 16-byte ones, 32 KiB a block, 1 MiB at 32 blocks. At about 0.8 us
of HBM latency (unmeasured) that is on the order of 1.3 TB/s read; an H200 reads and writes 4.3 TB/s together
with a plain copy on all SMs (measured by others). 64 registers, no spills (sm_90, Triton 3.6 and 3.8)."""

_WIDEST = 16
_MAX_UNITS = 256
_MIN_UNITS = 8
"""Below 8 accesses of 16 bytes a tile's row is shorter than a 128-byte line."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRows:
    """Device rows of the components that one launch copies. Compared by identity, a cheap key.

    Attributes:
        first: index of the first of ``parts`` components.
        addresses: of row 0, per component and layer; the device table holds these.
        bits: everything or-ed that must be a multiple of an access: all addresses and strides, the piece.
    """

    first: int
    parts: int
    addresses: tuple[int, ...]
    stride: int
    bits: int
    pieces: int
    piece_bytes: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: components whose rows differ in nothing but where they are.

    Attributes:
        rows: of the components it copies.
        offset: of the first component's slot 0 from where the destination begins.
        constants: the kernel's compile-time arguments, by name and in its order.
        strides: its strides in bytes, by name and in its order.
        arguments: both, as the kernel takes them.
        code: what decides which code runs: the constants' values.
        tiles_per_block: tiles for each ``BLOCK_TOKENS`` tokens.
    """

    rows: DeviceRows
    offset: int
    constants: Mapping[str, int]
    strides: dict[str, int]
    arguments: tuple[int, ...]
    code: tuple[int, ...]
    tiles_per_block: int

    def tiles(self, tokens: int) -> int:
        """Tiles of a launch for this many tokens: more thread blocks than that have nothing to do."""
        return -(-tokens // self.constants["BLOCK_TOKENS"]) * self.tiles_per_block


TILE_UNITS = WARPS * 32 * UNITS_PER_THREAD
"""Accesses of a tile."""


def access_width(*values: int) -> int:
    """The widest access in bytes, 16, 8, 4, 2 or 1, that divides all of ``values`` (addresses, strides)."""
    bits = functools.reduce(operator.or_, values, _WIDEST)
    return bits & -bits


def block_units(units: int) -> int:
    """How many accesses of a row (``units`` long) one tile takes: a power of two that wastes few lanes.

    The largest one that masks off at most an eighth more lanes than the best; never longer than needed.
    """
    if units < _MIN_UNITS:
        return 1 << (units - 1).bit_length()
    sizes = [1 << n for n in range(_MIN_UNITS.bit_length() - 1, _MAX_UNITS.bit_length())]
    padded = {size: -(-units // size) * size for size in sizes}
    best = min(padded.values())
    return max(size for size, total in padded.items() if total * 8 <= best * 9)


def plan(staged: Staged, base: int, units: int = TILE_UNITS) -> tuple[Launch, ...]:
    """The launches that copy rows of the pool's device side to ``staged``.

    One for K and V together where they differ only in their addresses, else one each.

    Args:
        staged: the pool, and the layout of the destination.
        base: address in staging at which that begins, in bytes.
        units: accesses of a tile.
    """
    return _plan(staged, base % _WIDEST, units)


@functools.lru_cache(maxsize=256)
def _plan(staged: Staged, base: int, units: int) -> tuple[Launch, ...]:
    """:func:`plan`, of which only the last bits of ``base`` matter. Cached: chunks of a size are alike."""
    return tuple(_launch(rows, staged, base, units) for rows in _rows(staged.geometry))


@functools.lru_cache(maxsize=64)
def _rows(geometry: PoolGeometry) -> tuple[DeviceRows, ...]:
    """The pool's rows by launch. Cached: a pool has hundreds, a write many chunks."""
    groups: list[list[int]] = []
    parts = geometry.components
    for index, part in enumerate(parts):
        if groups and len(groups[-1]) == 1 and _alike(parts[groups[-1][0]], part):
            groups[-1].append(index)
        else:
            groups.append([index])
    made = []
    for group in groups:
        part = parts[group[0]]
        addresses = tuple(address for index in group for address in parts[index].device_rows)
        bits = functools.reduce(operator.or_, addresses, part.piece_bytes | part.device_row_stride)
        made.append(
            DeviceRows(
                group[0],
                len(group),
                addresses,
                part.device_row_stride,
                bits,
                part.host.pieces,
                part.piece_bytes,
            )
        )
    return tuple(made)


def _alike(a: Component, b: Component) -> bool:
    # Destinations have one layout: rows of the same bytes have the same strides there.
    return (a.row_bytes, a.device_row_stride, a.host.pieces) == (
        b.row_bytes,
        b.device_row_stride,
        b.host.pieces,
    )


def _launch(rows: DeviceRows, staged: Staged, base: int, tile_units: int) -> Launch:
    geometry, to = staged.geometry, staged.parts[rows.first]
    # A layout without pages is one whose pages are single tokens: no division in the kernel.
    page = to.page if geometry.paged else to.token
    apart = staged.parts[rows.first + 1].base - to.base if rows.parts == 2 else 0
    strides = {
        "row_stride": rows.stride,
        "page_stride": page,
        "token_stride": to.token,
        "layer_stride": to.layer,
        "piece_stride": to.piece,
        "part_stride": apart,
    }
    width = access_width(base + to.base, rows.bits, *strides.values())
    page_size = geometry.unit_slots
    steps = geometry.index_step, geometry.index_offset
    constants = _constants(rows, geometry.layers, page_size, width, tile_units, steps)
    code = tuple(constants.values())
    per_block = constants["PARTS"] * constants["LAYERS"] * constants["PIECES"] * constants["SEGMENTS"]
    return Launch(rows, to.base, constants, strides, (*strides.values(), *code), code, per_block)


@functools.lru_cache(maxsize=64)
def _constants(
    rows: DeviceRows, layers: int, page_size: int, width: int, tile_units: int, steps: tuple[int, int]
) -> Mapping[str, int]:
    """Cached: a chunk of a size not seen before has the same ones."""
    units = rows.piece_bytes // width
    block = block_units(units)
    return {
        "PARTS": rows.parts,
        "LAYERS": layers,
        "PIECES": rows.pieces,
        "PIECE_BYTES": rows.piece_bytes,
        "PAGE_SIZE": page_size,
        "WIDTH": width,
        "SEGMENTS": -(-units // block),
        "BLOCK_TOKENS": tile_units // block,
        "BLOCK_UNITS": block,
        "INDEX_STEP": steps[0],
        "INDEX_OFFSET": steps[1],
    }
