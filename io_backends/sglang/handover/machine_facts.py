"""Facts that are found on a machine before any server: its GPU, and the packages that SGLang would use."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version

from ....policy.fact_spec import FactValue
from ....policy.fact_table import SERVER_FACTS
from ....policy.facts import GIVEN, Fact, Facts, expanded
from ...device.gpu_facts import gpu_facts


def detect(given: Mapping[str, FactValue] | None = None) -> Facts:
    """The facts about this machine, with `given` values (source "given") before detected ones.

    `given` may hold the shorthand ``attention_backend``; a None counts as not given. What cannot be found
    stays unknown, and its source says why. torch is imported, and the driver asked, only if the GPU's
    architecture was not given: a given one may be another machine's.
    """
    facts = {name: Fact(value, GIVEN) for name, value in expanded(given or {}).items() if value is not None}
    for name, find in _PACKAGES.items():
        if name not in facts:
            facts[name] = find()
    device = facts.get("device")
    facts |= gpu_facts(facts, cpu_server=device is not None and device.value == "cpu")
    facts.setdefault("device", _device(facts["gpu_arch"]))
    for name, spec in SERVER_FACTS.items():
        if name not in facts and spec.unknown:
            facts[name] = Fact(None, spec.unknown)
        elif name not in facts and spec.default is not None:
            facts[name] = Fact(spec.default, spec.default_because)
    return Facts(facts)


def _installed(*distributions: str) -> Fact:
    """The version of the first of `distributions` that is installed."""
    for name in distributions:
        try:
            return Fact(version(name), f"the installed {name}")
        except PackageNotFoundError:
            continue
    return Fact(None, f"{distributions[0]} is not installed here")


def _fa3_binary() -> Fact:
    """Whose FlashAttention-3 SGLang loads, by its own rule (kernels/ops/attention/flash_attention_v3.py, the
    same in 0.5.18 to 0.5.23): its kernel package's, or the Hub's if asked for and loadable. Whether it can be
    loaded shows when SGLang tries, and then only in its log: until then it is not known whose it is.
    """
    asked = os.environ.get(_FA3_VARIABLE, "").lower()
    if asked not in ("false", "0", "no", "n"):
        return Fact("sgl_kernel", f"SGLang's default; {_FA3_VARIABLE}=0 would select another")
    if importlib.util.find_spec("kernels") is None:
        return Fact("sgl_kernel", f"{_FA3_VARIABLE} is off, but SGLang needs the package kernels for that")
    return Fact(None, f"{_FA3_VARIABLE} is off: kernels-community's if SGLang can load it, else its own")


_FA3_VARIABLE = "SGLANG_USE_SGL_FA3_KERNEL"

_PACKAGES: Mapping[str, Callable[[], Fact]] = {
    "sglang": lambda: _installed("sglang"),
    "sgl_kernel": lambda: _installed("sglang-kernel", "sgl-kernel"),  # the second is its name before 0.4.0
    "flashinfer": lambda: _installed("flashinfer-python"),
    "fa3_binary": _fa3_binary,
}


def _device(arch: Fact) -> Fact:
    """The device, which follows from the architecture; without one, where a server would run is unknown."""
    if arch.value is None:
        return Fact(None, arch.source)
    return Fact("cpu" if arch.value == "cpu" else "cuda", "follows from gpu_arch")
