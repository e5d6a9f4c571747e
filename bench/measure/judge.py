"""Whether ``auto`` was the fastest safe choice: pure, on rows that are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...io_backends.registry import AUTO
from .results import Row

JUDGED_BY = {"bandwidth": "ms", "latency": "ack_us"}
"""By measurement, the metric that ``auto`` is held to. The others show one side of a trade each: the least
stall or the cheapest submission may belong to the slowest transfer."""


def judge(rows: Iterable[Row]) -> None:
    """Fill in ``fastest_safe``, ``auto_right`` and ``missed_by`` of every row of ``auto``."""
    cases: dict[object, list[Row]] = {}
    for row in rows:
        cases.setdefault((row.measurement, row.case, row.forward), []).append(row)
    for beside in cases.values():
        metric = JUDGED_BY.get(beside[0].measurement)
        auto = next((row for row in beside if row.contender == AUTO), None)
        if metric is not None and auto is not None:
            _judge(auto, [row for row in beside if row is not auto], metric)


def _judge(auto: Row, others: Sequence[Row], metric: str) -> None:
    if metric not in auto.metrics or not auto.checked:
        return
    safe = [row for row in others if row.safe and row.checked and metric in row.metrics]
    if not safe:
        return
    best = min(safe, key=lambda row: row.metrics[metric].median)
    own, theirs = auto.metrics[metric], best.metrics[metric]
    auto.fastest_safe = best.contender
    auto.missed_by = max(0.0, own.median / theirs.median - 1)
    # The same backend a second time differs from itself by noise alone.
    auto.auto_right = auto.backend == best.backend or own.median <= theirs.median or own.overlaps(theirs)
