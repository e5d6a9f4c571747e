"""Device rows and one host buffer: filled with fresh random bytes, compared byte for byte after a write."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...io_backends import Component, PoolGeometry, host_strides
from .cases import KvShape
from .devices import Bench

POISON = 0xA5


class KvBuffers:
    """Rows of a model in ``slots`` slots, and host memory for as many.

    Args:
        model: gives layers and rows.
        slots: token slots, on both sides.
        device: where the rows are.

    Attributes:
        rows: uint8 [slots, row bytes] by component and layer.
        pinned: all host memory, uint8; pinned on a GPU. One allocation, since SGLang's pools hold all
            components in one buffer.
        host: the part of ``pinned`` of each component.
    """

    def __init__(self, model: KvShape, slots: int, device: Bench) -> None:
        import torch

        self.model, self.slots, self.device = model, slots, device
        where = device.where
        self.rows = [
            [torch.empty((slots, row), dtype=torch.uint8, device=where) for _ in range(model.layers)]
            for row in model.components
        ]
        sizes = [model.layers * slots * row for row in model.components]
        self.pinned: Any = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=where == "cuda")
        self.host: list[Any] = list(self.pinned.split(sizes))  # type: ignore[no-untyped-call]

    def part(self, slots: int) -> KvBuffers:
        """The same memory as one of fewer slots."""
        if slots > self.slots:
            raise ValueError(f"{slots} of {self.slots} slots")
        less = object.__new__(KvBuffers)
        less.model, less.slots, less.device = self.model, slots, self.device
        less.rows = [[layer[:slots] for layer in layers] for layers in self.rows]
        sizes = [self.model.layers * slots * row for row in self.model.components]
        less.pinned = self.pinned[: sum(sizes)]
        less.host = list(less.pinned.split(sizes))
        return less

    def geometry(self, layout: str, page_size: int) -> PoolGeometry:
        """The pool in a layout, its host memory made known to the device."""
        parts = []
        for index, row in enumerate(self.model.components):
            strides = host_strides(
                layout,
                base=self.host[index].data_ptr(),
                layers=self.model.layers,
                page_size=page_size,
                slots=self.slots,
                row_bytes=row,
                heads=self.model.heads,
            )
            rows = tuple(tensor.data_ptr() for tensor in self.rows[index])
            parts.append(Component("kv"[index], row, rows, row, strides))
        geometry = PoolGeometry(
            label="kv",
            kv_kind=self.model.kv_kind,
            layout=layout,
            dtype="bfloat16",
            heads=self.model.heads,
            layers=self.model.layers,
            page_size=page_size,
            host_slots=self.slots,
            device_slots=self.slots,
            components=tuple(parts),
        )
        self.device.prepare_copies(geometry)
        return geometry

    def refill(self) -> None:
        """New random bytes in every device row."""
        for layers in self.rows:
            for layer in layers:
                layer.random_(0, 256)

    def poison(self) -> None:
        """Overwrite all host memory. By the copy engine on a GPU, where the CPU would take seconds."""
        import torch

        for part in self.host:
            self.device.synchronize()
            part.copy_(torch.full_like(part, POISON, device=self.device.where))
        self.device.synchronize()

    def wrong_bytes(
        self, geometry: PoolGeometry, host_slots: np.ndarray, device_slots: np.ndarray
    ) -> str | None:
        """Where host memory differs from what a write should have left there, or None.

        Every byte counts: those of the rows written, and those around them, which must still be poisoned. The
        host's bytes are taken back to the device by a plain copy and compared there.
        """
        import torch

        where = self.device.where
        page, offset = (
            torch.from_numpy(each).to(where) for each in np.divmod(host_slots, geometry.page_size)
        )
        rows = torch.from_numpy(device_slots).to(where)
        pages = self.slots // geometry.page_size
        for index, part in enumerate(geometry.components):
            arrived = self.host[index].to(where, copy=True)
            to, width = part.host, part.piece_bytes
            for layer in range(geometry.layers):
                for piece in range(to.pieces):
                    view = arrived.as_strided(
                        (pages, geometry.page_size, width),
                        (to.page, to.token, 1),
                        layer * to.layer + piece * to.piece,
                    )
                    want = self.rows[index][layer][rows, piece * width : (piece + 1) * width]
                    if not torch.equal(view[page, offset], want):
                        return f"component {part.name}, layer {layer}: rows differ from the device's"
                    view[page, offset] = POISON
            if not bool((arrived == POISON).all()):
                return f"component {part.name}: bytes outside the rows of the write were changed"
        return None
