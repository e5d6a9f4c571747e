"""What an attention backend reads from the GPU to plan a forward, past the copies of write-back.

flashinfer plans each prefill on the host, from index pointers that it copies there one by one: five times the
host waits for the forward before, and then for a turn of the copy to the host that is under way. While there
is one, those reads are a kernel's, on the same stream, at the same place (:class:`PlanReads`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...device.base import SmallReads
from .writes import Counters

_CPU = ("cpu", torch.device("cpu"))


class PlanReads(TorchFunctionMode):
    """Inside, what copies a device tensor to the host in this thread takes ``reads``, if that serves it.

    Other spellings of such a copy (keywords, ``non_blocking``, ``numpy()``) are torch's as before. A function
    that ``torch.compile`` made is compiled once more for being called inside; flashinfer's planning has none.

    Args:
        reads: of the device.
        counters: told of each.
    """

    def __init__(self, reads: SmallReads, counters: Counters) -> None:
        super().__init__()
        self._reads, self._counters = reads, counters

    @staticmethod
    def possible() -> bool:
        """Whether anything may be read now, or an event be asked: not while a CUDA graph is captured."""
        return not torch.cuda.is_current_stream_capturing()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not kwargs and func in _WITH_VALUES and _waits(func, args) and self._reads.serves(args[0]):
            self._counters.plan_reads += 1
            return _WITH_VALUES[func](self._reads.read(args[0]))
        return func(*args, **(kwargs or {}))


def _itself(values: torch.Tensor) -> torch.Tensor:
    return values


_WITH_VALUES: dict[Any, Callable[[torch.Tensor], Any]] = {
    torch.Tensor.to: _itself,
    torch.Tensor.cpu: _itself,
    torch.Tensor.item: torch.Tensor.item,
    torch.Tensor.tolist: torch.Tensor.tolist,
    torch.Tensor.__int__: int,
    torch.Tensor.__float__: float,
    torch.Tensor.__bool__: bool,
}
"""What reads a tensor to the host, by what it makes of one that is there."""


def _waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether that call copies to the host as it is, and is done when it returns."""
    if func is torch.Tensor.to:
        return len(args) == 2 and args[1] in _CPU
    return len(args) == 1
