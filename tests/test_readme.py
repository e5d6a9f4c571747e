"""What the README shows is what the commands print."""

from __future__ import annotations

import re
from pathlib import Path

from sglang_hicache.bench.lab import targets
from sglang_hicache.bench.lab.gpu_table import fence_table, of_file
from sglang_hicache.bench.lab.serve_table import speed_table, together, verified_table
from sglang_hicache.bench.measure import results
from sglang_hicache.bench.serve import result

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_gpu_tables_are_made_from_the_saved_run() -> None:
    shown = re.findall(r"<!-- gpu_table (\S+)( fence)? -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert [(Path(path).name, fence) for path, fence, _ in shown] == [
        ("bench.json", ""),
        ("profile.json", ""),
        ("bench.json", " fence"),
        ("bench.json", ""),
    ]
    for path, fence, text in shown:
        assert text == (fence_table(results.load(ROOT / path)) if fence else of_file(ROOT / path))


def test_the_targets_are_held_against_the_saved_run() -> None:
    shown = re.findall(r"<!-- gpu_targets (\S+) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert len(shown) == 2
    for path, text in shown:
        assert text == targets.table(results.load(ROOT / path))


def test_the_tables_of_servers_are_made_from_the_saved_runs() -> None:
    shown = re.findall(r"<!-- serve_table (.+?)( prefill)? -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert [workload for _, workload, _ in shown] == ["", " prefill"]
    for paths, workload, text in shown:
        runs = together(result.load(ROOT / path) for path in paths.split())
        assert text == speed_table(runs, workload.strip() or "chat")
    ((paths, text),) = re.findall(r"<!-- serve_verified (.+?) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert text == verified_table([result.load(ROOT / path) for path in paths.split()])


def test_saved_server_figures_are_from_a_gpu() -> None:
    saved = [path for path in (ROOT / "bench" / "results").rglob("*.json") if result.is_one(path)]
    assert saved
    for path in saved:
        found = result.load(path)
        assert found.environment["ran_on"] == "GPU"
        assert found.watermark is None


def test_saved_gpu_figures_say_that_they_are_from_a_gpu_and_every_byte_was_right() -> None:
    names = ("bench.json", "gpu.json", "fence.json")
    saved = [path for path in (ROOT / "bench" / "results").rglob("*.json") if path.name in names]
    runs = [results.load(path) for path in saved]
    assert runs
    for run in runs:
        assert run.environment["ran_on"] == "GPU"
        assert run.watermark is None
        rows = [row for row in run.rows if row.measurement in ("bandwidth", "fence", "latency", "sustained")]
        assert any(row.metrics for row in rows)
        assert all(row.checked for row in rows if row.metrics)
        assert all(row.reason for row in run.rows if not row.metrics)
