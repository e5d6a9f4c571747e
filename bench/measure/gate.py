"""Whether a run is slower than an earlier one, by contender and measurement, for ``bench compare``. Pure.

Two runs of one code differ: another host's CPU, what else ran there, clocks. That moves whole measurements,
far beyond the spread of the repeats within a run. So nothing is called slower by itself, only in proportion
to what is measured beside it and did not change: SGLang's own copies, the plain loop of copies, and the link.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .contenders import MEMCPY_LOOP
from .results import METRICS, Results, Row, Spread
from .sglang_pools import CONTENDERS

FIGURES: Mapping[str, tuple[str, ...]] = {
    "bandwidth": ("ms",),
    "submit": ("submit_us",),
    "interference": ("slow_down",),
    "fence": ("held_ms", "stall_ms"),
    "latency": ("ack_us",),
    "sustained": ("kept_gb_per_s", "slow_down"),
}
"""By measurement, what a contender is held to: the other figures are parts of these, or trade for them."""

UNCHANGED = (*CONTENDERS, MEMCPY_LOOP)
"""Contenders in which no code of this project moves the bytes."""
LINK = "link"

FAIL_OVER = 0.05
"""As much slower counts. Two runs of one commit on two hosts stay below it (a test holds them to it)."""

_LEAST_SHARE = 0.25
"""Of a contender's cases an unchanged one must have been measured in, to say something about it."""

_OF_THE_LINK = frozenset({"ms", "gb_per_s", "ack_us", "held_ms", "kept_gb_per_s"})


@dataclass(frozen=True)
class GateLine:
    """One contender in one measurement.

    Attributes:
        figure: which, in :data:`~.results.METRICS`.
        cases: that both runs have.
        before, after: medians over these.
        raw: how many times as slow as before, median over the cases; None where it was 0 before.
        change: the same, by what did not change; 0.1 for 10 % slower. None where that is not told.
        by: the unchanged contender nearest to it, or ``link``; None: neither is in both runs.
        beyond: cases whose repeats do not overlap.
        verdict: ``slower``, ``faster``, ``same``; ``untold`` where unchanged contenders moved so far apart,
            to both sides of it, that it may be any of these; ``noise`` for an unchanged contender that is not
            ``same``; or, where nothing was compared, ``fails`` (it had figures, and now a reason for none),
            ``gone`` or ``new``.
    """

    measurement: str
    contender: str
    figure: str | None
    cases: int
    before: float | None = None
    after: float | None = None
    raw: float | None = None
    change: float | None = None
    by: str | None = None
    beyond: int = 0
    verdict: str = "same"
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


WORSE = ("fails", "slower")
"""Verdicts that make ``hicache-io bench compare`` end with 1."""
UNTOLD = "untold"
_ORDER = (*WORSE, "gone", "new", "faster", UNTOLD, "noise", "same")

_Key = tuple[Any, ...]
_Pairs = dict[_Key, tuple[Spread, Spread]]


def gate(first: Results, second: Results, fail_over: float = FAIL_OVER) -> list[GateLine]:
    """A line for each contender and figure, worst first.

    A contender is slower if it is so by more than ``fail_over`` in proportion to every unchanged contender
    that was measured in a quarter of its cases (the link, where there is none), and if in half of its cases
    the repeats do not overlap. Else the same code on another day would be slower: a host with a slower
    CPU slows down whatever is bound by it, and nothing else. Between two of them it is as fast as before only
    if it moved by no more than ``fail_over`` otherwise than one of them, or than itself.
    """
    lines = list(_presence(first, second))
    earlier = {row.key: row for row in first.rows}
    found: dict[tuple[str, str], dict[str, _Pairs]] = {}
    for row in second.rows:
        before = earlier.get(row.key)
        for figure in FIGURES.get(row.measurement, ()):
            if before is not None and figure in before.metrics and figure in row.metrics:
                by = found.setdefault((row.measurement, figure), {})
                pair = before.metrics[figure], row.metrics[figure]
                by.setdefault(row.contender, {})[row.case, row.forward] = pair
    for (measurement, figure), contenders in found.items():
        for name in contenders:
            lines.append(
                _line(measurement, figure, name, contenders, _link(first, second, figure), fail_over)
            )
    return sorted(lines, key=lambda line: (_ORDER.index(line.verdict), -abs(line.change or 0)))


