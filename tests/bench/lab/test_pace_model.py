"""Write-back keeps pace where forwards wait: by the model, with the real backend, ring and planner."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_hicache.bench.lab import pace_model
from sglang_hicache.bench.lab.pace_model import H100, simulate
from sglang_hicache.bench.measure.cases import MODELS, Case
from sglang_hicache.bench.measure.overlap import ForwardStep, loop_metrics, quantile
from sglang_hicache.bench.measure.patterns import PATTERNS, whole_pages
from sglang_hicache.bench.measure.writers import OwnWriter
from sglang_hicache.io_backends.hybrid import HybridBackend

PREFILL = PATTERNS["prefill 350 ms"]
STEP_MB = 8192 * MODELS["Qwen3-8B"].bytes_per_token / 1e6


def measured(
    pattern: tuple[ForwardStep, ...],
    options: Any,
    model: str = "Qwen3-8B",
    page: int = 1,
    *,
    cycles: int = 16,
) -> dict[str, float]:
    steps = whole_pages(pattern, page)
    case = Case(model, "page_first", page, max(step.tokens for step in steps), True, "fa3")
    alone = loop_metrics(simulate(case, steps, None, cycles=cycles, write=False), len(steps))
    found = loop_metrics(simulate(case, steps, options, cycles=cycles), len(steps))
    asked = sum(step.tokens for step in steps) * MODELS[model].bytes_per_token / alone["cycle_ms"] / 1e6
    return {
        **found,
        "slow_down": found["cycle_ms"] / alone["cycle_ms"],
        "share": found["kept_gb_per_s"] / asked,
        "asked": asked,
    }


@pytest.mark.parametrize("model", ["Qwen3-8B", "DeepSeek-V3"])
@pytest.mark.parametrize("page", [1, 64])
@pytest.mark.parametrize("name", PATTERNS)
def test_targets(name: str, page: int, model: str) -> None:
    """Without options: pace, backlog, time to done, slow-down; and a stall that is the gather alone."""
    pattern = PATTERNS[name]
    ours, kernel = (measured(pattern, options, model, page) for options in ({}, None))
    assert ours["share"] > 0.95, "a forward that is slowed makes its rows later"
    assert ours["slow_down"] <= 1.05
    assert ours["waiting_mb"] == 0
    for share in ("p50", "p99"):
        assert ours[f"done_{share}_ms"] <= 1.25 * kernel[f"done_{share}_ms"]
        assert ours[f"after_forward_{share}_ms"] <= 1.25 * kernel[f"after_forward_{share}_ms"]
    step = max(each.tokens for each in whole_pages(pattern, page)) * MODELS[model].bytes_per_token
    gather = 2 * step / H100.hbm_gb_per_s / 1e6
    assert ours["fence_max_ms"] <= gather + 0.02, "no forward waits for the link"
    if ours["asked"] <= H100.link_d2h_gb_per_s / 2 and gather <= 0.3:
        assert ours["fence_max_ms"] <= 0.32


@pytest.mark.parametrize("megabytes", [64, 256, 1024])
def test_a_ring_shorter_than_a_step_keeps_pace_too_and_costs_the_links_time(megabytes: int) -> None:
    found = measured(PREFILL, {"staging_mb": megabytes})
    assert found["waiting_mb"] <= STEP_MB, "a step's rows at most"
    assert found["share"] * found["slow_down"] == pytest.approx(1, abs=0.01)
    assert found["fence_max_ms"] <= (STEP_MB - megabytes / 2) / H100.link_d2h_gb_per_s
    assert found["slow_down"] < 1.07


def test_backlog_is_bounded_by_two_steps_where_forwards_make_more_than_the_link_takes() -> None:
    found = measured((ForwardStep(5, 8192),), {})
    assert found["kept_gb_per_s"] > 0.9 * H100.link_d2h_gb_per_s
    assert found["waiting_mb"] <= STEP_MB
    assert found["held_mb"] <= 3 * STEP_MB


def test_what_a_ring_of_one_step_without_waits_on_the_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host sees drained is one forward old: half of the pace, or twice the memory."""
    monkeypatch.setattr(HybridBackend, "launched", lambda self: None)
    monkeypatch.setattr(OwnWriter, "take_fences", _without_late(OwnWriter.take_fences))
    found = measured(PREFILL, {})
    assert found["share"] < 0.7
    assert found["waiting_mb"] > 3 * STEP_MB


def test_what_is_left_in_a_writes_second_gap_would_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnWriter, "take_fences", _without_late(OwnWriter.take_fences))
    assert measured(PREFILL, {"staging_mb": 256})["waiting_mb"] > 4 * STEP_MB


def _without_late(take_fences: Any) -> Any:
    def patched(self: OwnWriter) -> Any:
        taken = take_fences(self)
        self._left = [part._replace(gap=self._gap) for part in self._left]
        return taken

    return patched


def test_the_command_prints_a_line_for_each_and_says_that_it_is_a_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["--model", "DeepSeek-V3", "--page-size", "64", "--cycles", "8", "--staging-mb", "auto"]
    assert pace_model.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model, not a measurement"
    assert len(lines) == 1 + 2 * len(PATTERNS)


def test_a_quantile_is_a_value_that_is_there() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], share) for share in (0.01, 0.5, 0.51, 0.99, 1)] == [1, 2, 3, 4, 4]
