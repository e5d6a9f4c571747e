"""A write-back that is wrong on purpose, so that a check of outputs can prove that it would notice.

It is a third-party backend like any other: known to servers only through an entry point in a folder that the
check puts on their ``PYTHONPATH``. Nothing of it is reachable in an installation.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..io_backends.copy_engine import CopyEngineBackend
from ..io_backends.device.base import Stream
from ..io_backends.interface import Submission, Transfer
from ..io_backends.plan.copies import CopyBatch, direct_copies
from ..io_backends.plan.geometry import PoolGeometry
from ..io_backends.registry import ENTRY_POINT_GROUP

NAME = "damaged"


class DamagedBackend(CopyEngineBackend):
    """``copy_engine`` that leaves out the last layer of the last component (V)."""

    name = NAME

    def supports(self, geometry: PoolGeometry) -> str | None:
        return None  # any layout: how many copies it takes does not matter here

    def submit(self, transfer: Transfer, stream: Stream) -> Submission:
        geometry = transfer.geometry
        device_slots = self._device.host_values(transfer.device_slots, transfer.indices_ready)
        batch = direct_copies(geometry, transfer.host_slots, device_slots)
        part = geometry.components[-1]
        first = part.device_rows[-1]
        beyond = first + geometry.device_slots * part.device_row_stride
        kept = np.flatnonzero((batch.src < first) | (batch.src >= beyond))
        batch = CopyBatch(batch.dst[kept], batch.src[kept], batch.nbytes[kept])
        self._device.copy(batch, stream)
        return Submission(len(batch), batch.total_bytes, keep=(batch, transfer.device_slots))


def environment(folder: Path) -> dict[str, str]:
    """Make ``--hicache-io-backend damaged`` known to a server: an installed third party, in ``folder``."""
    return third_party(folder, NAME, f"{__name__}:DamagedBackend")


def third_party(folder: Path, name: str, target: str) -> dict[str, str]:
    """Variables that make backend ``name`` (``module:factory``) known to child processes.

    Writes into ``folder`` what installing a distribution with that entry point would.
    """
    metadata = folder / f"hicache_io_{name}-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: hicache-io-{name}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{name} = {target}\n")
    inherited = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": f"{folder}:{inherited}" if inherited else str(folder)}
