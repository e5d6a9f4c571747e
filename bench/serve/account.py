"""Numbers of one arm under one workload. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..measure.results import Spread
from .load import Loaded, RequestResult
from .scrape import Written

Answers = Mapping[tuple[str, int, int], RequestResult]
"""By :attr:`~.load.RequestResult.place`."""

SHARES = (*range(0, 100, 2), 99, 99.5, 99.9, 100)
"""Percent at which a distribution is kept: enough to draw it."""


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The least of ``values`` that ``percent`` % of them do not exceed; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True)
class Distribution:
    """Values of which only percentiles are kept.

    Attributes:
        count: of values.
        at: the value at each of `SHARES`; empty when there are none.
    """

    count: int = 0
    at: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution:
        ordered = sorted(values)
        if not ordered:
            return cls()
        places = (max(0, math.ceil(len(ordered) * share / 100) - 1) for share in SHARES)
        return cls(len(ordered), tuple(round(ordered[place], 7) for place in places))

    def percent(self, share: float) -> float | None:
        """The value at ``share``, one of `SHARES`."""
        return self.at[SHARES.index(share)] if self.at else None


@dataclass(frozen=True)
class ArmRound:
    """One arm's turn at a workload, and what was counted meanwhile.

    Attributes:
        workload, arm: which.
        round: from 0.
        seconds: from the first request to the last answer.
        requests: that were answered.
        errors: that were not.
        first_error: what the first of these was.
        prompt_tokens, output_tokens, device_tokens, host_tokens: of the answered.
        seen_tokens: prompt tokens that the server had been sent or had answered before.
        first_token_s, between_tokens_s: distributions in seconds.
        written: by SGLang's own metrics.
        client_share: see `Loaded`.
        cut: whether time was up before all had been asked.
        same, compared: answers that are the reference's, and how many were compared; None where nothing is.
        as_default, default_compared: of those, how many are what SGLang's own write-back answered where it
            found as much of the prompt cached, and how many could be compared so; None without it.
    """

    workload: str
    arm: str
    round: int
    seconds: float
    requests: int
    errors: int
    first_error: str | None
    prompt_tokens: int
    output_tokens: int
    device_tokens: int
    host_tokens: int
    seen_tokens: int
    first_token_s: Distribution
    between_tokens_s: Distribution
    written: Written = field(default_factory=Written)
    client_share: float = 0.0
    cut: bool = False
    same: int | None = None
    compared: int | None = None
    as_default: int | None = None
    default_compared: int | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ArmRound:
        """From ``dataclasses.asdict``, through JSON."""
        kept = {
            "first_token_s": _distribution(data["first_token_s"]),
            "between_tokens_s": _distribution(data["between_tokens_s"]),
            "written": Written(**data["written"]),
        }
        return cls(**{**data, **kept})


def _distribution(data: Mapping[str, Any]) -> Distribution:
    return Distribution(data["count"], tuple(data["at"]))


def arm_round(
    workload: str,
    arm: str,
    number: int,
    loaded: Loaded,
    written: Written,
    reference: Answers | None = None,
    default: Answers | None = None,
) -> ArmRound:
    """Counts one turn.

    Args:
        workload, arm: which.
        number: of the round.
        loaded: what was asked.
        written: what SGLang counted meanwhile.
        reference: the right answer to each request, where there is one.
        default: what SGLang's own write-back answered to the same requests, where that was asked.
    """
    good = [one for one in loaded.asked if one.error is None]
    bad = [one for one in loaded.asked if one.error is not None]
    compared = [one for one in good if one.place in reference] if reference is not None else None
    alike = None if compared is None or default is None else [one for one in compared if _alike(one, default)]
    return ArmRound(
        workload=workload,
        arm=arm,
        round=number,
        seconds=round(loaded.seconds, 4),
        requests=len(good),
        errors=len(bad),
        first_error=bad[0].error if bad else None,
        prompt_tokens=sum(one.prompt_tokens for one in good),
        output_tokens=sum(one.output_tokens for one in good),
        device_tokens=sum(one.device_tokens for one in good),
        host_tokens=sum(one.host_tokens for one in good),
        seen_tokens=sum(one.seen_tokens for one in good),
        first_token_s=Distribution.of(one.first_token_s for one in good),
        between_tokens_s=Distribution.of(gap for one in good for gap in one.gaps_s),
        written=written,
        client_share=round(loaded.client_share, 3),
        cut=loaded.cut,
        same=None if compared is None else sum(_same(one, reference) for one in compared),
        compared=None if compared is None else len(compared),
        as_default=None if alike is None else sum(_same(one, default) for one in alike),
        default_compared=None if alike is None else len(alike),
    )


def _same(one: RequestResult, reference: Answers | None) -> bool:
    return reference is not None and reference[one.place].answer == one.answer


def _alike(one: RequestResult, reference: Answers) -> bool:
    """Whether both were computed from as long a cached prefix: where that ends, rounding may change."""
    other = reference.get(one.place)
    return other is not None and _cached(one) == _cached(other)


def _cached(one: RequestResult) -> int:
    return one.device_tokens + one.host_tokens


@dataclass(frozen=True)
class ArmSummary:
    """All rounds of one arm at a workload: what tables show.

    Times are the median over rounds, with least and greatest; counts are of all rounds together. A cut round
    counts for nothing but its errors.
    """

    workload: str
    arm: str
    rounds: int
    requests_per_s: Spread | None
    ttft_p50_s: Spread | None
    ttft_p99_s: Spread | None
    itl_p50_s: Spread | None
    itl_p99_s: Spread | None
    itl_max_s: Spread | None
    requests: int
    errors: int
    prompt_tokens: int
    host_tokens: int
    device_tokens: int
    hit_share: float | None
    write_mean_s: float | None
    write_p99_s: float | None
    rows_locked: float | None
    written_bytes: float | None
    dropped_tokens: float | None
    same: int | None
    compared: int | None
    as_default: int | None
    default_compared: int | None
    client_share: float


def arm_summary(turns: Sequence[ArmRound]) -> ArmSummary:
    """Of at least one turn of one arm at one workload."""
    whole = [turn for turn in turns if not turn.cut and turn.requests]
    host = sum(turn.host_tokens for turn in whole)
    absent = sum(turn.seen_tokens - turn.device_tokens for turn in whole)
    times = [turn.written for turn in whole if turn.written.writes]
    writes = sum(each.writes or 0 for each in times)
    means = [(each.write_mean_s or 0.0) * (each.writes or 0) for each in times]
    locked = [turn.written.rows_locked(turn.seconds) for turn in whole]
    compared = [turn for turn in turns if turn.compared is not None]
    return ArmSummary(
        workload=turns[0].workload,
        arm=turns[0].arm,
        rounds=len(whole),
        requests_per_s=_spread(turn.requests / turn.seconds for turn in whole if turn.seconds),
        ttft_p50_s=_spread(turn.first_token_s.percent(50) for turn in whole),
        ttft_p99_s=_spread(turn.first_token_s.percent(99) for turn in whole),
        itl_p50_s=_spread(turn.between_tokens_s.percent(50) for turn in whole),
        itl_p99_s=_spread(turn.between_tokens_s.percent(99) for turn in whole),
        itl_max_s=_spread(turn.between_tokens_s.percent(100) for turn in whole),
        requests=sum(turn.requests for turn in whole),
        errors=sum(turn.errors for turn in turns),
        prompt_tokens=sum(turn.prompt_tokens for turn in whole),
        host_tokens=host,
        device_tokens=sum(turn.device_tokens for turn in whole),
        hit_share=host / absent if absent > 0 else None,
        write_mean_s=sum(means) / writes if writes else None,
        write_p99_s=max((each.write_p99_s for each in times if each.write_p99_s is not None), default=None),
        rows_locked=_mean(locked),
        written_bytes=_total(turn.written.written_bytes for turn in whole),
        dropped_tokens=_total(turn.written.dropped_tokens for turn in whole),
        same=sum(turn.same or 0 for turn in compared) if compared else None,
        compared=sum(turn.compared or 0 for turn in compared) if compared else None,
        as_default=_all(turn.as_default for turn in compared),
        default_compared=_all(turn.default_compared for turn in compared),
        client_share=max((turn.client_share for turn in whole), default=0.0),
    )


def arm_summaries(turns: Iterable[ArmRound]) -> list[ArmSummary]:
    """One for each workload and arm, in the order in which they came."""
    found: dict[tuple[str, str], list[ArmRound]] = {}
    for turn in turns:
        found.setdefault((turn.workload, turn.arm), []).append(turn)
    return [arm_summary(each) for each in found.values()]


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread.of(known) if known else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _all(values: Iterable[int | None]) -> int | None:
    found = list(values)
    return None if not found or None in found else sum(value or 0 for value in found)


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
