"""What is known of write-back beside forwards that do not wait for it: who copies, and who has seen what.

Pure. The shipped policy decides what to do about it; this says how much is known, in the same words
everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from packaging.version import InvalidVersion, Version

from .backend_spec import BackendSpec, SmWork
from .fact_table import FORWARDS_OF
from .facts import Facts
from .names import FORWARDS

GDC_SINCE = Version("0.4.0")
"""Disassembled FA3 kernels have the dependency wait (ACQBULK) in sglang-kernel 0.4.0 and later; 0.3.20 and
0.3.21 have none. 0.4.0 came out three days before the report, #20611."""

STAGED_SINCE = Version("0.5.14")
TMA_SINCE = Version("0.5.21")
PRODUCER_FENCE_SINCE = Version("0.5.23")
"""SGLang releases with the staged write-back of page_first, the TMA copy kernel, and a D2H that waits for the
forward that writes the rows."""

_FA3 = ("fa3", "dual_chunk_flash_attn", "minicpm_flashattn")
"""Attention backends that run FA3's kernels; the report is of the first."""
_LIKE_B300 = ("dsa", "nsa", "trtllm_mha", "trtllm_mla")


class Level(Enum):
    """How much is known against a setup."""

    BREAKS = "known to break"
    PLAUSIBLE = "plausible, nobody has seen it"
    NO_REPORT = "no report"
    UNKNOWN = "unknown"


class Path(Enum):
    """Who copies, as far as it matters to what runs beside it."""

    STAGED = "a relayout kernel within GPU memory and memory copies (staged)"
    SM_KERNEL = "an SM kernel that writes host memory (the register kernel)"
    TMA_KERNEL = "an SM kernel that writes host memory (the TMA kernel where page and row size allow it)"
    GATHER = "a gather within GPU memory and memory copies"
    COPIES = "memory copies alone"


_PATHS = {
    SmWork.NONE: Path.COPIES,
    SmWork.GATHER: Path.GATHER,
    SmWork.TRANSFER: Path.SM_KERNEL,
    SmWork.UNKNOWN: Path.COPIES,
}


@dataclass(frozen=True)
class Evidence:
    """What is known of some forwards beside one path, in a sentence that names hardware and versions."""

    level: Level
    text: str

    def __str__(self) -> str:
        return f"{self.level.value}: {self.text}"


def upstream_path(backend: str, facts: Facts, *, staged: bool = True) -> Path:
    """What SGLang's ``kernel`` or ``direct`` runs for a host pool of these facts.

    As its MHA and MLA pools choose (``mem_cache/pool_host``, 0.5.18 to 0.5.23). Versions that are not known
    count as the newest; ``staged`` is whether the staged path may run, which ``fenced_kernel`` does without.
    """
    layout = facts.value("mem_layout") or "page_first"
    if backend != "kernel" or layout == "page_first_direct":
        return Path.COPIES
    sglang = _version(facts, "sglang")
    if layout == "page_first" and staged and (sglang is None or sglang >= STAGED_SINCE):
        return Path.STAGED
    arch = str(facts.value("gpu_arch") or "")
    tma = (sglang is None or sglang >= TMA_SINCE) and not arch.startswith("sm8")
    return Path.TMA_KERNEL if tma and layout == "layer_first" else Path.SM_KERNEL


def path_of(spec: BackendSpec, facts: Facts) -> Path:
    """What a backend runs for a pool that it supports; copies alone where it has not said."""
    if spec.upstream_copy:
        return upstream_path("kernel", facts, staged=False)
    return _PATHS[spec.sm_work]


def beside(facts: Facts, path: Path) -> list[Evidence]:
    """What is known of all forwards beside ``path`` when none waits for it; at least that nothing is."""
    missing = [
        name
        for name in ("prefill_attention_backend", "decode_attention_backend", "gpu_arch")
        if facts.value(name) is None
    ]
    found = list(unfenced(facts, path, FORWARDS))
    if found:
        return found
    if missing and path is not Path.COPIES:
        text = f"{' and '.join(missing)}, so what is reported of {path.value} beside it"
        return [Evidence(Level.UNKNOWN, text)]
    return [Evidence(Level.NO_REPORT, f"these forwards beside {path.value}, which they do not wait for")]


