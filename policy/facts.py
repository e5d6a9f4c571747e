"""What is known of a server when a policy is asked: one value for each fact name, with where it came from."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .names import COUNTED, FLAGS, NO_SPECULATION, NameProblem, nearest

FactValue = str | int | bool | None

FACT_NAMES: tuple[str, ...] = (
    "prefill_attention_backend",
    "decode_attention_backend",
    "verify_attention_backend",
    "draft_attention_backend",
    "gpu_arch",
    "gpu_name",
    "driver",
    "cuda",
    "sglang",
    "sgl_kernel",
    "flashinfer",
    "fa3_binary",
    "kv_kind",
    "mem_layout",
    "page_size",
    "row_bytes",
    "write_policy",
    "overlap",
    "speculative",
    "tp",
    "dp",
    "pp",
    "pinned_memory",
    "batch_copy",
    "device",
)
# What `--attention-backend` alone decides in SGLang.
ATTENTION_FACTS: tuple[str, ...] = FACT_NAMES[:4]

GIVEN = "given"
NOT_GIVEN = "not given"


@dataclass(frozen=True)
class Fact:
    """One fact: ``value`` (None when unknown) and ``source``, in words a user understands."""

    value: FactValue
    source: str

    def __str__(self) -> str:
        return "unknown" if self.value is None else str(self.value)


class Facts(Mapping[str, Fact]):
    """Every fact name with its Fact, always all of them and in the order of `FACT_NAMES`; never changes.

    Values are not checked against the vocabulary: a running SGLang may hold a name this project does not know
    (a third-party attention backend), and such a value matches no rule.
    """

    __slots__ = ("_facts",)

    def __init__(self, facts: Mapping[str, Fact] | None = None) -> None:
        """`facts` by name; the rest is unknown. Raises NameProblem for a name that is no fact, and TypeError
        for a value of the wrong type.
        """
        given = dict(facts or {})
        for name, fact in given.items():
            _check(name, fact.value)
        self._facts = {name: given.get(name, Fact(None, NOT_GIVEN)) for name in FACT_NAMES}

    @classmethod
    def given(cls, *, source: str = GIVEN, **values: FactValue) -> Facts:
        """Facts from values by name, all with one source. ``attention_backend`` is shorthand: it sets prefill
        and decode where they are not set themselves, as SGLang's option of that name does.
        """
        return cls(
            {name: Fact(value, source) for name, value in _expand(values).items() if value is not None}
        )

    def __getitem__(self, name: str) -> Fact:
        return self._facts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def __repr__(self) -> str:
        return f"Facts({', '.join(f'{name}={fact}' for name, fact in self.items())})"

    def value(self, name: str) -> FactValue:
        """The value of fact `name`, None when unknown. Raises KeyError for a name that is no fact."""
        return self._facts[name].value

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain JSON types: ``{name: {"value": ..., "source": ...}}``, null for unknown."""
        return {name: {"value": fact.value, "source": fact.source} for name, fact in self.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> Facts:
        """The inverse of `to_dict`."""
        return cls({name: Fact(entry["value"], entry["source"]) for name, entry in data.items()})


def detect(given: Mapping[str, FactValue] | None = None) -> Facts:
    """The facts about this machine, with `given` values (source "given") before detected ones.

    `given` may hold the shorthand ``attention_backend``; a None counts as not given. What cannot be found
    stays unknown, and its source says why. torch is imported, and the driver asked, only if the GPU's
    architecture was not given: a given one may be another machine's.
    """
    values = {name: value for name, value in _expand(given or {}).items() if value is not None}
    facts = {name: Fact(value, GIVEN) for name, value in values.items()}
    for name, find in _SOFTWARE.items():
        if name not in facts:
            facts[name] = find()
    # A CPU server needs no probe of a GPU.
    arch = facts.get("gpu_arch") or (
        Fact("cpu", "follows from device") if values.get("device") == "cpu" else _gpu_arch()
    )
    facts["gpu_arch"] = arch
    for name, find in _GPU.items():
        if name not in facts:
            facts[name] = _without_gpu(name, arch) or find()
    facts.setdefault("device", _device(arch))
    for name, why in _NOT_GIVEN.items():
        facts.setdefault(name, Fact(None, why))
    for name, (value, source) in _DEFAULTS.items():
        facts.setdefault(name, Fact(value, source))
    return Facts(facts)


def _check(name: str, value: object) -> None:
    if name not in FACT_NAMES:
        raise NameProblem(f"unknown fact '{name}'", nearest(name, FACT_NAMES))
    wanted: type = int if name in COUNTED else bool if name in FLAGS else str
    # bool is an int, and True is no page size.
    good = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    if value is not None and not good:
        raise TypeError(f"fact {name} is {value!r}; it must be {wanted.__name__} or None")


def _expand(values: Mapping[str, FactValue]) -> dict[str, FactValue]:
    """`values` with the shorthand ``attention_backend`` written out."""
    expanded = dict(values)
    both = expanded.pop("attention_backend", None)
    for name in ATTENTION_FACTS:
        if both is not None and expanded.get(name) is None:
            expanded[name] = both
    return expanded


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
    same in 0.5.18 to 0.5.23): its kernel package's, or the Hub's if asked for and loadable.
    """
    asked = os.environ.get(_FA3_VARIABLE, "").lower()
    if asked not in ("false", "0", "no", "n"):
        return Fact("sgl_kernel", f"SGLang's default; {_FA3_VARIABLE}=0 would select another")
    if importlib.util.find_spec("kernels") is None:
        return Fact("sgl_kernel", f"{_FA3_VARIABLE} is off, but SGLang needs the package kernels for that")
    return Fact("kernels_community", f"{_FA3_VARIABLE} is off")


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
    from ..io_backends.device.base import DeviceUnavailableError
    from ..io_backends.device.driver import Driver

    try:
        driver = Driver()
    except (DeviceUnavailableError, RuntimeError) as error:
        return Fact(None, f"the driver cannot be asked here: {_first_line(error)}")
    return Fact(driver.batched, f"the CUDA driver, version {driver.version}")


def _without_gpu(name: str, arch: Fact) -> Fact | None:
    """Fact `name` of `_GPU` where this machine's GPU is not the one that is asked about, or there is none."""
    if arch.value == "cpu":
        if name in FLAGS:
            return Fact(False, "a CPU server has no copy engine")
        return Fact(None, "a CPU server has no GPU")
    if arch.value is None:
        return Fact(None, arch.source)
    if arch.source == GIVEN:
        return Fact(None, "not given; gpu_arch was, and this machine's GPU may be another")
    return None


