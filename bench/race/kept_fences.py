"""The choices of ``--fences``. Imports nothing of the simulation, which needs torch."""

from __future__ import annotations

from enum import StrEnum


class KeptFences(StrEnum):
    """Which fences are kept."""

    none = "none"
    producer = "producer"
    both = "both"
    auto = "auto"
