"""Two runs side by side, figure by figure: what changed beyond the spread of the repeats. Pure.

What another host does to a whole run counts here: whether the code got slower, :mod:`.gate` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .results import METRICS, Results, Row, Spread

LEAST_CHANGE = 0.02
"""A smaller change of the median is none. With five repeats on both sides, ranges that do not overlap come
about by chance once in 126 comparisons (2 of the 252 ways to order ten equals), and a run has hundreds."""

SUSTAINED = ("kept_gb_per_s", "done_p50_ms", "done_p99_ms", "fence_ms", "waiting_mb")
COMPARED = (
    "gb_per_s",
    "ms",
    "submit_us",
    "stall_ms",
    "held_ms",
    "ack_us",
    "slow_down",
    "values_us",
    *SUSTAINED,
)


@dataclass(frozen=True)
class Change:
    """One figure in both runs.

    Attributes:
        row: whose, in the second run (in the first where that is all).
        metric: which; None where a row has figures in one run only.
        before, after: None where there are none.
        change: of the median, 0.1 for 10 % more; None where it was 0.
        verdict: ``faster``, ``slower``, ``same``, ``fails`` (it had figures, and now a reason for none),
            ``gone`` (only the first run has it) or ``new``.
    """

    row: Row
    metric: str | None
    before: Spread | None
    after: Spread | None
    change: float | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "measurement": self.row.measurement,
            "case": asdict(self.row.case),
            "forward": self.row.forward,
            "contender": self.row.contender,
            "metric": self.metric,
            "before": None if self.before is None else asdict(self.before),
            "after": None if self.after is None else asdict(self.after),
            "change": self.change,
            "verdict": self.verdict,
            "reason": self.row.reason,
        }


def not_comparable(first: Results, second: Results) -> str | None:
    """Why the two say nothing about each other, or None."""
    a, b = first.environment.get("ran_on"), second.environment.get("ran_on")
    return f"one ran on a {a} and one on a {b}: their figures cannot be compared" if a != b else None


def compare(first: Results, second: Results, least: float = LEAST_CHANGE) -> Iterator[Change]:
    """Every figure that both runs have, and rows that only one has.

    Args:
        least: smallest relative change of a median that counts, where ranges do not overlap.
    """
    earlier = {row.key: row for row in first.rows}
    for row in second.rows:
        before = earlier.pop(row.key, None)
        if before is None or (not before.metrics and row.metrics):
            if row.metrics:
                yield Change(row, None, None, None, None, "new")
        elif before.metrics and not row.metrics:
            yield Change(row, None, None, None, None, "fails")
        else:
            for metric in COMPARED:
                if metric in before.metrics and metric in row.metrics:
                    yield _change(row, metric, before.metrics[metric], row.metrics[metric], least)
    for row in earlier.values():
        if row.metrics:
            yield Change(row, None, None, None, None, "gone")


def _change(row: Row, metric: str, before: Spread, after: Spread, least: float) -> Change:
    change = after.median / before.median - 1 if before.median else None
    # One repeat has no spread to be beyond.
    beyond = before.n > 1 and after.n > 1 and not before.overlaps(after)
    beyond = beyond and (change is None or abs(change) >= least)
    better = (after.median > before.median) == METRICS[metric].more_is_better
    verdict = ("faster" if better else "slower") if beyond else "same"
    return Change(row, metric, before, after, change, verdict)
