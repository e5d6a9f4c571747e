"""The gather: scattered device rows, packed into staging by one persistent kernel per kind of row.

Planning is pure arithmetic on a pool's geometry (:func:`plan`); :class:`Gather` keeps each pool's table of
row addresses on the device and launches. The kernel is Triton's, so that the same source runs on the GPU
and, with ``TRITON_INTERPRET=1``, on ordinary memory.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_hicache.io_backends.geometry import Component, HostStrides, PoolGeometry
from sglang_hicache.io_backends.plan import STAGING_ALIGNMENT, Chunk, staging_geometry

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

_TILE_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: components whose rows differ in nothing but where they are.

    Attributes:
        rows: address of device row 0, per component and layer; the device table holds these.
        base: address of slot 0 in the destination, of the first component.
        constants: the kernel's compile-time arguments, by name.
        strides: its strides in bytes, by name.
    """

    rows: tuple[int, ...]
    base: int
    constants: dict[str, int]
    strides: dict[str, int]

    @property
    def tiles_per_block(self) -> int:
        """Tiles for each ``BLOCK_TOKENS`` tokens."""
        c = self.constants
        return c["PARTS"] * c["LAYERS"] * c["PIECES"] * c["SEGMENTS"]

    def tiles(self, tokens: int) -> int:
        """Tiles of a launch for this many tokens: more thread blocks than that have nothing to do."""
        return -(-tokens // self.constants["BLOCK_TOKENS"]) * self.tiles_per_block


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


def plan(
    staged: PoolGeometry, *, warps: int = WARPS, units_per_thread: int = UNITS_PER_THREAD
) -> tuple[Launch, ...]:
    """The launches that copy rows of ``staged``'s device side to its host side.

    One for K and V together where they differ only in their addresses, else one each.
    """
    groups: list[list[Component]] = []
    for part in staged.components:
        if groups and len(groups[-1]) == 1 and _alike(groups[-1][0], part):
            groups[-1].append(part)
        else:
            groups.append([part])
    return tuple(_launch(staged, group, warps * 32 * units_per_thread) for group in groups)


def _alike(a: Component, b: Component) -> bool:
    return (a.row_bytes, a.device_row_stride, _offsets(a.host)) == (
        b.row_bytes,
        b.device_row_stride,
        _offsets(b.host),
    )


def _offsets(host: HostStrides) -> tuple[int, ...]:
    return (host.page, host.token, host.layer, host.pieces, host.piece)


def _launch(staged: PoolGeometry, parts: Sequence[Component], tile_units: int) -> Launch:
    first = parts[0]
    host = first.host
    rows = tuple(address for part in parts for address in part.device_rows)
    strides = {
        "row_stride": first.device_row_stride,
        # A layout without pages is one whose pages are single tokens: no division in the kernel.
        "page_stride": host.page if staged.paged else host.token,
        "token_stride": host.token,
        "layer_stride": host.layer,
        "piece_stride": host.piece,
        "part_stride": parts[1].host.base - host.base if len(parts) == 2 else 0,
    }
    width = access_width(host.base, first.piece_bytes, _row_bits(rows), *strides.values())
    units = first.piece_bytes // width
    block = block_units(units)
    return Launch(
        rows=rows,
        base=host.base,
        constants={
            "PARTS": len(parts),
            "LAYERS": staged.layers,
            "PIECES": host.pieces,
            "PIECE_BYTES": first.piece_bytes,
            "PAGE_SIZE": staged.page_size if staged.paged else 1,
            "WIDTH": width,
            "SEGMENTS": -(-units // block),
            "BLOCK_TOKENS": tile_units // block,
            "BLOCK_UNITS": block,
        },
        strides=strides,
    )


@functools.lru_cache(maxsize=256)
def _row_bits(rows: tuple[int, ...]) -> int:
    """All row addresses or-ed: their common alignment. Cached: a pool has hundreds, a write many chunks."""
    return functools.reduce(operator.or_, rows, 0)


class Gather:
    """Launches gathers; holds the tables of row addresses on the device.

    Args:
        warps, units_per_thread: of each thread block; for measurements.
    """

    def __init__(self, *, warps: int = WARPS, units_per_thread: int = UNITS_PER_THREAD) -> None:
        self._warps = warps
        self._units_per_thread = units_per_thread
        self._tables: dict[tuple[int, ...], Any] = {}

    def prepare(self, geometry: PoolGeometry, device: Any) -> None:
        """Upload the pool's table of row addresses and compile its kernels, before serving.

        The upload waits for the current stream. Compiles by launching for no tokens.

        Args:
            geometry: the pool.
            device: torch device of its rows.
        """
        torch: Any = importlib.import_module("torch")
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        # Staging's strides, not the host's: they decide the width of an access.
        staged = staging_geometry(geometry, Chunk(0, 1, 0), STAGING_ALIGNMENT)
        for launch in self._plan(staged):
            self._run(launch, nothing, 0, 0, grid=1)

    def launch(self, staged: PoolGeometry, device_slots: Any, first_slot: int, ctas: int) -> None:
        """Enqueue on the current stream.

        Args:
            staged: device side of the pool, host side in staging.
            device_slots: int64 or int32 tensor [n] on the rows' device; not checked against the pool's size,
                since that would wait for the device.
            first_slot: staging slot of the first row.
            ctas: thread blocks at most.

        Raises:
            TypeError: ``device_slots`` holds something else.
            ValueError: ``ctas`` is below 1, or the chunk needs 2**31 tiles or more.
        """
        torch: Any = importlib.import_module("torch")
        if ctas < 1:
            raise ValueError(f"gather_ctas must be at least 1, not {ctas}")
        if device_slots.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"device indices are {device_slots.dtype}, not int64 or int32")
        tokens = len(device_slots)
        if not tokens:
            return
        slots = device_slots.contiguous()
        launches = self._plan(staged)
        tiles = [launch.tiles(tokens) for launch in launches]
        if max(tiles) >= _TILE_LIMIT:
            raise ValueError(
                f"{staged.label}: {tokens} rows are too many for one gather ({max(tiles)} tiles)"
            )
        for launch, count in zip(launches, tiles, strict=True):
            self._run(launch, slots, tokens, first_slot, grid=min(ctas, count))

    def _plan(self, staged: PoolGeometry) -> tuple[Launch, ...]:
        return plan(staged, warps=self._warps, units_per_thread=self._units_per_thread)

    def _table(self, rows: tuple[int, ...], device: Any) -> Any:
        table = self._tables.get(rows)
        if table is None:
            # Once a pool. From pageable memory, so torch waits until it is there, and any stream may read it.
            torch: Any = importlib.import_module("torch")
            table = self._tables[rows] = torch.tensor(rows, dtype=torch.int64, device=device)
        return table

    def _run(self, launch: Launch, slots: Any, tokens: int, first_slot: int, grid: int) -> None:
        # Triton comes late: planning and the copy path need none of it.
        from sglang_hicache.io_backends.device.gather_kernel import gather_rows

        gather_rows[(grid,)](
            self._table(launch.rows, slots.device),
            slots,
            launch.base,
            tokens,
            first_slot,
            **launch.strides,
            **launch.constants,
            num_warps=self._warps,
        )
