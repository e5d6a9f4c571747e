"""A write-back that copies nothing and says it is done: the limit that no write-back can beat.

Host memory then holds rubbish, and a request that reads it back gets a wrong answer. So it is for timing
alone, and known to servers only as ``damaged`` is; a server refuses it without
``--i-know-this-corrupts`` all the same, and no policy can choose it (:mod:`~..io_backends.sglang.unsafe`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...io_backends.device.base import Device, Stream
from ...io_backends.interface import Backend, Submission, Transfer
from ...io_backends.plan.geometry import PoolGeometry
from ...io_backends.sglang.unsafe import NULL
from ...policy.log import logger_of
from ..damaged import third_party

logger = logger_of(__name__)


class NullBackend(Backend):
    """Acknowledges every write of any pool."""

    name = NULL

    def __init__(self, device: Device, options: Mapping[str, Any]) -> None:
        logger.warning("hicache-io: backend %s copies nothing: answers will be wrong", NULL)

    def supports(self, geometry: PoolGeometry) -> str | None:
        return None

    def prepare(self, geometry: PoolGeometry) -> None:
        pass

    def submit(self, transfer: Transfer, stream: Stream) -> Submission:
        return Submission(copies=0, nbytes=0, keep=(transfer.device_slots,))


def environment(folder: Path) -> dict[str, str]:
    """Make ``--hicache-io-backend null`` known to a server: an installed third party, in ``folder``."""
    return third_party(folder, NULL, f"{__name__}:NullBackend")
