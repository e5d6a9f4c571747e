"""A scheduler on SGLang's CPU engine whose write-back runs on the emulated CUDA device.

Forwards stay SGLang's own: torch.cpu runs them at once. So what is recorded on a stream of torch.cpu is
complete, and such a stream, told to wait for a virtual event, runs virtual streams until that is complete.
"""

from __future__ import annotations

import os
from typing import Any

import emulation
import torch

from sglang_hicache.io_backends.virtual import gpu as virtual_cuda

SEED = "EMULATED_CUDA_SEED"

QUANTUM_BYTES = 20_000
"""So short that writes of a small model take turns."""

UNFENCED = "EMULATED_CUDA_UNFENCED"
"""Set: streams forget every wait, and gathers come late. Then outputs must be wrong."""


def open_device(name: str) -> Any:
    """What the plug-in's runtime gets instead of its CPU device, in the scheduler's process."""
    assert name == "cpu"
    virtual_cuda.reset(int(os.environ[SEED]))
    emulation.install_in_sglang(emulation.install())
    torch.cpu.Stream.wait_event = _wait_event  # type: ignore[method-assign]
    _report()
    from sglang_hicache.io_backends.device.cuda import CudaDevice

    if UNFENCED not in os.environ:
        return CudaDevice(quantum_bytes=QUANTUM_BYTES)
    virtual_cuda.gpu.leave_out = lambda waiting, recorded_on, site: True

    class LateGathers(CudaDevice):
        def gather(self, *args: Any) -> None:  # type: ignore[override]
            for stream in args:
                if isinstance(stream, virtual_cuda.Stream):
                    stream.pace = 1e-6
            super().gather(*args)

    return LateGathers(quantum_bytes=QUANTUM_BYTES)


def _wait_event(stream: Any, event: Any) -> None:
    event.synchronize()


def _report() -> None:
    """What the virtual device did, beside the plug-in's own counters in ``/server_info``."""
    from sglang_hicache.io_backends.sglang.scheduler import writeback as module
    from sglang_hicache.io_backends.sglang.scheduler.writeback import WriteBack

    summary, deferred = WriteBack.summary, module.deferred

    def counted(*args: Any) -> Any:
        virtual_cuda.gpu.counts["deferred completions"] += 1
        return deferred(*args)

    module.deferred = counted

    def with_emulation(writeback: WriteBack) -> dict[str, Any]:
        return {**summary(writeback), "emulated": dict(virtual_cuda.gpu.counts)}

    WriteBack.summary = with_emulation  # type: ignore[method-assign]
