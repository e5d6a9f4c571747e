"""A GPU that is not here, as ``torch.cuda`` would tell SGLang of it, so that SGLang resolves for it."""

from __future__ import annotations

from types import SimpleNamespace

CUDA = "13.0"
"""That torch is built for where nobody says which; SGLang 0.5.18 to 0.5.23 decides by 12.3, 12.8 and 13."""


def stand_in_gpu(gpu_arch: str, gib: int = 80, cuda: str = CUDA) -> None:
    """Let torch.cuda say that eight GPUs of ``gpu_arch`` are here, so that SGLang resolves for them.

    Args:
        gpu_arch: such as ``sm90``.
        gib: memory of each.
        cuda: version that torch is to say it was built for.
    """
    import torch

    def not_this_machine(*_: object) -> int:
        raise RuntimeError("NVML tells of this machine's GPUs")

    torch.version.cuda = cuda
    # SGLang asks NVML first, which CUDA_VISIBLE_DEVICES does not hide (``get_device_sm``).
    setattr(torch.cuda, "_get_nvml_device_index", not_this_machine)  # noqa: B010 (private)

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
