"""Devices: the seam's implementations and how a process gets its own."""

from __future__ import annotations

import importlib

from .base import Device, DeviceUnavailableError

__all__ = ["Device", "DeviceUnavailableError", "open_device"]


def open_device(name: str) -> Device:
    """The device that SGLang calls ``name`` (``--device``).

    Raises:
        DeviceUnavailableError: there is no implementation for it.
    """
    if name == "cpu":
        from .cpu import CpuDevice

        return CpuDevice()
    if name == "cuda":
        from .cuda import CudaDevice

        return CudaDevice()
    raise DeviceUnavailableError(unavailable(name) or name)


def unavailable(name: str) -> str | None:
    """Why this process cannot serve SGLang's device ``name``; None if nothing speaks against it.

    Asked in the launching process, before the model is loaded; makes no CUDA context there.
    """
    if name == "cpu":
        return None
    if name != "cuda":
        return f"device {name!r} is not supported (NVIDIA GPUs, and the CPU engine for tests)"
    import torch

    if torch.version.cuda is None:  # SGLang calls ROCm's device "cuda" too
        return "this PyTorch is not built for CUDA: only NVIDIA GPUs are supported"
    for module, distribution in (("cuda.bindings.driver", "cuda-python"), ("triton", "triton")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{module} cannot be imported ({error}); install it: pip install {distribution}"
    return None
