"""``copy_engine``: the GPU's DMA engines move the rows, in batches of copies.

Fast alone when runs are long on both sides (layer_first with contiguous slots): no SM does any work, so no
forward ever waits. Loses when copies are short: a batched copy costs the driver about 0.6 us
a copy (vLLM's and LMCache's published figures, H200, CUDA 13.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..policy.backend_spec import BackendSpec, Option, SmWork
from .device.base import Device, Stream
from .interface import Backend, Submission, Transfer
from .plan.copies import direct_batches
from .plan.geometry import PoolGeometry

BREAK_EVEN_ENTRY_BYTES = 34 * 1024
"""Bytes of a copy at which the link takes as long as the driver: about 0.6 us a copy at 55 GB/s (vLLM and
LMCache, H200, CUDA 13.0). Shorter ones are bound by the host's CPU, or by the engine: an H100 moved copies
of 32 KiB at 43 GB/s and of 128 KiB at 49, where the link has 55, with 0.4 us of the CPU a copy
(bench/results/2026-11-25-h100/profile.json)."""


MAX_COPIES_PER_BATCH = Option(
    "max_copies_per_batch", most=51_827, because="a batch call of 51,828 copies crashed (vLLM #49276)"
)


class CopyEngineBackend(Backend):
    """DMA only. Needs the device indices on the host to plan, which it asks the device seam for.

    The host waits for them. SGLang's scheduler makes them behind the forward in flight where that is a
    prefill (``_apply_war_barrier``, 0.5.18 to 0.5.23), so that its thread waits for that forward: 19.6 ms a
    write in a server of prefills (H200, bench/results/2026-11-27-h200-servers/layer-first.json).
    """

    spec = BackendSpec(
        "copy_engine",
        layouts=frozenset({"layer_first", "page_first", "page_first_direct"}),
        options=(MAX_COPIES_PER_BATCH,),
        sm_work=SmWork.NONE,
        index_steps=True,
    )
    name = spec.name

    def __init__(self, device: Device, options: Mapping[str, Any]) -> None:
        self._device = device
        self._limit: int | None = options.get("max_copies_per_batch")

    def supports(self, geometry: PoolGeometry) -> str | None:
        if self.spec.cannot_serve(geometry.layout, geometry.kv_kind):
            return (
                f"copy_engine cannot serve layout {geometry.layout}: it would copy every head of every "
                "token and layer on its own"
            )
        return None

    def prepare(self, geometry: PoolGeometry) -> None:
        """Nothing to allocate."""

    def submit(self, transfer: Transfer, stream: Stream) -> Submission:
        geometry = transfer.geometry
        indices = self._device.host_values(transfer.device_slots, transfer.indices_ready)
        copies = 0
        for batch in direct_batches(geometry, transfer.host_slots, geometry.slots_of(indices)):
            for part in batch.split(self._limit):
                self._device.copy(part, stream)
            copies += len(batch)
        return Submission(
            copies=copies,
            nbytes=transfer.tokens * geometry.bytes_per_token,
            keep=(transfer.device_slots,),
        )
