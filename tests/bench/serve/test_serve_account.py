"""Counting turns and rounds, and what SGLang's metrics say."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("aiohttp")

from sglang_hicache.bench.serve.account import (
    SHARES,
    ArmRound,
    Distribution,
    arm_round,
    arm_summaries,
    arm_summary,
    percentile,
)
from sglang_hicache.bench.serve.load import Loaded, RequestResult
from sglang_hicache.bench.serve.scrape import Written, between, parse

SECONDS = st.floats(1e-6, 1e3, allow_nan=False)


def asked(number: int, **more: Any) -> RequestResult:
    about: dict[str, Any] = {
        "prompt_tokens": 100,
        "seen_tokens": 60,
        "output_tokens": 3,
        "answer": f"a{number}",
    }
    return RequestResult("chat", number, 0, **{**about, "first_token_s": 0.5, "gaps_s": (0.1, 0.2), **more})


def turn(arm: str = "auto", number: int = 0, **more: Any) -> ArmRound:
    loaded = Loaded((asked(0, host_tokens=40, device_tokens=10), asked(1)), 2.0, 0.25)
    return replace(arm_round("chat", arm, number, loaded, Written()), **more)


@given(st.lists(SECONDS, min_size=1), st.floats(0, 100))
def test_a_percentile_is_a_value_that_enough_do_not_exceed(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= math.ceil(len(values) * percent / 100)
    below = [value for value in values if value < found]
    assert len(below) < max(1, math.ceil(len(values) * percent / 100))


@given(st.lists(SECONDS))
def test_a_distribution_keeps_percentiles(values: list[float]) -> None:
    found = Distribution.of(values)
    assert found.count == len(values)
    for share in SHARES:
        exact = percentile(values, share)
        assert found.percent(share) == (None if exact is None else round(exact, 7))
    assert list(found.at) == sorted(found.at)


def test_a_turn_counts_answers_errors_and_outputs() -> None:
    right = {("chat", 0, 0): asked(0), ("chat", 1, 0): asked(1, answer="other")}
    requests = (asked(0, host_tokens=40), asked(1), asked(2, error="HTTP 500", output_tokens=0), asked(3))
    found = arm_round("chat", "auto", 1, Loaded(requests, 2.0, 0.25), Written(), right)
    assert (found.requests, found.errors, found.first_error) == (3, 1, "HTTP 500")
    assert (found.prompt_tokens, found.host_tokens, found.seen_tokens) == (300, 40, 180)
    # The fourth has no reference.
    assert (found.same, found.compared) == (1, 2)
    assert found.between_tokens_s.count == 6
    assert arm_round("chat", "auto", 1, Loaded(requests, 2.0, 0.25), Written()).compared is None


def test_answers_from_another_length_of_cached_prefix_are_not_set_against_the_default() -> None:
    right = {("chat", number, 0): asked(number) for number in range(4)}
    default = {
        ("chat", 0, 0): asked(0, device_tokens=10, host_tokens=30, answer="rounded"),
        ("chat", 1, 0): asked(1, host_tokens=40, answer="rounded"),
        ("chat", 2, 0): asked(2, host_tokens=41, answer="rounded"),
    }
    requests = (
        asked(0, device_tokens=20, host_tokens=20, answer="rounded"),
        asked(1, device_tokens=0, host_tokens=40, answer="otherwise"),
        asked(2, device_tokens=0, host_tokens=40, answer="otherwise"),
        asked(3, host_tokens=40),  # the default gave no answer
    )
    found = arm_round("chat", "auto", 1, Loaded(requests, 2.0, 0.25), Written(), right, default)
    assert (found.same, found.compared) == (1, 4)
    assert (found.as_default, found.default_compared) == (1, 2)


def test_a_turn_survives_json() -> None:
    given_ = turn(written=Written(writes=3, write_mean_s=0.01), cut=True)
    assert ArmRound.from_dict(json.loads(json.dumps(asdict(given_)))) == given_


def test_rounds_are_summed_with_their_spread() -> None:
    written = Written(writes=10, write_mean_s=0.02, write_p99_s=0.05, written_tokens=1000, written_bytes=5.0)
    faster = turn(number=1, seconds=1.0, written=replace(written, writes=30, write_mean_s=0.04))
    found = arm_summary([turn(written=written), faster])
    assert found.rounds == 2
    assert found.requests_per_s is not None
    assert (found.requests_per_s.low, found.requests_per_s.median, found.requests_per_s.high) == (
        1.0,
        1.5,
        2.0,
    )
    # 60 of each prompt were seen before, 10 of the first were still on the device, 40 came from the host.
    assert found.hit_share == pytest.approx(2 * 40 / (2 * (120 - 10)))
    assert found.write_mean_s == pytest.approx((10 * 0.02 + 30 * 0.04) / 40)
    assert found.written_bytes == 10.0
    # 1,000 rows in 2 s of 0.02 s each, and in 1 s of 0.04 s each.
    assert found.rows_locked == pytest.approx((10 + 40) / 2)
    assert found.compared is None


def test_a_cut_round_counts_for_its_errors_only() -> None:
    found = arm_summary([turn(), turn(number=1, cut=True, errors=2, requests=1, seconds=0.1)])
    assert (found.rounds, found.errors, found.requests) == (1, 2, 2)
    assert found.requests_per_s is not None
    assert found.requests_per_s.n == 1
    empty = arm_summary([turn(cut=True)])
    assert (empty.rounds, empty.requests_per_s, empty.hit_share, empty.rows_locked) == (0, None, None, None)


def test_sums_keep_workloads_and_arms_apart() -> None:
    found = arm_summaries([turn("auto"), turn("kernel"), turn("auto", 1), turn("auto", workload="prefill")])
    assert [(each.workload, each.arm, each.rounds) for each in found] == [
        ("chat", "auto", 2),
        ("chat", "kernel", 1),
        ("prefill", "auto", 1),
    ]


METRICS = """\
# TYPE {p}hicache_backup_duration_seconds histogram
{p}hicache_backup_duration_seconds_bucket{{tp_rank="0",le="0.01"}} {small}
{p}hicache_backup_duration_seconds_bucket{{tp_rank="0",le="0.1"}} {all}
{p}hicache_backup_duration_seconds_bucket{{tp_rank="0",le="+Inf"}} {all}
{p}hicache_backup_duration_seconds_count{{tp_rank="0"}} {all}
{p}hicache_backup_duration_seconds_sum{{tp_rank="0"}} {sum}
# TYPE {p}hicache_backup_bytes_total counter
{p}hicache_backup_bytes_total{{tp_rank="0"}} {bytes}
# TYPE {p}hicache_backup_tokens_total counter
{p}hicache_backup_tokens_total{{tp_rank="0",pool="kv"}} {all}
"""


@pytest.mark.parametrize("prefix", ["sglang:", "sglang_"])
def test_writes_are_counted_between_two_looks(prefix: str) -> None:
    before = parse(METRICS.format(p=prefix, small=100, all=100, sum=1.0, bytes=1e9))
    after = parse(METRICS.format(p=prefix, small=198, all=200, sum=3.0, bytes=4e9))
    found = between(before, after)
    assert (found.writes, found.written_bytes, found.written_tokens) == (100, 3e9, 100)
    assert found.write_mean_s == pytest.approx(0.02)
    assert found.write_p99_s == 0.1
    assert (
        between(before, parse(METRICS.format(p=prefix, small=199, all=200, sum=3.0, bytes=4e9))).write_p99_s
        == 0.01
    )
    assert found.loaded_tokens is None
    assert found.rows_locked(2.0) == pytest.approx(100 / 2 * 0.02)


def test_what_a_server_does_not_count_is_none() -> None:
    assert between({}, {}) == Written()
    assert between({}, {}).rows_locked(1.0) is None
    nothing = parse(METRICS.format(p="sglang:", small=5, all=5, sum=1.0, bytes=10))
    found = between(nothing, nothing)
    assert (found.writes, found.write_mean_s, found.write_p99_s, found.written_bytes) == (0, None, None, 0.0)
