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
# --hicache-write-policy of 0.5.23 (arg_groups/fields/memory.py).
WRITE_POLICIES: tuple[str, ...] = ("write_through", "write_through_selective", "write_back")
# SpeculativeAlgorithm of 0.5.23 (speculative/spec_info.py) in SGLang's capitals; "none" is no speculation.
NO_SPECULATION = "none"
SPECULATIVE: tuple[str, ...] = (
    NO_SPECULATION,
    "EAGLE",
    "EAGLE3",
    "NEXTN",
    "STANDALONE",
    "NGRAM",
    "DFLASH",
    "DSPARK",
    "UNO",
    "FROZEN_KV_MTP",
)
# Where SGLang's FlashAttention-3 comes from: its kernel package, or with SGLANG_USE_SGL_FA3_KERNEL=0 the
# Hub's kernels-community/sgl-flash-attn3 (kernels/ops/attention/flash_attention_v3.py, 0.5.18 to 0.5.23).
FA3_BINARIES: tuple[str, ...] = ("sgl_kernel", "kernels_community")
FORWARDS: tuple[str, ...] = ("extend", "decode")

#: Facts whose values are names: what such a name is called in a message, and the valid ones.
NAMED: dict[str, tuple[str, tuple[str, ...]]] = {
    "prefill_attention_backend": ("attention backend", ATTENTION_BACKENDS),
    "decode_attention_backend": ("attention backend", ATTENTION_BACKENDS),
    "verify_attention_backend": ("attention backend", ATTENTION_BACKENDS),
    "draft_attention_backend": ("attention backend", ATTENTION_BACKENDS),
    "fa3_binary": ("FA3 build", FA3_BINARIES),
    "kv_kind": ("KV kind", KV_KINDS),
    "mem_layout": ("memory layout", MEM_LAYOUTS),
    "write_policy": ("write policy", WRITE_POLICIES),
    "speculative": ("speculative algorithm", SPECULATIVE),
    "device": ("device", DEVICES),
}
#: Facts whose values are versions, which conditions compare by PEP 440 specifiers.
VERSIONED: tuple[str, ...] = ("sgl_kernel", "sglang", "flashinfer", "cuda", "driver")
#: Facts that are whole numbers from 1 up, and what a value counts.
COUNTED: dict[str, str] = {
    "page_size": "a page size: a whole number of tokens, 1 or more",
    "row_bytes": "a row's size: a whole number of bytes, 1 or more",
    "tp": "a tensor-parallel size: a whole number, 1 or more",
    "dp": "a data-parallel size: a whole number, 1 or more",
    "pp": "a pipeline-parallel size: a whole number, 1 or more",
}
#: Facts that are true or false.
FLAGS: tuple[str, ...] = ("overlap", "pinned_memory", "batch_copy")

#: Conditions on one write, not on the server: whole numbers, and one that is true or false.
WRITE_NUMBERS: tuple[str, ...] = ("write_tokens", "write_entries", "write_entry_bytes")
WRITE_FLAGS: tuple[str, ...] = ("write_contiguous",)

# Any name of this form is valid, so that a new GPU needs no new release; the list is only for the hint.
GPU_ARCH_PATTERN = r"sm[0-9]{2,3}[af]?|cpu"
_KNOWN_GPU_ARCHS = tuple(f"sm{n}" for n in (70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121))


class NameProblem(ValueError):
    """A name or value that is not valid: ``message`` says so in one line, ``hint`` is the nearest valid one
    or None.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(with_hint(message, hint))
        self.message = message
        self.hint = hint

    def to_dict(self) -> dict[str, str | None]:
        """The parts and the whole, as plain JSON types."""
        return {"message": self.message, "hint": self.hint, "text": str(self)}


def with_hint(message: str, hint: str | None) -> str:
    """`message`, with the nearest valid name when there is one."""
    return message if hint is None else f"{message} (did you mean '{hint}'?)"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The valid name most like `word`, or None when nothing is close (difflib's default cutoff, 0.6)."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


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


def check_device(word: str) -> str:
    """`word` if it is one of `DEVICES`; otherwise raises NameProblem."""
    # To difflib "cpu" is the nearest to "gpu", which is the opposite of what was meant.
    if word.lower() in ("gpu", "nvidia"):
        raise NameProblem(f"unknown device '{word}'", "cuda")
    return check_name("device", word, DEVICES)


def check_fact(name: str, text: str) -> str | int | bool:
    """The value of fact `name` (or of the shorthand ``attention_backend``) that a user typed as `text`.

    Returns an int for the facts of `COUNTED`, a bool for those of `FLAGS`, else the text. Raises NameProblem
    for a value outside the vocabulary.
    """
    if name == "attention_backend":
        return check_name("attention backend", text, ATTENTION_BACKENDS)
    if name == "device":
        return check_device(text)
    if name in NAMED:
        what, known = NAMED[name]
        return check_name(what, text, known)
    if name == "gpu_arch":
        return check_gpu_arch(text)
    if name == "gpu_name":
        if not text.strip():
            raise NameProblem("a GPU's name is empty; it is what nvidia-smi prints, such as NVIDIA H200")
        return text
    if name in VERSIONED:
        try:
            Version(text)
        except InvalidVersion:
            example = {"driver": "580.159.04", "cuda": "13.0"}.get(name, "0.5.23")
            raise NameProblem(f"'{text}' is not a version of {name}, such as {example}") from None
        return text
    if name in COUNTED:
        if not (text.isascii() and text.isdigit() and int(text) >= 1):
            raise NameProblem(f"'{text}' is not {COUNTED[name]}")
        return int(text)
    if name in FLAGS:
        word = check_name(name, text.lower(), ("true", "false", "yes", "no", "on", "off"))
        return word in ("true", "yes", "on")
    known_facts = (*NAMED, "gpu_arch", "gpu_name", *VERSIONED, *COUNTED, *FLAGS)
    raise NameProblem(f"unknown fact '{name}'", nearest(name, ("attention_backend", *known_facts)))


def canonical(key: str, value: str) -> str:
    """`value` of condition or fact `key` under the one name that comparisons use.

    An attention backend's deprecated alias becomes its name; ``sm90a`` and ``sm100f``, which name compilation
    targets, become the device's architecture.
    """
    if key.endswith("attention_backend"):
        return _ATTENTION_ALIASES.get(value, value)
    if key == "gpu_arch" and value.startswith("sm"):
        return value.rstrip("af")
    if key == "speculative":  # SGLang reads the name in any case, and NEXTN as EAGLE
        return (
            "EAGLE"
            if value.upper() == "NEXTN"
            else NO_SPECULATION
            if value.lower() == "none"
            else value.upper()
        )
    return value
