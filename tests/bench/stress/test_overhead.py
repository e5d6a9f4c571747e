"""When a difference between two servers counts as noise."""

from __future__ import annotations

import random

from sglang_hicache.bench.lab.overhead import _figures, within_noise


def test_noise_is_told_from_a_difference() -> None:
    rng = random.Random(0)
    drift = [10 + turn / 10 for turn in range(24)]  # hits both alike
    first = [each + rng.gauss(0, 0.05) for each in drift]
    same = [each + rng.gauss(0, 0.05) for each in drift]
    slower = [each * 0.98 for each in same]
    assert within_noise(first, same)
    assert not within_noise(first, slower), "2 %, where the figures themselves spread over 20 %"
    assert not within_noise(slower, first)


def test_the_warm_up_is_left_out() -> None:
    waves = [{"requests": 10 * n, "seconds": 2.0, "request_p50_s": 0.1 * n} for n in range(4)]
    assert _figures(waves) == {"requests_per_s": [10.0, 15.0], "request_p50_s": [0.2, 0.1 * 3]}
