"""The names that a policy file, a fact or an option may hold, and the valid one nearest to a typo."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from packaging.version import InvalidVersion, Version

# ATTENTION_BACKEND_CHOICES of SGLang 0.5.23 (sglang/srt/arg_groups/choices.py), and the two names that only
# its older supported versions have (0.5.18, 0.5.19: sglang/srt/server_args.py). Frozen here so that a policy
# file means the same on a machine without SGLang; `tests/policy` compares it with an installed SGLang.
ATTENTION_BACKENDS: tuple[str, ...] = (
    "triton",
    "torch_native",
    "flex_attention",
    "dsa",
    "nsa",
    "qsa",
    "dsv4",
    "compressed",
    "fa3",
    "fa4",
    "flashinfer",
    "llada2_cfg_flashinfer",
    "flashmla",
    "trtllm_mla",
    "cutedsl_mla",
    "tokenspeed_mla",
    "trtllm_mha",
    "hpc_ops",
    "minicpm_flashattn",
    "minicpm_flashinfer",
    "aiter",
    "wave",
    "intel_amx",
    "ascend",
    "intel_xpu",
    # 0.5.18 and 0.5.19 only:
    "cutlass_mla",
    "dual_chunk_flash_attn",
)

# One backend under two names in every supported version: "nsa" stays as typed in a running server, and the
# report that a shipped rule cites (#38300) used it. tokenspeed_mla is not here: it was a backend of its own
# until 0.5.22.
_ATTENTION_ALIASES = {"nsa": "dsa", "compressed": "dsv4"}

# --hicache-mem-layout of 0.5.23 (arg_groups/fields/memory.py), and page_unified, which its unified pool sets
# itself.
MEM_LAYOUTS: tuple[str, ...] = (
    "layer_first",
    "page_first",
    "page_first_direct",
    "page_first_kv_split",
    "page_head",
    "page_unified",
)
KV_KINDS: tuple[str, ...] = ("mha", "mla")
DEVICES: tuple[str, ...] = ("cuda", "cpu")
FORWARDS: tuple[str, ...] = ("extend", "decode")

# Any name of this form is valid, so that a new GPU needs no new release; the list is only for the hint.
GPU_ARCH_PATTERN = r"sm[0-9]{2,3}[af]?|cpu"
_KNOWN_GPU_ARCHS = tuple(f"sm{n}" for n in (70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121))

#: Options of the shipped backends, each a positive integer; a third-party backend takes any option.
BACKEND_OPTIONS: dict[str, tuple[str, ...]] = {
    "fenced_kernel": ("block_quota",),
    "copy_engine": ("max_copies_per_batch",),
    "hybrid": ("staging_mb", "gather_ctas", "max_copies_per_batch"),
}


class NameProblem(ValueError):
    """A name or value that is not valid: ``message`` says so in one line, ``hint`` is the nearest valid one
    or None.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(with_hint(message, hint))
        self.message = message
        self.hint = hint


def with_hint(message: str, hint: str | None) -> str:
    """`message`, with the nearest valid name when there is one."""
    return message if hint is None else f"{message} (did you mean '{hint}'?)"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The valid name most like `word`, or None when nothing is close (difflib's default cutoff, 0.6)."""
    found = difflib.get_close_matches(word.lower(), list(known), n=1)
    return found[0] if found else None


def check_name(what: str, word: str, known: Iterable[str]) -> str:
    """`word` if it is one of `known`; otherwise raises NameProblem, naming the nearest or all."""
    known = tuple(known)
    if word in known:
        return word
    hint = nearest(word, known)
    valid = "" if hint else f"; valid: {', '.join(known)}"
    raise NameProblem(f"unknown {what} '{word}'{valid}", hint)


def check_gpu_arch(word: str) -> str:
    """`word` if it is written like ``sm90``, ``sm90a`` or ``cpu``; otherwise raises NameProblem."""
    if re.fullmatch(GPU_ARCH_PATTERN, word):
        return word
    hint = nearest(word, (*_KNOWN_GPU_ARCHS, "cpu"))
    raise NameProblem(f"unknown GPU architecture '{word}': written sm90, sm100, ... or cpu", hint)


def check_fact(name: str, text: str) -> str | int:
    """The value of fact `name` (or of the shorthand ``attention_backend``) that a user typed as `text`.

    Returns an int for page_size, else the text. Raises NameProblem for a value outside the vocabulary.
    """
    match name:
        case "attention_backend" | "prefill_attention_backend" | "decode_attention_backend":
            return check_name("attention backend", text, ATTENTION_BACKENDS)
        case "gpu_arch":
            return check_gpu_arch(text)
        case "sgl_kernel" | "sglang":
            try:
                Version(text)
            except InvalidVersion:
                raise NameProblem(f"'{text}' is not a version of {name}, such as 0.5.23") from None
            return text
        case "kv_kind":
            return check_name("KV kind", text, KV_KINDS)
        case "mem_layout":
            return check_name("memory layout", text, MEM_LAYOUTS)
        case "device":
            return check_name("device", text, DEVICES)
        case "page_size":
            if not (text.isascii() and text.isdigit() and int(text) >= 1):
                raise NameProblem(f"'{text}' is not a page size: a whole number of tokens, 1 or more")
            return int(text)
    raise NameProblem(f"unknown fact '{name}'")


def canonical(key: str, value: str) -> str:
    """`value` of condition or fact `key` under the one name that comparisons use.

    An attention backend's deprecated alias becomes its name; ``sm90a`` and ``sm100f``, which name compilation
    targets, become the device's architecture.
    """
    if key.endswith("attention_backend"):
        return _ATTENTION_ALIASES.get(value, value)
    if key == "gpu_arch" and value.startswith("sm"):
        return value.rstrip("af")
    return value
