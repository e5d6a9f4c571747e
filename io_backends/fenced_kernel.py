"""``fenced_kernel``: SGLang's own SM copy kernel, fenced on both sides.

Wins where host rows of a layer lie together and pages are small (layer_first): it depends less on how
fragmented the host slots are (bench/results/2026-11-25-h100). Elsewhere it is the path with the longest
record, and the reference the others are held to.
Every byte moves through the SMs, so a forward that must not share them waits for the whole transfer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..policy.backend_spec import BackendSpec, Option, SmWork
from .device.base import Device, Stream
from .interface import Backend, Submission, Transfer
from .plan.copies import direct_copies
from .plan.geometry import PoolGeometry


class FencedKernelBackend(Backend):
    """Calls SGLang's copy of the pool, then records the event that fenced forwards wait for."""

    spec = BackendSpec(
        "fenced_kernel",
        # page_first_direct has no SM kernel in SGLang: its rows go through `direct`.
        layouts=frozenset({"layer_first", "page_first", "page_first_direct"}),
        options=(
            Option(
                "block_quota",
                # CUDA programming guide, technical specifications by compute capability: at most 32 resident
                # blocks an SM; and a full GB202 has 192 SMs (NVIDIA's RTX Blackwell whitepaper).
                most=192 * 32,
                because="no GPU runs more thread blocks at once (192 SMs of 32 blocks)",
            ),
        ),
        sm_work=SmWork.TRANSFER,
        index_steps=True,
        upstream_copy=True,
    )
    name = spec.name

    def __init__(self, device: Device, options: Mapping[str, Any]) -> None:
        self._device = device
        self.upstream_indices = device.name != "cpu"
        self._limits = {"block_quota": options["block_quota"]} if "block_quota" in options else {}

    def supports(self, geometry: PoolGeometry) -> str | None:
        if self.spec.cannot_serve(geometry.layout, geometry.kv_kind):
            return f"fenced_kernel does not know layout {geometry.layout}"
        return None

    def prepare(self, geometry: PoolGeometry) -> None:
        """SGLang's pools prepared their own tables."""

    def submit(self, transfer: Transfer, stream: Stream) -> Submission:
        if not self.upstream_indices:
            # SGLang's kernels have no CPU form: the plan's copies stand for them.
            indices = self._device.host_values(transfer.device_slots, transfer.indices_ready)
            device_slots = transfer.geometry.slots_of(indices)
            batch = direct_copies(transfer.geometry, transfer.host_slots, device_slots)
            self._device.copy(batch, stream)
        else:
            transfer.upstream_copy(**self._limits)
        return Submission(
            copies=1,
            nbytes=transfer.tokens * transfer.geometry.bytes_per_token,
            sm_done=self._device.record(stream),
            keep=(transfer.device_slots,),
        )
