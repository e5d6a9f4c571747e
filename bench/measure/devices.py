"""The device a measurement runs on: CUDA with timing events, or the CPU in its place.

Both are devices of the seam (:mod:`sglang_hicache.io_backends.device`), so that the backends under
measurement are the ones that serve. What a measurement needs besides is :class:`Bench`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from ...io_backends.device.base import Device
from ...io_backends.device.cpu import CpuDevice, CpuStream

FLUSH_BYTES = 256 * 2**20
"""Written before a repeat so that nothing of the rows is left in L2: the largest is 126 MB (B200)."""


class Bench(Device, Protocol):
    """A device whose events measure time: they have ``elapsed_time(later)`` in ms and ``synchronize()``."""

    where: str
    """torch's name of the device that rows are on: ``cuda`` or ``cpu``."""

    def synchronize(self) -> None:
        """Wait until everything that was enqueued is done."""
        ...

    def flush(self) -> None:
        """Enqueue, on the current stream, what drives rows out of L2."""
        ...

    def forward_stream(self) -> Any:
        """A new stream at the priority that SGLang's forwards have."""
        ...

    def indices(self, slots: np.ndarray) -> Any:
        """Slots as an int64 tensor [n] on the device."""
        ...


def open_bench(cpu: bool, **options: Any) -> Bench:
    """The device to measure on.

    Args:
        cpu: the CPU in its place.
        options: of :class:`~sglang_hicache.io_backends.device.cuda.CudaDevice`; a CPU has none.

    Raises:
        DeviceUnavailableError: no GPU that can be used, and ``cpu`` is not set.
    """
    return TimedCpu() if cpu else timed_cuda(**options)


def gpu_missing() -> str | None:
    """Why there is no GPU to measure on, or None."""
    from ...io_backends.device import unavailable

    reason = unavailable("cuda")
    if reason is not None:
        return reason
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"


class TimedCpuEvent:
    """The time when it was recorded: all work before it is done by then."""

    def __init__(self) -> None:
        self._ns = time.perf_counter_ns()

    def elapsed_time(self, later: TimedCpuEvent) -> float:
        return (later._ns - self._ns) / 1e6

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        return True


class TimedCpu(CpuDevice):
    """Ordinary memory, work done as it is enqueued. Exercises the code; its times are the CPU's."""

    where = "cpu"

    def record(self, stream: CpuStream) -> Any:
        return TimedCpuEvent()

    def synchronize(self) -> None:
        """Everything is done."""

    def flush(self) -> None:
        """Not needed: nothing is concluded from CPU times."""

    def forward_stream(self) -> CpuStream:
        return CpuStream("forward")

    def indices(self, slots: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(slots)


def timed_cuda(**options: Any) -> Bench:
    """The GPU, with options of ``CudaDevice``.

    Raises:
        DeviceUnavailableError: there is none that can be used.
    """
    import torch

    from ...io_backends.device.cuda import CudaDevice

    class TimedCuda(CudaDevice):
        where = "cuda"

        def __init__(self) -> None:
            super().__init__(**options)
            self._scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

        def record(self, stream: Any) -> Any:
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(stream)
            return event

        def synchronize(self) -> None:
            torch.cuda.synchronize()

        def flush(self) -> None:
            self._scratch.zero_()

        def forward_stream(self) -> Any:
            # Not out of torch's pool: one that carried copies in an earlier case runs its events behind the
            # copy engine's turn.
            return self.new_stream()

        def indices(self, slots: np.ndarray) -> Any:
            return torch.from_numpy(slots).cuda()

    return TimedCuda()


@contextmanager
def no_collection() -> Iterator[None]:
    """Inside, Python's garbage collector does not run, as in timeit."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
