"""What the README shows is what the commands print."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sglang_hicache.bench import targets
from sglang_hicache.bench.gpu_table import fence_table, steps_table, tables, waits_table
from sglang_hicache.bench.measure import results
from sglang_hicache.bench.serve import result
from sglang_hicache.bench.serve_table import speed_table, verified_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_gpu_tables_are_made_from_the_saved_run() -> None:
    shown = re.findall(r"<!-- gpu_table (\S+)( fence)? -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert [(Path(path).name, fence) for path, fence, _ in shown] == [
        ("bench.json", ""),
        ("profile.json", ""),
        ("bench.json", " fence"),
    ]
    for path, fence, text in shown:
        if path.endswith("profile.json"):
            whole = json.loads((ROOT / path).read_text(encoding="utf-8"))
            made = waits_table(whole) + "\n" + steps_table(whole)
        else:
            made = (fence_table if fence else tables)(results.load(ROOT / path))
        assert text == made


def test_the_targets_are_held_against_the_saved_run() -> None:
    ((path, text),) = re.findall(r"<!-- gpu_targets (\S+) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert text == targets.table(results.load(ROOT / path))


def test_the_tables_of_servers_are_made_from_the_saved_runs() -> None:
    ((path, text),) = re.findall(r"<!-- serve_table (\S+) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert text == speed_table(result.load(ROOT / path))
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
        rows = [row for row in run.rows if row.measurement in ("bandwidth", "fence", "latency")]
        assert any(row.metrics for row in rows)
        assert all(row.checked for row in rows if row.metrics)
        assert all(row.reason for row in run.rows if not row.metrics)
