"""Options of the shipped backends: which there are, and the values that can work."""

from __future__ import annotations

from dataclasses import dataclass

from .format.validators import shown
from .names import NameProblem, check_name


@dataclass(frozen=True)
class Option:
    """A whole number from 1 to ``most``, or one of ``words``; ``why`` says where the upper end comes from."""

    most: int
    why: str
    words: tuple[str, ...] = ()


# A full GB202 has 192 SMs (NVIDIA's RTX Blackwell whitepaper), more than any other of its GPUs.
_CTAS = Option(192, "no GPU has more SMs (a full GB202 has 192, a B200 148, an H200 132)")
# CUDA programming guide, technical specifications by compute capability: at most 32 resident blocks an SM.
_BLOCKS = Option(192 * 32, "no GPU runs more thread blocks at once (192 SMs of 32 blocks)")
_BATCH = Option(51_827, "a batch call of 51,828 copies crashed (vLLM #49276)")
_STAGING = Option(288 * 1024, "no GPU has more memory (a B300 has 288 GB)", ("auto",))

#: Options of the shipped backends; a third-party backend takes any option.
BACKEND_OPTIONS: dict[str, dict[str, Option]] = {
    "fenced_kernel": {"block_quota": _BLOCKS},
    "copy_engine": {"max_copies_per_batch": _BATCH},
    "hybrid": {"staging_mb": _STAGING, "gather_ctas": _CTAS, "max_copies_per_batch": _BATCH},
}


def check_option(backend: str, name: str, value: object) -> None:
    """Raises NameProblem if `backend` has no option `name`, or cannot work with `value`."""
    known = BACKEND_OPTIONS.get(backend)
    if known is None:
        return
    check_name(f"option of {backend}", name, known)
    option = known[name]
    if value in option.words:
        return
    if type(value) is not int or value < 1:
        what = " or ".join(("a whole number above 0", *option.words))
        raise NameProblem(f"{name} must be {what}, not {shown(value)}")
    if value > option.most:
        raise NameProblem(f"{name} must be at most {option.most:,}, not {value:,}: {option.why}")
