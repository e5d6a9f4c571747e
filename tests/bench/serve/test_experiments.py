"""Runs without fences, added up."""

from __future__ import annotations

from pathlib import Path

from sglang_hicache.bench.lab.experiments import add_up, attention_of, markdown
from sglang_hicache.bench.serve import arms, models
from sglang_hicache.bench.serve.account import ArmRound, Distribution
from sglang_hicache.bench.serve.arms import Cell
from sglang_hicache.bench.serve.result import ArmFacts, CellResult, ServeResult, load
from sglang_hicache.bench.serve.scrape import Written
from sglang_hicache.io_backends.policy_files import default_policy

ROOT = Path(__file__).parents[3]


def turn(arm: str, number: int, **more: int) -> ArmRound:
    nothing = Distribution()
    written = Written(written_bytes=1e9)
    return ArmRound("chat", arm, number, 36.0, 10, 1, None, 1, 1, 1, 1, 1, nothing, nothing, written, **more)


def run(folder: Path, problem: str | None, **more: int) -> ServeResult:
    cell = Cell(
        "experiments",
        models.make("tiny", folder),
        page_size=64,
        mem_layout="layer_first",
        more=("--attention-backend", "fa3"),
    )
    found = CellResult.of(cell)
    for arm in ("none", *arms.EXPERIMENTS):
        found.arms[arm] = ArmFacts(args=arms.server_args(cell, arm), problem=problem)
        found.turns.append(turn(arm, 0, **more))
    whole = ServeResult({"gpu": "H100", "sglang_kernel": "0.4.10"})
    whole.put(found)
    return whole


def test_runs_of_the_same_setting_are_one_row(tmp_path: Path) -> None:
    sums = add_up([run(tmp_path, None), run(tmp_path, "it died", same=8, compared=10)])
    assert [each.fences for each in sums] == ["none", "producer", "both"]
    for each in sums:
        assert (each.attention, each.layout, each.page_size, each.gpu) == ("fa3", "layer_first", 64, "H100")
        assert (each.seconds, each.written_bytes, each.requests, each.errors) == (72.0, 2e9, 20, 2)
        assert (each.died, each.compared, each.differing) == (1, 10, 2)
    assert (
        "| H100, 0.4.10 | fa3 | layer_first | 64 | none | 1.2 min | 2 GB | 20 | 2 | 1 | 2 of 10 |"
        in markdown(sums)
    )


def test_another_gpu_is_another_row(tmp_path: Path) -> None:
    other = run(tmp_path, None)
    other.environment["gpu"] = "H200"
    assert len(add_up([run(tmp_path, None), other])) == 2 * len(arms.EXPERIMENTS)


def test_attention_of_each_phase() -> None:
    assert attention_of(["--attention-backend", "fa3"]) == "fa3"
    options = ["--prefill-attention-backend", "fa3", "--decode-attention-backend", "flashinfer"]
    assert attention_of(options) == "fa3 + flashinfer"


def test_the_policy_says_how_long_servers_without_a_fence_lived() -> None:
    """What it says of crashes that did not come is all that was seen, to the minute and the gigabyte."""
    files = sorted((ROOT / "bench" / "results").glob("*/experiments*.json"))
    (rule,) = (rule for rule in default_policy().rules if rule.name == "fa3-on-hopper")
    said = " ".join(rule.because.split())
    for path in files:
        assert str(path.parent.relative_to(ROOT)) in said
    unfenced = [each for each in add_up(map(load, files)) if each.fences == "none"]
    assert unfenced
    words = {0.5: "half a minute", 1.0: "a minute"}
    for each in unfenced:
        minutes = round(each.seconds / 30) / 2
        assert f"{words.get(minutes, f'{minutes:g} minutes')}, {each.written_bytes / 1e9:,.0f} GB" in said
        assert each.died == each.differing == 0, "a fence was needed: say so in the reason"
        if each.compared:
            assert f"{each.compared} of {each.compared} answers" in said