def unfenced(facts: Facts, path: Path, forwards: Sequence[str]) -> Iterator[Evidence]:
    """What is known of ``forwards`` (extend, decode) beside ``path`` when they do not wait for it; nothing
    where no report and no likeness to one is known.
    """
    if path is Path.COPIES:
        return
    if fa3 := [each for each in fa3_forwards(facts) if each in forwards]:
        yield _fa3(facts, path, " and ".join(fa3))
    arch = facts.value("gpu_arch")
    names = {str(facts.value(name)) for name, which in FORWARDS_OF.items() if set(which) & set(forwards)}
    if arch in ("sm100", "sm103") and (found := sorted(names & set(_LIKE_B300))):
        yield _blackwell(facts, path, str(arch), found)


def fa3_forwards(facts: Facts) -> list[str]:
    """The forwards that run FA3 kernels on sm90, extend first; none elsewhere."""
    if facts.value("gpu_arch") != "sm90":
        return []
    found = {each for name, forwards in FORWARDS_OF.items() if facts.value(name) in _FA3 for each in forwards}
    return sorted(found, reverse=True)


def _fa3(facts: Facts, path: Path, forwards: str) -> Evidence:
    kernels, binary = _version(facts, "sgl_kernel"), facts.value("fa3_binary")
    what = f"{forwards} by fa3 on sm90 beside {path.value}, and nothing makes the forward wait"
    if path in (Path.STAGED, Path.GATHER):
        since = f" since SGLang {STAGED_SINCE} (June 2026)" if path is Path.STAGED else ""
        return Evidence(
            Level.PLAUSIBLE,
            f"{what}. The crashes of #20611 were beside a kernel that writes host memory; of this path there "
            f"is no report{since}, and nobody has shown that it is safe",
        )
    exact = any(facts.value(name) == "fa3" for name in FORWARDS_OF)
    if exact and binary != "kernels_community" and kernels is not None and kernels < GDC_SINCE:
        return Evidence(
            Level.BREAKS,
            f"{what}: illegal memory access within 20 minutes (#20611, 8xH100, March 2026, layer_first, FA3 "
            f"most likely of sgl-kernel before {GDC_SINCE}, as here: {kernels}; also #19737, #18785, #14363)",
        )
    which = f"FA3 of sgl-kernel {kernels or 'of unknown version'}"
    if binary != "sgl_kernel":
        sure = "" if binary == "kernels_community" else f", if SGLang can load it, else {which}"
        which = f"FA3 of kernels-community, which nobody has examined{sure}"
    return Evidence(
        Level.PLAUSIBLE,
        f"{what}, with {which}. FA3, most likely of sgl-kernel before {GDC_SINCE}, crashed so within 20 "
        f"minutes (#20611, 8xH100, March 2026); nobody has reported it since {GDC_SINCE}, whose FA3 has a "
        "dependency wait (ACQBULK): half a minute of load without any fence did not crash (sglang-kernel "
        "0.4.10, layer_first, page size 64, 118 GB written, H100), and nobody has shown that it cannot",
    )


def _blackwell(facts: Facts, path: Path, arch: str, names: list[str]) -> Evidence:
    what = f"{' and '.join(names)} on {arch} beside {path.value}"
    report = "#38300 (open): 2xB300, SGLang 0.5.18, dsa, MNNVL"
    reported = arch == "sm103" and {"dsa", "nsa"} & set(names) and facts.value("tp") != 1
    if reported and path is not Path.GATHER:
        return Evidence(
            Level.BREAKS, f"{what}: TP hangs, cured by making forwards wait for D2H ({report}, #38463)"
        )
    return Evidence(
        Level.PLAUSIBLE,
        f"{what}, kernels of the family that hung with TP on B300 ({report}); nobody has reported this setup",
    )


def _version(facts: Facts, name: str) -> Version | None:
    value = facts.value(name)
    try:
        return None if value is None else Version(str(value))
    except InvalidVersion:
        return None
