"""A scheduler, as far as fences ask it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang_hicache.io_backends.sglang.scheduler.fences import Fences


def scheduler(forward_stream: Any, *, enable_overlap: bool = True) -> Any:
    return SimpleNamespace(enable_overlap=enable_overlap, forward_stream=forward_stream)


def fences(device: Any, forward_stream: Any = None) -> Fences:
    """Fences for forwards on ``forward_stream``, or on the stream that is current."""
    return Fences(device, scheduler(device.current_stream() if forward_stream is None else forward_stream))
