"""What is known of a server when a policy is asked: one value for each fact name, with where it came from."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sglang_hicache.policy.vocabulary import NameProblem, nearest

FactValue = str | int | None

FACT_NAMES: tuple[str, ...] = (
    "prefill_attention_backend",
    "decode_attention_backend",
    "gpu_arch",
    "sgl_kernel",
    "sglang",
    "kv_kind",
    "mem_layout",
    "page_size",
    "device",
)

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
    stays unknown, and its source says why. torch is imported only if the GPU's architecture was not given.
    """
    values = {name: value for name, value in _expand(given or {}).items() if value is not None}
    facts = {name: Fact(value, GIVEN) for name, value in values.items()}
    if "sglang" not in facts:
        facts["sglang"] = _installed("sglang")
    if "sgl_kernel" not in facts:
        facts["sgl_kernel"] = _installed("sglang-kernel", "sgl-kernel")  # the second is its name before 0.4.0
    if "gpu_arch" not in facts:
        # A CPU server needs no probe of a GPU.
        facts["gpu_arch"] = (
            Fact("cpu", "follows from device") if values.get("device") == "cpu" else _gpu_arch()
        )
    if "device" not in facts:
        facts["device"] = _device(facts["gpu_arch"])
    unknown = {
        "prefill_attention_backend": "not given; SGLang chooses it from the model",
        "decode_attention_backend": "not given; SGLang chooses it from the model",
        "kv_kind": "not given; SGLang takes it from the model",
    }
    for name, why in unknown.items():
        facts.setdefault(name, Fact(None, why))
    # Both defaults read in SGLang 0.5.23; page_first holds from 0.5.14 on (#21631), so for every supported
    # version.
    facts.setdefault("mem_layout", Fact("page_first", "SGLang's default since 0.5.14"))
    facts.setdefault("page_size", Fact(1, "SGLang's default (0.5.23); some attention backends raise it"))
    return Facts(facts)


def _check(name: str, value: object) -> None:
    if name not in FACT_NAMES:
        raise NameProblem(f"unknown fact '{name}'", nearest(name, FACT_NAMES))
    wanted: type = int if name == "page_size" else str
    # bool is an int, and True is no page size.
    if value is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
        raise TypeError(f"fact {name} is {value!r}; it must be {wanted.__name__} or None")


def _expand(values: Mapping[str, FactValue]) -> dict[str, FactValue]:
    """`values` with the shorthand ``attention_backend`` written out."""
    expanded = dict(values)
    both = expanded.pop("attention_backend", None)
    for name in ("prefill_attention_backend", "decode_attention_backend"):
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


def _gpu_arch() -> Fact:
    """The architecture of the current GPU, through torch; unknown with the reason when torch cannot say."""
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
    try:
        major, minor = torch.cuda.get_device_capability()
    except RuntimeError as error:
        return Fact(None, f"torch cannot read the GPU: {_first_line(error)}")
    return Fact(f"sm{major}{minor}", "torch.cuda on this machine")


def _device(arch: Fact) -> Fact:
    """cuda or cpu, which follows from the architecture; without one, where a server would run is unknown."""
    if arch.value is None:
        return Fact(None, arch.source)
    return Fact("cpu" if arch.value == "cpu" else "cuda", "follows from gpu_arch")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
