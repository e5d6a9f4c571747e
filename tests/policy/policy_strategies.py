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

from sglang_hicache.io_backends.registry import BACKENDS
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.format.layers import Origin, Policy, RuleProblem, combine
from sglang_hicache.policy.format.schema import Default, PolicyFile, Rule
from sglang_hicache.policy.routes import WriteFacts


def given(*strategies: st.SearchStrategy[Any], **more: Any) -> Callable[[Any], Any]:
    """``hypothesis.given`` without a time limit for one example, and with fewer: test machines are shared.

    `more` are other settings, before these.
    """
    settings = hypothesis.settings(**{"deadline": None, "max_examples": 50, **more})
    return lambda test: settings(hypothesis.given(*strategies)(test))


ATTENTION = ["fa3", "fa4", "triton", "flashinfer", "dsa", "nsa", "trtllm_mha"]
ARCHS = ["sm80", "sm90", "sm90a", "sm100", "sm103", "cpu"]
LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
KERNELS = ["0.3.21", "0.4.0", "0.4.6.post1", "0.4.7", "0.4.10"]
SGLANGS = ["0.5.18", "0.5.19", "0.5.22", "0.5.23", "0.5.24.dev1+g123"]

ATTENTION_KEYS = [f"{which}_attention_backend" for which in ("prefill", "decode", "verify", "draft")]
NUMBERS = {
    "page_size": [1, 16, 32, 64, 128],
    "row_bytes": [256, 1152, 2048],
    "tp": [1, 8],
    "dp": [1, 2],
    "pp": [1, 4],
}
VERSIONS = {
    "sgl_kernel": [*KERNELS, "no version"],
    "sglang": SGLANGS,
    "flashinfer": ["0.6.1", "0.7.2"],
    "cuda": ["12.8", "13.0"],
    "driver": ["570.86", "580.159.04"],
}
NAMES: dict[str, list[str]] = {
    "gpu_arch": ARCHS,
    "gpu_name": ["NVIDIA H200", "NVIDIA B200"],
    "fa3_binary": ["sgl_kernel", "kernels_community"],
    "kv_kind": ["mha", "mla"],
    "mem_layout": LAYOUTS,
    "write_policy": ["write_through", "write_back"],
    "speculative": ["none", "EAGLE", "NEXTN", "NGRAM"],
    "device": ["cuda", "cpu"],
}
FLAGS = ["overlap", "pinned_memory", "batch_copy"]
WRITE_NUMBERS = {
    "write_tokens": [1, 64, 4096],
    "write_entries": [1, 72, 300_000],
    "write_entry_bytes": [2048, 131_072],
}

# For a test of what the strategies reach: the same examples every time, or it would fail now and then.
SURVEY: dict[str, Any] = {"derandomize": True, "database": None, "max_examples": 100}

FACT_VALUES: dict[str, list[Any]] = {
    **{key: [*ATTENTION, "a_third_party"] for key in ATTENTION_KEYS},
    **NAMES,
    **VERSIONS,
    **NUMBERS,
    **{key: [True, False] for key in FLAGS},
}

facts = st.fixed_dictionaries(
    {name: st.sampled_from([None, *values]) for name, values in FACT_VALUES.items()}
).map(lambda values: Facts.given(**values))

writes = st.builds(
    WriteFacts,
    tokens=st.sampled_from([0, 1, 63, 64, 4096]),
    entries=st.sampled_from([0, 1, 72, 299_999]),
    nbytes=st.sampled_from([0, 2048, 147_456, 604_000_000]),
    runs=st.sampled_from([0, 1, 2, 4096]),
)


def _some(values: list[Any]) -> st.SearchStrategy[Any]:
    """One of `values`, or a list of a few of them."""
    return st.sampled_from(values) | st.lists(st.sampled_from(values), min_size=1, max_size=3)


_specifiers = _some([">=0.4", "<0.4", "==0.4.*", "~=0.4.6", ">=0.3.21,<0.4.7", "!=0.4.0", ">0.4.6"])
_other_specifiers = _some(
    [">=0.5.19", "<0.5.19", "==0.5.23", ">=0.5.18,!=0.5.20", "<=0.5.22", ">=12.8", "<13"]
)


