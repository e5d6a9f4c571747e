"""Pools on ordinary memory, with a reference copy that knows array axes and no addresses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_hicache.io_backends import Component, PoolGeometry, host_strides
from sglang_hicache.io_backends.plan.chunks import Staged

POISON = 0xA5


@dataclass
class MemoryPool:
    """Device arrays [slots, row stride] per component and layer, host array in the layout's own axes."""

    geometry: PoolGeometry
    device: list[list[np.ndarray]]
    host: list[np.ndarray]

    def expected(self, host_slots: np.ndarray, device_slots: np.ndarray) -> list[np.ndarray]:
        """What the host arrays must hold after copying these rows, one token at a time."""
        g = self.geometry
        result = [array.copy() for array in self.host]
        for part, array, layers in zip(g.components, result, self.device, strict=True):
            for host, device in zip(host_slots.tolist(), device_slots.tolist(), strict=True):
                page, offset = divmod(host, g.page_size)
                for layer in range(g.layers):
                    row = layers[layer][device, : part.row_bytes]
                    if g.layout == "layer_first":
                        array[layer, host] = row
                    elif g.layout == "page_first":
                        array[host, layer] = row
                    elif g.layout == "page_first_direct":
                        array[page, layer, offset] = row
                    else:
                        array[page, :, offset, layer] = row.reshape(g.heads, -1)
        return result


def indices_of(geometry: PoolGeometry, slots: np.ndarray) -> np.ndarray:
    """The indices, int64 [n * index_step], that stand for these slots, each slot's in order."""
    step = geometry.index_step
    return (slots[:, None] * step + np.arange(step)).reshape(-1).astype(slots.dtype)


def make_pool(
    layout: str,
    *,
    layers: int,
    page_size: int,
    row_bytes: tuple[int, ...],
    heads: int = 1,
    pages: int = 8,
    device_slots: int = 64,
    padding: int = 0,
    seed: int = 0,
) -> MemoryPool:
    """A pool with random device rows (strided when ``padding`` > 0) and a poisoned host buffer."""
    rng = np.random.default_rng(seed)
    slots = pages * page_size
    device, host, parts = [], [], []
    for index, row in enumerate(row_bytes):
        rows = [rng.integers(0, 256, (device_slots, row + padding), dtype=np.uint8) for _ in range(layers)]
        shape = {
            "layer_first": (layers, slots, row),
            "page_first": (slots, layers, row),
            "page_first_direct": (pages, layers, page_size, row),
            "page_head": (pages, heads, page_size, layers, row // heads),
        }[layout]
        buffer = np.full(shape, POISON, dtype=np.uint8)
        strides = host_strides(
            layout,
            base=int(buffer.ctypes.data),
            layers=layers,
            page_size=page_size,
            slots=slots,
            row_bytes=row,
            heads=heads,
        )
        parts.append(
            Component(
                name=("k", "v", "w")[index],
                row_bytes=row,
                device_rows=tuple(int(r.ctypes.data) for r in rows),
                device_row_stride=row + padding,
                host=strides,
            )
        )
        device.append(rows)
        host.append(buffer)
    geometry = PoolGeometry(
        label="kv",
        kv_kind="mha" if len(row_bytes) == 2 else "mla",
        layout=layout,
        dtype="uint8",
        heads=heads,
        layers=layers,
        page_size=page_size,
        host_slots=slots,
        device_slots=device_slots,
        components=tuple(parts),
    )
    return MemoryPool(geometry, device, host)


def on_the_host(geometry: PoolGeometry) -> Staged:
    """The pool's host memory as a gather's destination: any buffer with a layout's strides is one."""
    return Staged(geometry, geometry.host_slots, tuple(part.host for part in geometry.components), 0)
