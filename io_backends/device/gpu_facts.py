"""What can be found out about this machine's GPU: through torch, NVML and the CUDA driver."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from ...policy.fact_spec import FactKind
from ...policy.fact_table import SERVER_FACTS
from ...policy.facts import GIVEN, Fact
from .base import DeviceUnavailableError
from .driver import Driver


def gpu_facts(given: Mapping[str, Fact], *, cpu_server: bool) -> dict[str, Fact]:
    """The facts of this machine's GPU that are not in `given`, by name, ``gpu_arch`` among them.

    What cannot be found is unknown, and its source says why. torch is imported, and the driver asked, only if
    the GPU's architecture is not given: a given one may be another machine's.

    Args:
        given: facts that are known already.
        cpu_server: the server runs on the CPU, and no GPU is probed.
    """
    arch = given.get("gpu_arch") or (Fact("cpu", "follows from device") if cpu_server else _gpu_arch())
    found = {"gpu_arch": arch}
    for name, find in _FINDERS.items():
        if name not in given:
            found[name] = _without_gpu(name, arch) or find()
    return found


def _gpu_arch() -> Fact:
    """The architecture of the current GPU, through torch; unknown with the reason when torch cannot say."""
    torch = _torch_with_gpu()
    if isinstance(torch, Fact):
        return torch
    try:
        major, minor = torch.cuda.get_device_capability()
    except RuntimeError as error:
        return Fact(None, f"torch cannot read the GPU: {_first_line(error)}")
    return Fact(f"sm{major}{minor}", "torch.cuda on this machine")


def _gpu_name() -> Fact:
    torch = _torch_with_gpu()
    if isinstance(torch, Fact):
        return torch
    try:
        return Fact(str(torch.cuda.get_device_name()), "torch.cuda on this machine")
    except RuntimeError as error:
        return Fact(None, f"torch cannot read the GPU: {_first_line(error)}")


def _cuda() -> Fact:
    """The CUDA version that torch was built with."""
    torch = _torch_with_gpu()
    return torch if isinstance(torch, Fact) else Fact(str(torch.version.cuda), "torch's build")


def _torch_with_gpu() -> Any:
    """torch, where it can use an NVIDIA GPU; else an unknown Fact that says why not."""
    try:
        torch: Any = importlib.import_module("torch")
    except ModuleNotFoundError:
        return Fact(None, "torch is not installed here")
    except (ImportError, OSError) as error:  # a broken installation: a missing CUDA library raises OSError
        return Fact(None, f"torch cannot be imported here: {_first_line(error)}")
    if getattr(torch.version, "hip", None):
        # ROCm answers get_device_capability too, with numbers that are no sm architecture.
        return Fact(None, "an AMD GPU has no sm architecture")
    if not torch.cuda.is_available():
        return Fact(None, "torch sees no GPU here")
    return torch


def _driver() -> Fact:
    """The version of the NVIDIA driver, through NVML's own binding, which SGLang brings."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return Fact(None, "nvidia-ml-py is not installed here")
    try:
        nvml.nvmlInit()
        try:
            return Fact(str(nvml.nvmlSystemGetDriverVersion()), "NVML on this machine")
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        return Fact(None, f"NVML cannot say: {_first_line(error)}")


def _batch_copy() -> Fact:
    """Whether copies go in batches (cuMemcpyBatchAsync), as the copy backends themselves find out."""
    try:
        driver = Driver()
    except (DeviceUnavailableError, RuntimeError) as error:
        return Fact(None, f"the driver cannot be asked here: {_first_line(error)}")
    return Fact(driver.batched, f"the CUDA driver, version {driver.version}")


def _without_gpu(name: str, arch: Fact) -> Fact | None:
    """Fact `name` where this machine's GPU is not the one that is asked about, or there is none."""
    if arch.value == "cpu":
        if SERVER_FACTS[name].kind is FactKind.FLAG:
            return Fact(False, "a CPU server has no copy engine")
        return Fact(None, "a CPU server has no GPU")
    if arch.value is None:
        return Fact(None, arch.source)
    if arch.source == GIVEN:
        return Fact(None, "not given; gpu_arch was, and this machine's GPU may be another")
    return None


_FINDERS: Mapping[str, Callable[[], Fact]] = {
    "gpu_name": _gpu_name,
    "driver": _driver,
    "cuda": _cuda,
    "batch_copy": _batch_copy,
}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
