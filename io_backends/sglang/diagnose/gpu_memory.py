"""What SGLang decides by the memory of a GPU that is not here.

Where its size is not known, SGLang is asked at every size that such a GPU has, and what differs is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import typer

# GiB of each architecture's GPUs; those of MIG slices are not checked against NVIDIA's guide. The bound by
# which SGLang decides a fact of ours is 60 GiB (qwen3_vl.py and memory_hook.py of 0.5.23), so that one size
# on each side of it stands for others: of sm90, 80 for H100, H800 and GPUs with 64; 141 for H200, H20 and
# GH200; 40 for MIG slices of any of them (10 to 47). Slices of sm100 and sm103 have 23 to 45 and 34 to 67.
# The first is asked first.
_SIZES: Mapping[str, tuple[int, ...]] = {
    "sm75": (16, 24, 48),
    "sm80": (80, 40, 24),
    "sm86": (24, 16, 48),
    "sm89": (48, 24, 16),
    "sm90": (80, 141, 40),
    "sm100": (180, 45),
    "sm103": (268, 34),
    "sm120": (96, 32, 16),
    "sm121": (119,),
}
_ALL = (80, 16, 24, 48, 141, 180)

HOW = "give --gpu-memory"

GpuMemory = Annotated[
    int | None,
    typer.Option(
        "--gpu-memory",
        min=1,
        metavar="GIB",
        help="With --server-args and --gpu-arch: memory of that GPU, where its name does not tell.",
        show_default=False,
    ),
]
"""The option of every command that takes ``--server-args``."""


def sizes(gpu_arch: str, given_gib: int | None) -> tuple[int, ...]:
    """Sizes in GiB to ask SGLang at: what was given, else all that an architecture has."""
    return (given_gib,) if given_gib is not None else _SIZES.get(gpu_arch, _ALL)


class NotGiven(NamedTuple):
    """What is not known of the other machine: its name, one value of it in words, and how to say it."""

    name: str
    value: str
    how: str


MEMORY = NotGiven("the GPU's memory", "{} GiB of GPU memory", HOW)
CUDA = NotGiven("the CUDA that torch was built for", "CUDA {}", "give --fact cuda=VERSION")

CUDAS = ("13.0", "12.9")
"""One on each side of the bound by which SGLang refuses a server (13, ``attention_hook.py``); a torch that
SGLang 0.5.18 to 0.5.23 pins is built for 12.8 and more, which is above the others."""


def merged(answers: Mapping[Any, dict[str, Any]], of: NotGiven = MEMORY) -> dict[str, Any]:
    """One answer of those that `dry_run_child` gave, by values of what is unknown; facts that differ are too.

    A server that SGLang refuses with one value and not with another is refused, with the value.
    """
    first = next(iter(answers.values()))
    refused = {size: answer["error"] for size, answer in answers.items() if "error" in answer}
    if len(refused) == len(answers):
        return first
    if refused:
        value, error = next(iter(refused.items()))
        return {"error": f"with {of.value.format(value)}: {error} ({of.how})"}
    facts = dict(first["facts"])
    for name in facts:
        values = {size: answer["facts"][name]["value"] for size, answer in answers.items()}
        if len(set(values.values())) > 1:
            brief = of.value.removesuffix(" of GPU memory")
            said = ", ".join(f"{value} with {brief.format(which)}" for which, value in values.items())
            facts[name] = {"value": None, "source": f"{of.name} decides it: {said}; {of.how}"}
    return {**first, "facts": facts}