_FA3_VARIABLE = "SGLANG_USE_SGL_FA3_KERNEL"

_SOFTWARE: Mapping[str, Callable[[], Fact]] = {
    "sglang": lambda: _installed("sglang"),
    "sgl_kernel": lambda: _installed("sglang-kernel", "sgl-kernel"),  # the second is its name before 0.4.0
    "flashinfer": lambda: _installed("flashinfer-python"),
    "fa3_binary": _fa3_binary,
}
_GPU: Mapping[str, Callable[[], Fact]] = {
    "gpu_name": _gpu_name,
    "driver": _driver,
    "cuda": _cuda,
    "batch_copy": _batch_copy,
}
MACHINE_FACTS: tuple[str, ...] = ("gpu_arch", *_GPU, *_SOFTWARE)
"""What `detect` finds on a machine by itself; all ranks of a server must have it in common."""

_NOT_GIVEN: Mapping[str, str] = {
    "prefill_attention_backend": "not given; SGLang chooses it from the model",
    "decode_attention_backend": "not given; SGLang chooses it from the model",
    "verify_attention_backend": "not given; runs with speculative decoding only",
    "draft_attention_backend": "not given; runs with speculative decoding only",
    "kv_kind": "not given; SGLang takes it from the model",
    "row_bytes": "not given; follows from the model",
    "pinned_memory": "not given; SGLang decides it when it allocates",
}
# Defaults read in SGLang 0.5.23 and the same in 0.5.18; page_first holds from 0.5.14 on (#21631).
_DEFAULTS: Mapping[str, tuple[FactValue, str]] = {
    "mem_layout": ("page_first", "SGLang's default since 0.5.14"),
    "page_size": (1, "SGLang's default (0.5.23); some attention backends raise it"),
    "write_policy": ("write_through", "SGLang's default"),
    "overlap": (True, "SGLang's default; some options and models turn it off"),
    "speculative": (NO_SPECULATION, "SGLang's default"),
    "tp": (1, "SGLang's default"),
    "dp": (1, "SGLang's default"),
    "pp": (1, "SGLang's default"),
}


def _device(arch: Fact) -> Fact:
    """cuda or cpu, which follows from the architecture; without one, where a server would run is unknown."""
    if arch.value is None:
        return Fact(None, arch.source)
    return Fact("cpu" if arch.value == "cpu" else "cuda", "follows from gpu_arch")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
