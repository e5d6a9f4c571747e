"""What a user gives as facts, and what a decision would be with other ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...policy.decide import Decision
from ...policy.fact_spec import FactValue
from ...policy.fact_table import ANY_ATTENTION, ATTENTION_FACTS, FACT_NAMES, SERVER_FACTS
from ...policy.facts import Fact, Facts
from ...policy.names import NameProblem, check_name
from .shared import typed_fact


def parse_facts(written: Iterable[str]) -> dict[str, FactValue]:
    """Facts from texts such as ``gpu_arch=sm100,page_size=64``. Raises NameProblem."""
    found: dict[str, FactValue] = {}
    for part in (part.strip() for text in written for part in text.split(",")):
        if not part:
            continue
        name, sign, value = part.partition("=")
        if not sign:
            raise NameProblem(f"'{part}' is not FACT=VALUE, such as gpu_arch=sm100")
        check_name("fact", name.strip(), (ANY_ATTENTION.name, *FACT_NAMES))
        found[name.strip()] = typed_fact(name.strip(), value.strip())
    if not found:
        raise NameProblem("no fact is named; write FACT=VALUE, such as gpu_arch=sm100")
    return found


def changed(facts: Facts, other: Mapping[str, FactValue]) -> Facts:
    """`facts` with those of `other` instead; what follows from a changed one follows it, or is unknown."""
    new: dict[str, Fact] = dict(facts)
    for name, value in other.items():
        for each in ATTENTION_FACTS if name == ANY_ATTENTION.name else (name,):
            if name != ANY_ATTENTION.name or each not in other:
                new[each] = Fact(value, "what if")
        for follower, spec in SERVER_FACTS.items():
            if spec.follows == name and follower not in other:
                new[follower] = Fact(None, f"unknown with another {name}")
    arch = other.get("gpu_arch")
    if arch is not None and "device" not in other:
        new["device"] = Fact("cpu" if arch == "cpu" else "cuda", "follows from gpu_arch")
    return Facts(new)


def difference(now: Decision, then: Decision) -> list[dict[str, Any]]:
    """What of a decision is not the same: ``{"what", "now", "then"}``, JSON types."""
    before, after = now.to_dict(), then.to_dict()
    before["routes"], after["routes"] = (
        [
            {key: route[key] for key in ("rule", "backend", "fence_forward", "options", "when")}
            for route in routes
        ]
        for routes in (before["routes"], after["routes"])
    )
    keys = ("backend", "fence_forward", "options", "rule", "layer", "upstream_io_backend", "routes")
    return [
        {"what": key, "now": before[key], "then": after[key]} for key in keys if before[key] != after[key]
    ]
