"""The names that a policy file, a fact or an option may hold, and the valid one nearest to a typo."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .text import escaped

#: The value of ``--hicache-io-backend`` that asks the policy.
AUTO = "auto"
#: SGLang's own values of it; this project never takes them over.
UPSTREAM_NAMES = ("kernel", "direct", "kernel_ascend")

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
#: And what pools beside that one hold: pages or keys of an indexer, states of linear layers.
POOL_KINDS: tuple[str, ...] = (*KV_KINDS, "index", "state")
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
#: The kinds of forward that may wait: extend is SGLang's name for prefill, chunked or not.
EXTEND, DECODE = FORWARDS = ("extend", "decode")


class NameProblem(ValueError):
    """A name or value that is not valid: ``message`` says so in one line, ``hint`` is the nearest valid one
    or None. What was typed is quoted in it: control characters are shown as escapes.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        message, hint = escaped(message), None if hint is None else escaped(hint)
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


def shown(value: object) -> str:
    """`value` as the user wrote it, or the kind of thing it is."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return str(value)
