"""Devices: the seam's implementations and how a process gets its own."""

from __future__ import annotations

from sglang_hicache.io_backends.device.base import Device, DeviceUnavailableError

__all__ = ["Device", "DeviceUnavailableError", "open_device"]


def open_device(name: str) -> Device:
    """The device that SGLang calls ``name`` (``--device``).

    Raises:
        DeviceUnavailableError: there is no implementation for it.
    """
    if name == "cpu":
        from sglang_hicache.io_backends.device.cpu import CpuDevice

        return CpuDevice()
    if name == "cuda":
        from sglang_hicache.io_backends.device.cuda import CudaDevice

        return CudaDevice()
    raise DeviceUnavailableError(unavailable(name) or name)


def unavailable(name: str) -> str | None:
    """Why this version cannot run on SGLang's device ``name``; None if it can. Imports nothing heavy."""
    if name == "cpu":
        return None
    if name == "cuda":
        return (
            "the CUDA data path is not part of this version yet; "
            "use --hicache-io-backend kernel or direct on a GPU"
        )
    return f"device {name!r} is not supported (NVIDIA GPUs, and the CPU engine for tests)"
