"""The gather: scattered device rows, packed into staging by one persistent kernel per kind of row.

:class:`Gather` keeps each pool's table of row addresses on the device and launches what
:func:`~.gather_plan.plan` says. The kernel is Triton's, so that the same source runs on the GPU and, with
``TRITON_INTERPRET=1``, on ordinary memory.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..plan.chunks import STAGING_ALIGNMENT, Chunk, Staged, staged
from ..plan.geometry import PoolGeometry
from .gather_plan import UNITS_PER_THREAD, WARPS, DeviceRows, Launch, plan

_TILE_LIMIT = 2**31

_INDEX_TYPES = ("torch.int64", "torch.int32")


class Gather:
    """Launches gathers; holds the tables of row addresses on the device, and the compiled kernels.

    Args:
        warps, units_per_thread: of each thread block; for measurements.
    """

    def __init__(self, *, warps: int = WARPS, units_per_thread: int = UNITS_PER_THREAD) -> None:
        self._warps = warps
        self._tile_units = warps * 32 * units_per_thread
        self._tables: dict[DeviceRows, Any] = {}
        self._compiled: dict[tuple[Any, ...], Any] = {}
        # Those of _INDEX_TYPES that were seen: torch takes a while to make a type's name.
        self._index_types: set[Any] = set()

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
        for launch in plan(staged(geometry, geometry.page_size), STAGING_ALIGNMENT, self._tile_units):
            self._run(launch, STAGING_ALIGNMENT, nothing, Chunk(0, 0), 1, None)

    def launch(
        self,
        staged: Staged,
        base: int,
        device_slots: Any,
        chunk: Chunk,
        ctas: int,
        stream: Any = None,
    ) -> None:
        """Enqueue on ``stream`` (a ``torch.cuda.Stream``), or on the current stream without it.

        Args:
            staged: the pool, and the layout of the destination.
            base: address in staging at which that begins, in bytes.
            device_slots: int64 or int32 tensor [n] on the rows' device, indices as of
                :meth:`~..plan.geometry.PoolGeometry.slots_of`; not checked against the pool's size, since
                that would wait for the device.
            chunk: which of them to copy; the first one goes to slot 0 there.
            ctas: thread blocks at most.
            stream: what it is enqueued on.

        Raises:
            TypeError: ``device_slots`` holds something else.
            ValueError: ``ctas`` is below 1, ``chunk`` asks for more indices than there are, or for 2**31
                tiles or more.
        """
        if ctas < 1:
            raise ValueError(f"gather_ctas must be at least 1, not {ctas}")
        if device_slots.dtype not in self._index_types:
            if str(device_slots.dtype) not in _INDEX_TYPES:
                raise TypeError(f"device indices are {device_slots.dtype}, not int64 or int32")
            self._index_types.add(device_slots.dtype)
        step = staged.geometry.index_step
        if chunk.stop * step > device_slots.numel():
            raise ValueError(f"tokens up to {chunk.stop} of {device_slots.numel()} device indices")
        tokens = chunk.tokens
        if not tokens:
            return
        if not device_slots.is_contiguous():
            with _current(stream):
                device_slots = device_slots.contiguous()
        for launch in plan(staged, base, self._tile_units):
            tiles = launch.tiles(tokens)
            if tiles >= _TILE_LIMIT:
                raise ValueError(
                    f"{staged.geometry.label}: {tokens} rows are too many for one gather ({tiles} tiles)"
                )
            self._run(launch, base, device_slots, chunk, min(ctas, tiles), stream)

    def _table(self, rows: DeviceRows, device: Any) -> Any:
        table = self._tables.get(rows)
        if table is None:
            # Once a pool. From pageable memory, so torch waits until it is there, and any stream may read it.
            torch: Any = importlib.import_module("torch")
            table = self._tables[rows] = torch.tensor(rows.addresses, dtype=torch.int64, device=device)
        return table

    def _run(self, launch: Launch, base: int, slots: Any, chunk: Chunk, grid: int, stream: Any) -> None:
        table = self._table(launch.rows, slots.device)
        start, stop = chunk
        # The first slot is always 0. Compiled without that argument, the kernel puts registers on the stack
        # (sm_120, Triton 3.8).
        arguments = (table, slots, base + launch.offset, start, stop - start, 0, *launch.arguments)
        # Whatever else the arguments are, these decide which code runs: see gather_kernel's decorator.
        key = (slots.dtype, launch.code)
        compiled = self._compiled.get(key)
        if compiled is not None:
            # Past Triton's look-up of a kernel by its arguments, and past torch's switch of streams.
            compiled[grid, 1, 1](*arguments, stream=None if stream is None else stream.cuda_stream)
            return
        # Triton comes late: planning and the copy path need none of it.
        from .gather_kernel import gather_rows

        with _current(stream):
            compiled = gather_rows[grid, 1, 1](*arguments, num_warps=self._warps)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._compiled[key] = compiled


def _current(stream: Any) -> AbstractContextManager[object]:
    """``stream`` as torch's current one inside the block."""
    if stream is None:
        return nullcontext()
    context: AbstractContextManager[object] = importlib.import_module("torch").cuda.stream(stream)
    return context
