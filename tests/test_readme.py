"""The tables in README.md and docs/ are what the commands print, of saved runs that are what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sglang_hicache.bench.lab import documents
from sglang_hicache.bench.measure import results
from sglang_hicache.bench.serve import result
from sglang_hicache.io_backends.registry import OWN_NAMES

ROOT = Path(__file__).parents[1]


TABLES = {
    "README.md": ["serve_summary"],
    "docs/benchmarks.md": [
        "serve_verified",
        "serve_chat",
        "serve_prefill",
        *["serve_arms"] * 13,
        "gpu_table",
        "gpu_table",
        "gpu_reads",
        "gpu_fence",
        "gpu_table",
        "gpu_table",
        "submission",
        "thread_floor",
        "gpu_targets",
        "gpu_targets",
    ],
    "docs/policy.md": ["policy_facts", "policy_matrix"],
    "docs/stress-and-the-fa3-crash.md": ["stress", "experiments"],
    "docs/coverage.md": ["coverage"],
}


def test_the_tables_are_made_from_the_saved_runs() -> None:
    shown = {}
    for path in documents.documents(ROOT):
        text = path.read_text(encoding="utf-8")
        assert documents.rewritten(text, ROOT) == text, f"{path.name}: run `make tables`"
        if found := documents.names(text):
            shown[str(path.relative_to(ROOT))] = found
    assert shown == TABLES


def test_an_edited_figure_is_written_again() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    edited = text.replace("| 1.21x |", "| 1.31x |")
    assert edited != text == documents.rewritten(edited, ROOT)
    with pytest.raises(ValueError, match="no table is called speed"):
        documents.rewritten("<!-- speed x.json -->\n<!-- end -->", ROOT)


def test_what_the_words_around_the_tables_say_of_answers() -> None:
    same: dict[str, set[tuple[int | None, int]]] = {}
    for name in ("bytes", "bytes-mla"):
        saved = result.load(ROOT / f"bench/results/2026-11-26-h100-servers/{name}.json")
        for cell in saved.cells:
            for each in cell.sums():
                if each.compared:
                    same.setdefault(each.arm, set()).add((each.same, each.compared))
    for arm in ("auto", *OWN_NAMES):
        assert same[arm] == {(48, 48)}, arm
    assert same["damaged"] == {(16, 48), (18, 48)}


def test_what_the_documents_say_of_the_thread_in_servers() -> None:
    """Of every cell of the documents in which `auto` took hybrid."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    row = re.compile(
        r"^\|.* `(\w+)` \| \d+ \| \w[\w-]* \| `auto` \(`hybrid`\) \|.*\| ([\d.]+) \|$", re.MULTILINE
    )
    by_layout: dict[bool, list[float]] = {True: [], False: []}
    for layout, thread_ms in row.findall(text):
        by_layout[layout == "layer_first"].append(float(thread_ms))
    assert all(len(found) >= 4 for found in by_layout.values())
    ends = {key: (min(found), max(found)) for key, found in by_layout.items()}
    others, layer_first = (f"{ends[key][0]:.1f} to {ends[key][1]:.1f}" for key in (False, True))
    whole = f"{min(ends.values())[0]:.1f} to {max(high for _, high in ends.values()):.1f}"
    for path, said in (
        ("README.md", f"in servers {others} ms a write, in `layer_first` {layer_first} ("),
        ("docs/operations.md", f"in servers {whole} ms for a write ("),
    ):
        assert said in " ".join((ROOT / path).read_text(encoding="utf-8").split()), path


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
