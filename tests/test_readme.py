"""What the README shows is what the commands print."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sglang_hicache.bench.gpu_table import fence_table, tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_gpu_tables_are_made_from_the_saved_run() -> None:
    shown = re.findall(r"<!-- gpu_table (\S+) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert [Path(path).name for path, _ in shown] == ["gpu.json", "fence.json"]
    for (path, text), table in zip(shown, (tables, fence_table), strict=True):
        assert text == table(json.loads((ROOT / path).read_text(encoding="utf-8")))


def test_saved_gpu_figures_say_that_they_are_from_a_gpu_and_every_byte_was_right() -> None:
    for path in (ROOT / "bench" / "results").rglob("gpu.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        assert run["hardware"]["ran_on"] == "GPU"
        measured = [row for row in run["bandwidth"] if row["ms"] is not None]
        assert measured
        assert all(row["checked"] for row in measured)
        assert all(row["reason"] for row in run["bandwidth"] if row["ms"] is None)
