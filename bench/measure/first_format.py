"""Reads results saved before there was a schema number (bench/results/2026-11-23-h200), losing nothing shown.

Their spread was one number, greatest less least, and of ``ms`` only: it is laid around the median. Their
stall was counted from before the submission: ``held_ms``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from .cases import Case, entry_bytes
from .results import Results, Row, Spread

_NAMES = {"hybrid, forwards wait": "hybrid", "Llama-3-70B TP8": "Llama-3-70B-TP8"}
_INTERFERENCE = Case("Qwen3-8B", "page_first", 16, 8192, True)
"""The one case that these runs measured interference in (their gpu_suite)."""


def read(data: Mapping[str, Any]) -> Results:
    """A run in the first format.

    Raises:
        KeyError, TypeError: it is none.
    """
    hardware = dict(data["hardware"])
    sglang = {f"sglang_{name}": value for name, value in data.get("sglang", {}).items() if name != "sglang"}
    run = Results({**hardware, "sglang": data.get("sglang", {}).get("sglang"), **sglang})
    for name in ("link", "hbm"):
        run.ceilings[name] = _once(data[f"{name}_gb_per_s"])
    for measurement in ("bandwidth", "fence"):
        run.rows += [_row(measurement, row, run.ceilings["link"].median) for row in data.get(measurement, ())]
    run.rows += [_beside(each) for each in data.get("interference", ())]
    return run


def _row(measurement: str, old: Mapping[str, Any], link: float) -> Row:
    case = Case(**{**old["case"], "model": _NAMES.get(old["case"]["model"], old["case"]["model"])})
    row = Row(measurement, case, _NAMES.get(old["contender"], old["contender"]))
    row.fenced = measurement == "fence"
    row.copies, row.checked, row.reason = old["copies"], old["checked"], old["reason"]
    row.entry_bytes = _entry_bytes(case)
    if old["ms"] is None:
        return row
    half = old["ms_spread"] / 2
    ms = Spread(old["ms"], old["ms"] - half, old["ms"] + half, old["repeats"])
    rates = [case.nbytes / each / 1e6 for each in (ms.median, ms.high, ms.low)]
    row.metrics = {
        "gb_per_s": _spread(rates, ms.n),
        "link_share": _spread([rate / link for rate in rates], ms.n),
        "ms": ms,
        "submit_us": _once(old["submit_us"]),
    }
    if measurement == "fence":
        row.metrics["held_ms"] = _once(old["stall_ms"])
    return row


_entry_bytes = functools.cache(entry_bytes)
"""Not saved then; follows from the case."""


def _beside(old: Mapping[str, Any]) -> Row:
    row = Row("interference", _INTERFERENCE, old["contender"], forward=old["forward"])
    row.metrics = {
        "slow_down": _once(old["slow_down"]),
        "forward_ms": _once(old["beside_ms"]),
        "gb_per_s": _once(old["d2h_gb_per_s"]),
    }
    return row


def _spread(values: list[float], n: int) -> Spread:
    median, low, high = values
    return Spread(median, low, high, n)


def _once(value: float) -> Spread:
    """A median whose repeats were not saved."""
    return Spread(value, value, value, 1)
