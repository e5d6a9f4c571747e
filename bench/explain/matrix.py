"""The decision for every attention backend on every architecture, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...io_backends.registry import AUTO
from ...policy.decide import Decision, decide
from ...policy.fact_spec import FactValue
from ...policy.facts import Fact, Facts
from ...policy.format.layers import Policy
from ...policy.names import ATTENTION_BACKENDS, NO_SPECULATION
from ...policy.routes import writes_in_words
from .what_if import changed

#: Ampere, Ada, Hopper, data-centre Blackwell (B200, B300), and RTX Blackwell; None: unknown.
ARCHITECTURES: tuple[str | None, ...] = ("sm80", "sm89", "sm90", "sm100", "sm103", "sm120", None)
#: What the table takes for granted where nothing else is said: SGLang's defaults (0.5.23).
ASSUMED: Mapping[str, FactValue] = {"mem_layout": "page_first", "page_size": 1, "speculative": NO_SPECULATION}


def matrix(policy: Policy, given: Mapping[str, FactValue], *, backend: str = AUTO) -> list[dict[str, Any]]:
    """One entry for each attention backend (None: unknown) and architecture, row by row, JSON types.

    `given` are facts besides these two, before those of `ASSUMED`; what neither says is unknown.
    """
    base = Facts({name: Fact(value, "for the table") for name, value in {**ASSUMED, **given}.items()})
    return [
        _entry(policy, base, attention, arch, backend)
        for attention in (*ATTENTION_BACKENDS, None)
        for arch in ARCHITECTURES
    ]


def _entry(
    policy: Policy, base: Facts, attention: str | None, arch: str | None, backend: str
) -> dict[str, Any]:
    facts = changed(base, {"attention_backend": attention, "gpu_arch": arch})
    decision = decide(policy, facts, backend=backend)
    return {
        "attention_backend": attention,
        "gpu_arch": arch,
        "rule": decision.rule,
        "fence_forward": list(decision.fences()),
        "routes": [
            {"backend": route.backend, "writes": writes_in_words(route.when)} for route in decision.routes
        ],
        "text": _cell(decision),
    }


def rows(entries: list[dict[str, Any]]) -> list[list[str]]:
    """The table: a title row, then one row for each group of attention backends that are treated alike."""
    cells: dict[str, list[str]] = {}
    for entry in entries:
        cells.setdefault(entry["attention_backend"] or "unknown", []).append(entry["text"])
    groups: dict[tuple[str, ...], list[str]] = {}
    for attention, texts in cells.items():
        groups.setdefault(tuple(texts), []).append(attention)
    titles = ["attention backend", *(arch or "unknown" for arch in ARCHITECTURES)]
    # The largest group, which needs nothing, comes last.
    ordered = sorted(groups.items(), key=lambda item: len(item[1]))
    return [titles, *([", ".join(names), *texts] for texts, names in ordered)]


def markdown(entries: list[dict[str, Any]]) -> str:
    """The table in Markdown, with a line end after each row."""
    titles, *body = rows(entries)
    code = [[", ".join(f"`{name}`" for name in row[0].split(", ")), *row[1:]] for row in body]
    lines = [titles, ["---"] * len(titles), *code]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(decision: Decision) -> str:
    """Backend and waiting forwards in a few words."""
    backends = " or ".join(dict.fromkeys(route.backend for route in decision.routes))
    names = {"extend": "prefill", "decode": "decode"}
    waiting = " and ".join(names[forward] for forward in decision.fences())
    return f"{backends}; {waiting} wait{'' if ' and ' in waiting else 's'}" if waiting else backends