def _comparisons(values: list[int]) -> st.SearchStrategy[Any]:
    signs = ["<{}", ">={}", "<={}", "!={}", "> {}", "=={}", ">{},<100000"]
    return _some([*values, *(sign.format(value) for sign in signs for value in values if value > 1)])


_conditions: dict[str, st.SearchStrategy[Any]] = {
    "attention_backend": _some(ATTENTION),
    **{key: _some(ATTENTION) for key in ATTENTION_KEYS},
    **{key: _some(values) for key, values in NAMES.items()},
    **{key: _specifiers if key == "sgl_kernel" else _other_specifiers for key in VERSIONS},
    **{key: _comparisons(values) for key, values in NUMBERS.items()},
    **{key: _some([True, False]) for key in (*FLAGS, "write_contiguous")},
    **{key: _comparisons(values) for key, values in WRITE_NUMBERS.items()},
}
# Those that the shipped rules use come up more often, and those on writes, so that there are routes.
_OFTEN = ("attention_backend", "gpu_arch", "mem_layout", "write_entry_bytes", "write_contiguous")
_KEYS = sorted(_conditions) + list(_OFTEN) * 6


@st.composite
def whens(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(st.lists(st.sampled_from(_KEYS), unique=True, max_size=4))
    return {key: draw(_conditions[key]) for key in keys}


@st.composite
def unknowns(draw: st.DrawFn, when: dict[str, Any]) -> dict[str, Any]:
    """The key ``unknown`` of a rule with `when`, or nothing."""
    keys = [key for key in when if not about_writes(key)]
    if not keys or draw(st.booleans()):
        return {}
    return {"unknown": draw(st.just("match") | st.lists(st.sampled_from(keys), unique=True, min_size=1))}


@st.composite
def uses(draw: st.DrawFn, *, with_uses: bool = False) -> dict[str, Any]:
    words = ["extend", "decode", *(["uses"] if with_uses else [])]
    use: dict[str, Any] = {"backend": draw(st.sampled_from(["fenced_kernel", "copy_engine", "hybrid"]))}
    if use["backend"] == "fenced_kernel" or draw(st.booleans()):
        use["fence_forward"] = draw(st.lists(st.sampled_from(words), unique=True))
    if use["backend"] == "hybrid" and draw(st.booleans()):
        use["options"] = {"staging_mb": draw(st.one_of(st.just("auto"), st.integers(1, 4096)))}
    return use


@st.composite
def documents(draw: st.DrawFn, *, rules: int = 4) -> dict[str, Any]:
    """A policy as its file says it: valid, by leaving out the rules that the checks refuse."""
    document = {
        "version": 1,
        "rules": [],
        "default": {"use": draw(uses()), "because": "nothing else"},
    }
    kept: list[Rule] = []
    default = Default.model_validate(document["default"], context=BACKENDS)
    for number in range(draw(st.integers(0, rules))):
        when = draw(whens())
        rule = {
            "name": f"rule-{number}",
            "when": when,
            "use": draw(uses(with_uses=any("attention" in key for key in when))),
            "because": "seen",
            **draw(unknowns(when)),
        }
        try:
            longer = [*kept, Rule.model_validate(rule, context=BACKENDS)]
            combine(PolicyFile(version=1, rules=tuple(longer), default=default), "p.yaml", {}, None, BACKENDS)
        except (ValidationError, RuleProblem):
            continue
        kept = longer
        document["rules"].append(rule)
    return document


def accepted(document: dict[str, Any]) -> bool:
    try:
        policy(document)
    except (ValidationError, RuleProblem):
        return False
    return True


def policy(document: dict[str, Any]) -> Policy:
    """What loading makes of a file that says `document` and extends nothing."""
    file = PolicyFile.model_validate(document, context=BACKENDS)
    names = [*(rule.name for rule in file.rules), "default"]
    origins = {name: Origin("policy file", "p.yaml", line, 1) for line, name in enumerate(names, 3)}
    return combine(file, "p.yaml", origins, None, BACKENDS)


_COMPARE = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def about_writes(key: str) -> bool:
    return key in (*WRITE_NUMBERS, "write_contiguous")


def tolerated(rule: dict[str, Any]) -> set[str]:
    """The conditions of `rule` that an unknown fact satisfies."""
    unknown = rule.get("unknown", [])
    return {key for key in rule["when"] if not about_writes(key)} if unknown == "match" else set(unknown)


def holds(rule: dict[str, Any], known: Facts) -> bool:
    """Whether all that `rule`, as written, asks of a server holds."""
    return all(
        _holds(key, _listed(wanted), known, key in tolerated(rule))
        for key, wanted in rule["when"].items()
        if not about_writes(key)
    )


def holds_for(rule: dict[str, Any], write: WriteFacts) -> bool:
    """Whether all that `rule`, as written, asks of a write holds."""
    values = {
        "write_tokens": write.tokens,
        "write_entries": write.entries,
        "write_entry_bytes": write.nbytes // write.entries if write.entries else 0,
        "write_contiguous": write.runs == 1,
    }
    return all(
        any(_one_holds(key, entry, values[key]) for entry in _listed(wanted))
        for key, wanted in rule["when"].items()
        if about_writes(key)
    )


def waiting(rule: dict[str, Any], known: Facts) -> set[str]:
    """The forwards that wait under `rule`, with ``uses`` written out."""
    listed = rule["use"].get("fence_forward", [])
    found = set(listed) - {"uses"}
    if "uses" in listed:
        for key in running(known):
            condition = "attention_backend" if "attention_backend" in rule["when"] else key
            if condition in rule["when"] and _holds(
                key, _listed(rule["when"][condition]), known, condition in tolerated(rule)
            ):
                found |= {"prefill": {"extend"}, "draft": {"extend", "decode"}}.get(
                    key.split("_")[0], {"decode"}
                )
    return found


def running(known: Facts) -> list[str]:
    """The attention backends that run, or may."""
    return ATTENTION_KEYS[:2] if known["speculative"].value == "none" else ATTENTION_KEYS


@st.composite
def facts_for(draw: st.DrawFn, rule: dict[str, Any]) -> Facts:
    """Facts that what `rule` asks of a server is often true of, which by chance alone is rare."""
    values = {name: fact.value for name, fact in draw(facts).items()}
    for key, wanted in rule["when"].items():
        if about_writes(key):
            continue
        name = draw(st.sampled_from(ATTENTION_KEYS)) if key == "attention_backend" else key
        fitting = [
            value
            for value in FACT_VALUES[name]
            if any(_one_holds(name, entry, value) for entry in _listed(wanted))
        ]
        unknown = [None] if key in tolerated(rule) else []
        if fitting or unknown:
            values[name] = draw(st.sampled_from([*fitting, *unknown]))
    return Facts.given(**values)


def _listed(wanted: Any) -> list[Any]:
    return wanted if isinstance(wanted, list) else [wanted]


def _holds(key: str, wanted: list[Any], known: Facts, tolerates_unknown: bool) -> bool:
    if key == "attention_backend":
        return any(_holds(each, wanted, known, tolerates_unknown) for each in running(known))
    value = known[key].value
    if value is None:
        return tolerates_unknown
    return any(_one_holds(key, entry, value) for entry in wanted)


def _one_holds(key: str, entry: Any, value: Any) -> bool:
    if key in NUMBERS or key in WRITE_NUMBERS:
        # A condition on a number holds for numbers from 1 up.
        return value >= 1 and (entry == value if isinstance(entry, int) else _compared(entry, value))
    if key in VERSIONS:
        return value != "no version" and SpecifierSet(entry).contains(value, prereleases=True)
    same = {"nsa": "dsa", "sm90a": "sm90", "NEXTN": "EAGLE"}
    return same.get(entry, entry) == same.get(value, value)


def _compared(entry: str, value: int) -> bool:
    for part in entry.split(","):
        sign = part.strip().rstrip("0123456789 ")
        if not _COMPARE[sign](value, int(part.strip().removeprefix(sign))):
            return False
    return True