def _slower(pair: tuple[Spread, Spread], figure: str) -> float:
    """How many times as slow as before."""
    first, second = (each.median for each in (reversed(pair) if METRICS[figure].more_is_better else pair))
    if first == second:
        return 1.0
    return second / first if first else math.inf


def _line(
    measurement: str,
    figure: str,
    name: str,
    contenders: Mapping[str, _Pairs],
    link: float | None,
    fail_over: float,
) -> GateLine:
    own = contenders[name]
    ratios = {key: _slower(pair, figure) for key, pair in own.items()}
    beside: dict[str, float] = {}
    for other in UNCHANGED:
        shared = ratios.keys() & contenders.get(other, {}).keys()
        if other != name and shared and len(shared) >= _LEAST_SHARE * len(ratios):
            theirs = contenders[other]
            by_theirs = {key: _slower(theirs[key], figure) for key in shared}
            if all(0 < ratio < math.inf for ratio in by_theirs.values()):
                beside[other] = statistics.median(ratios[key] / by_theirs[key] for key in shared)
    raw = statistics.median(ratios.values())
    if not beside and link is not None:
        beside[LINK] = raw / link
    by, change = _nearest(beside, raw, fail_over)
    beyond = sum(not before.overlaps(after) for before, after in own.values() if min(before.n, after.n) > 1)
    counts = 2 * beyond >= len(own)
    if change is None:
        verdict = UNTOLD if counts else "same"
    else:
        slower, faster = change > fail_over, change < 1 / (1 + fail_over) - 1
        verdict = "slower" if counts and slower else "faster" if counts and faster else "same"
    return GateLine(
        measurement,
        name,
        figure,
        len(own),
        statistics.median(before.median for before, _ in own.values()),
        statistics.median(after.median for _, after in own.values()),
        raw if raw < math.inf else None,
        change if change is not None and change < math.inf else None,
        by,
        beyond,
        "noise" if verdict != "same" and name in UNCHANGED else verdict,
    )


def _nearest(beside: Mapping[str, float], raw: float, close: float) -> tuple[str | None, float | None]:
    """Who is nearest, and by how much it is slower than that one; 0 where it lies between two of them.

    None where it does, and has not moved as one of them did, by less than ``close``, and has moved itself.
    """
    if not beside:
        return None, raw - 1
    by = min(beside, key=lambda other: abs(beside[other] - 1))
    if min(beside.values()) <= 1 <= max(beside.values()):
        alike = any(1 / (1 + close) <= ratio <= 1 + close for ratio in (*beside.values(), raw))
        return by, 0.0 if alike else None
    return by, beside[by] - 1


def _link(first: Results, second: Results, figure: str) -> float | None:
    """How many times as slow the link was; None where a figure is not of the link, or it was not measured."""
    rates = first.ceilings.get(LINK), second.ceilings.get(LINK)
    if figure not in _OF_THE_LINK or rates[0] is None or rates[1] is None:
        return None
    return rates[0].median / rates[1].median


def _presence(first: Results, second: Results) -> Iterator[GateLine]:
    """Contenders that have figures in one run only."""
    sides: list[dict[_Key, Row]] = [{row.key: row for row in run.rows} for run in (first, second)]
    # A run of fewer measurements is no sign that the others are gone.
    measured = set[str].intersection(*({row.measurement for row in run.rows} for run in (first, second)))
    groups: dict[tuple[str, str, str, str | None], int] = {}
    for key in dict.fromkeys((*sides[0], *sides[1])):
        before, after = (side.get(key) for side in sides)
        had, has = (row is not None and bool(row.metrics) for row in (before, after))
        row = after or before
        assert row is not None
        if had == has or row.measurement not in measured:
            continue
        verdict = "new" if has else "gone" if after is None else "fails"
        reason = row.reason if verdict == "fails" else None
        where = row.measurement, row.contender, verdict, reason
        groups[where] = groups.get(where, 0) + 1
    for (measurement, contender, verdict, reason), count in groups.items():
        yield GateLine(measurement, contender, None, count, verdict=verdict, reason=reason)


def sort(lines: Sequence[GateLine], by: str) -> list[GateLine]:
    """``change``: as :func:`gate` has them; else by ``measurement`` or ``contender``, these stay in order."""
    if by == "change":
        return list(lines)
    return sorted(lines, key=lambda line: (getattr(line, by), line.measurement, line.contender))
