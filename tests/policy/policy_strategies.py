"""Hypothesis strategies for facts and policies, and a second, plain reading of the format to compare with.

The reading here is written from the contract alone and shares no code with ``sglang_hicache.policy``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from pydantic import ValidationError

from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.schema import Policy, PolicyFile


def given(*strategies: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """``hypothesis.given`` without a time limit for one example: test machines are shared."""
    return lambda test: hypothesis.settings(deadline=None)(hypothesis.given(*strategies)(test))


ATTENTION = ["fa3", "fa4", "triton", "flashinfer", "dsa", "nsa", "trtllm_mha"]
ARCHS = ["sm80", "sm90", "sm90a", "sm100", "sm103", "cpu"]
LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
KERNELS = ["0.3.21", "0.4.0", "0.4.6.post1", "0.4.7", "0.4.10"]
SGLANGS = ["0.5.18", "0.5.19", "0.5.22", "0.5.23", "0.5.24.dev1+g123"]
PAGE_SIZES = [1, 16, 32, 64, 128]

FACT_VALUES: dict[str, list[Any]] = {
    "prefill_attention_backend": [*ATTENTION, "a_third_party"],
    "decode_attention_backend": [*ATTENTION, "a_third_party"],
    "gpu_arch": ARCHS,
    "sgl_kernel": [*KERNELS, "no version"],
    "sglang": SGLANGS,
    "kv_kind": ["mha", "mla"],
    "mem_layout": LAYOUTS,
    "page_size": PAGE_SIZES,
    "device": ["cuda", "cpu"],
}

facts = st.fixed_dictionaries(
    {name: st.sampled_from([None, *values]) for name, values in FACT_VALUES.items()}
).map(lambda values: Facts.given(**values))


def _some(values: list[Any]) -> st.SearchStrategy[Any]:
    """One of `values`, or a list of a few of them."""
    return st.sampled_from(values) | st.lists(st.sampled_from(values), min_size=1, max_size=3)


_specifiers = _some([">=0.4", "<0.4", "==0.4.*", "~=0.4.6", ">=0.3.21,<0.4.7", "!=0.4.0", ">0.4.6"])
_sglang_specifiers = _some([">=0.5.19", "<0.5.19", "==0.5.23", ">=0.5.18,!=0.5.20", "<=0.5.22"])
_page_sizes = _some([1, 64, "<64", ">=64", "<=16", ">16,<128", "!=1", "==32", "> 32"])

_conditions: dict[str, st.SearchStrategy[Any]] = {
    "attention_backend": _some(ATTENTION),
    "prefill_attention_backend": _some(ATTENTION),
    "decode_attention_backend": _some(ATTENTION),
    "gpu_arch": _some(ARCHS),
    "sgl_kernel": _specifiers,
    "sglang": _sglang_specifiers,
    "kv_kind": _some(["mha", "mla"]),
    "mem_layout": _some(LAYOUTS),
    "page_size": _page_sizes,
    "device": _some(["cuda", "cpu"]),
}


@st.composite
def whens(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(st.lists(st.sampled_from(sorted(_conditions)), unique=True, max_size=4))
    return {key: draw(_conditions[key]) for key in keys}


@st.composite
def uses(draw: st.DrawFn, *, with_uses: bool = False) -> dict[str, Any]:
    words = ["extend", "decode", *(["uses"] if with_uses else [])]
    use: dict[str, Any] = {"backend": draw(st.sampled_from(["fenced_kernel", "copy_engine", "hybrid"]))}
    if use["backend"] == "fenced_kernel" or draw(st.booleans()):
        use["fence_forward"] = draw(st.lists(st.sampled_from(words), unique=True))
    if use["backend"] == "hybrid" and draw(st.booleans()):
        use["options"] = {"staging_mb": draw(st.integers(1, 4096))}
    return use


@st.composite
def documents(draw: st.DrawFn, *, rules: int = 5) -> dict[str, Any]:
    """A policy as its file says it: valid, by leaving out the rules that the checks refuse."""
    document = {
        "version": 1,
        "rules": [],
        "default": {"use": draw(uses()), "because": "nothing else"},
    }
    for number in range(draw(st.integers(0, rules))):
        when = draw(whens())
        rule = {
            "name": f"rule-{number}",
            "when": when,
            "use": draw(uses(with_uses=any("attention" in key for key in when))),
            "because": "seen",
        }
        if accepted({**document, "rules": [*document["rules"], rule]}):
            document["rules"].append(rule)
    return document


def accepted(document: dict[str, Any]) -> bool:
    try:
        PolicyFile.model_validate(document)
    except ValidationError:
        return False
    return True


def policy(document: dict[str, Any]) -> Policy:
    return Policy(PolicyFile.model_validate(document), "p.yaml")


_COMPARE = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def holds(when: dict[str, Any], known: Facts) -> bool:
    """Whether all of `when`, as written, holds."""
    return all(
        _holds(key, wanted if isinstance(wanted, list) else [wanted], known) for key, wanted in when.items()
    )


def _holds(key: str, wanted: list[Any], known: Facts) -> bool:
    if key == "attention_backend":
        return any(_holds(f"{forward}_{key}", wanted, known) for forward in ("prefill", "decode"))
    value = known[key].value
    return value is not None and any(_one_holds(key, entry, value) for entry in wanted)


def _one_holds(key: str, entry: Any, value: Any) -> bool:
    if key == "page_size":
        return (isinstance(entry, int) and entry == value) or (
            isinstance(entry, str) and _page_size(entry, value)
        )
    if key in ("sgl_kernel", "sglang"):
        return value != "no version" and SpecifierSet(entry).contains(value, prereleases=True)
    same = {"nsa": "dsa", "sm90a": "sm90"}
    return same.get(entry, entry) == same.get(value, value)


def _page_size(entry: str, value: int) -> bool:
    for part in entry.split(","):
        sign = part.strip().rstrip("0123456789 ")
        if not _COMPARE[sign](value, int(part.strip().removeprefix(sign))):
            return False
    return True
