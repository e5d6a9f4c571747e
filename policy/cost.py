"""What a decision costs, as far as somebody measured it: figures of saved GPU runs, with where they are from.

`figures.yaml` holds them; nothing here is computed, estimated or carried over to what was not measured.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from ruamel.yaml import YAML

from .decide import Decision
from .facts import Facts
from .routes import WriteRoute, writes_in_words


@cache
def figures() -> dict[str, Any]:
    """The measured figures, as ``figures.yaml`` has them."""
    text = files("sglang_hicache.policy").joinpath("figures.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return loaded


def cost(decision: Decision, facts: Facts) -> list[dict[str, Any]]:
    """For each route by a backend that was measured, what a write and a waiting forward cost, JSON types.

    Every entry has ``backend``, ``writes``, ``kind`` ("measured", or "unknown" where nobody measured),
    ``text`` and ``source`` (None when unknown).
    """
    measured = {row["backend"] for row in figures()["writes"]}
    return [_of_route(route, facts) for route in decision.routes if route.backend in measured]


def _of_route(route: WriteRoute, facts: Facts) -> dict[str, Any]:
    known = figures()
    entry: dict[str, Any] = {"backend": route.backend, "writes": writes_in_words(route.when)}
    layout, page, kind = (facts.value(name) for name in ("mem_layout", "page_size", "kv_kind"))
    rows = [row for row in known["writes"] if (row["backend"], row["mem_layout"]) == (route.backend, layout)]
    if not rows:
        text = f"nobody has measured {route.backend} with {layout or 'an unknown layout'}"
        return {**entry, "kind": "unknown", "text": text, "source": None}
    pages = sorted({row["page_size"] for row in rows})
    rows = [row for row in rows if row["page_size"] == page and kind in (None, row["kv_kind"])]
    if not rows:
        measured = ", ".join(map(str, pages))
        text = f"nobody has measured pages of {page or 'an unknown size'} (measured: {measured})"
        return {**entry, "kind": "unknown", "text": text, "source": None}
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        speeds = " and ".join(
            f"{row['gb_per_s']} GB/s with {row['slots']} slots "
            f"({row['thread_ms']} ms of the scheduler's thread)"
            for row in rows
            if row["model"] == model
        )
        parts.append(f"{model}: {speeds}")
    waits = known["waits"].get(route.backend)
    if route.fence_forward and waits is not None and layout == "page_first":
        parts.append(f"a forward that must wait waits {waits} ms (Qwen3-8B, pages of 8)")
    text = f"{known['tokens']:,} tokens, link {known['link_gb_per_s']} GB/s: {'; '.join(parts)}"
    arch = facts.value("gpu_arch")
    if arch != known["gpu_arch"]:
        text = f"not measured on {arch or 'an unknown GPU'}; on another GPU, {text}"
    return {**entry, "kind": "measured", "text": text, "source": _source()}


def _source() -> str:
    known = figures()
    return (
        f"{known['gpu']}, driver {known['driver']}, CUDA {known['cuda']}, SGLang {known['sglang']}, "
        f"{known['date']}, {known['source']}"
    )
