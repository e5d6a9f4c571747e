"""A GPU that is not here, as ``torch.cuda`` would tell SGLang of it, so that SGLang resolves for it."""

from __future__ import annotations

from types import SimpleNamespace


def stand_in_gpu(gpu_arch: str, gib: int = 80) -> None:
    """Let torch.cuda say that eight GPUs of ``gpu_arch`` are here, so that SGLang resolves for them."""
    import torch

    nbytes = gib * 2**30
    digits = gpu_arch.removeprefix("sm").rstrip("af")
    major, minor = int(digits[:-1]), int(digits[-1])
    properties = SimpleNamespace(
        name=gpu_arch,
        major=major,
        minor=minor,
        total_memory=nbytes,
        multi_processor_count=132,
        is_integrated=False,
    )
    stand_in = {
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_name": lambda device=None: gpu_arch,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (nbytes, nbytes),
    }
    for name, function in stand_in.items():
        setattr(torch.cuda, name, function)
