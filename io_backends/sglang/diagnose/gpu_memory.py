"""What SGLang decides by the memory of a GPU that is not here.

Where its size is not known, SGLang is asked at every size that such a GPU has, and what differs is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

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


def merged(answers: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """One answer of those that `dry_run_child` gave, by GiB; facts that differ are unknown.

    A server that SGLang refuses at one size and not at another is refused, with the size.
    """
    first = next(iter(answers.values()))
    refused = {size: answer["error"] for size, answer in answers.items() if "error" in answer}
    if len(refused) == len(answers):
        return first
    if refused:
        size, error = next(iter(refused.items()))
        return {"error": f"with {size} GiB of GPU memory: {error} ({HOW})"}
    facts = dict(first["facts"])
    for name in facts:
        values = {size: answer["facts"][name]["value"] for size, answer in answers.items()}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{value} with {size} GiB" for size, value in values.items())
            facts[name] = {"value": None, "source": f"the GPU's memory decides it: {said}; {HOW}"}
    return {**first, "facts": facts}
