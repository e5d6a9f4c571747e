"""``hybrid``: a short gather on the SMs packs scattered rows into staging, the copy engines drain it.

Wins when device rows are scattered or entries would be short (page_first, small pages): the gather runs at
HBM speed, so a forward that must not share the SMs waits for a fraction of the transfer, and the drain is
few large copies whatever the device side looked like.

The staging ring has two halves. A half is gathered into only after its previous drain is done, so a write
larger than the ring is a pipeline: one half drains while the other is filled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_hicache.io_backends.device.base import Device, Event, Staging, Stream
from sglang_hicache.io_backends.geometry import PoolGeometry
from sglang_hicache.io_backends.interface import Submission, Transfer
from sglang_hicache.io_backends.plan import as_slots, chunks, drain_copies, staging_geometry

DEFAULT_STAGING_MB = 256
"""MiB of device memory for the ring; unmeasured, the contract's example value."""

DEFAULT_GATHER_CTAS = 32
"""Thread blocks of the gather. B200, 592/148/64/32/16 blocks of a D2H kernel: total time was best at 32
(published by others; for a kernel that writes to the host, not for a gather; unmeasured here)."""

_HALVES = 2


class HybridBackend:
    """Gather into a bounded staging ring, drain by copy engine."""

    name = "hybrid"
    layouts = frozenset({"layer_first", "page_first", "page_first_direct", "page_head"})

    def __init__(self, device: Device, options: Mapping[str, Any]) -> None:
        self._device = device
        self._nbytes = int(options.get("staging_mb", DEFAULT_STAGING_MB)) * 2**20 // _HALVES
        self._ctas = int(options.get("gather_ctas", DEFAULT_GATHER_CTAS))
        self._ring: list[Staging] = []
        self._drained: list[Event | None] = [None] * _HALVES
        self._next = 0
        self._gather_stream: Stream = None
        self._drain_stream: Stream = None

    def supports(self, geometry: PoolGeometry) -> str | None:
        if geometry.layout not in self.layouts:
            return f"hybrid does not know layout {geometry.layout}"
        unit = geometry.bytes_per_token * (geometry.page_size if geometry.paged else 1)
        if unit > self._nbytes // 2:
            return (
                f"one {'page' if geometry.paged else 'token'} of {unit} bytes does not fit a staging half "
                f"of {self._nbytes} bytes; raise staging_mb"
            )
        return None

    def prepare(self, geometry: PoolGeometry) -> None:
        if not self._ring:
            self._ring = [self._device.allocate_staging(self._nbytes) for _ in range(_HALVES)]
            # The gather has a stream of its own: behind the drain of an earlier write it would make
            # a fenced forward wait for the link.
            self._gather_stream = self._device.new_stream()
            self._drain_stream = self._device.new_stream()

    def submit(self, transfer: Transfer, stream: Stream) -> Submission:
        device = self._device
        geometry = transfer.geometry
        host_slots = as_slots(transfer.host_slots, geometry.host_slots, f"{geometry.label} host")
        for event in transfer.ready:
            device.wait(self._gather_stream, event)
        copies = 0
        gathered: Event | None = None
        for chunk in chunks(geometry, host_slots, self._nbytes):
            half = self._next
            self._next = (half + 1) % _HALVES
            drained = self._drained[half]
            if drained is not None:
                device.wait(self._gather_stream, drained)
            staged = staging_geometry(geometry, chunk, self._ring[half].address)
            with device.use_stream(self._gather_stream):
                device.gather(
                    staged,
                    transfer.device_slots[chunk.start : chunk.stop],
                    chunk.first_slot,
                    self._gather_stream,
                    self._ctas,
                )
            gathered = device.record(self._gather_stream)
            device.wait(self._drain_stream, gathered)
            batch = drain_copies(geometry, staged, chunk, host_slots)
            device.copy(batch, self._drain_stream)
            self._drained[half] = device.record(self._drain_stream)
            copies += len(batch)
        if gathered is not None:
            # What SGLang records on its stream next is the transfer's completion.
            device.wait(stream, device.record(self._drain_stream))
        return Submission(
            copies=copies,
            nbytes=len(host_slots) * geometry.bytes_per_token,
            sm_done=gathered,
            keep=(transfer.device_slots,),
        )
