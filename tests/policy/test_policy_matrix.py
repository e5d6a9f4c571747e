"""The table of decisions by attention backend and architecture, and the copy of it in docs/policy.md."""

from __future__ import annotations

import json
import re

import pytest
from repository import ROOT
from typer.testing import CliRunner

from sglang_hicache.bench.cli import app
from sglang_hicache.bench.explain.matrix import ARCHITECTURES, markdown, matrix, rows
from sglang_hicache.io_backends.policy_files import default_policy, load_policy_text
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.names import ATTENTION_BACKENDS

DOCUMENT = ROOT / "docs" / "policy.md"
SHIPPED = default_policy()
TABLE = matrix(SHIPPED, {})


def test_every_attention_backend_and_architecture_is_there_once():
    pairs = [(entry["attention_backend"], entry["gpu_arch"]) for entry in TABLE]
    assert len(set(pairs)) == len(pairs) == (len(ATTENTION_BACKENDS) + 1) * len(ARCHITECTURES)
    titles, *groups = rows(TABLE)
    assert titles[1:] == ["sm80", "sm89", "sm90", "sm100", "sm103", "sm120", "unknown"]
    names = [name for row in groups for name in row[0].split(", ")]
    assert sorted(names) == sorted([*ATTENTION_BACKENDS, "unknown"])


@pytest.mark.parametrize("given", [{}, {"mem_layout": "layer_first", "page_size": 64, "row_bytes": 2048}])
def test_a_cell_is_the_decision(given: dict[str, str | int]):
    for entry in matrix(SHIPPED, given):
        known = Facts.given(
            **{"mem_layout": "page_first", "page_size": 1, "speculative": "none", **given},
            attention_backend=entry["attention_backend"],
            gpu_arch=entry["gpu_arch"],
        )
        decision = decide(SHIPPED, known)
        assert (entry["rule"], entry["fence_forward"]) == (decision.rule, list(decision.fences()))
        assert entry["text"].startswith(decision.routes[0].backend)
        assert ("wait" in entry["text"]) == bool(decision.fences())


def test_attention_backends_treated_alike_share_a_row():
    by_name = {name: row[1:] for row in rows(TABLE)[1:] for name in row[0].split(", ")}
    assert by_name["fa3"][2] == "hybrid; prefill and decode wait"
    assert by_name["fa3"][0] == by_name["triton"][2] == "hybrid"
    assert by_name["dsa"] == by_name["nsa"]


def run(*arguments: str, columns: str = "120") -> str:
    result = CliRunner().invoke(
        app, ["explain", "--matrix", *arguments], env={"NO_COLOR": "1", "COLUMNS": columns}
    )
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_command_prints_it():
    assert json.loads(run("--json")) == TABLE
    assert run("--markdown") == markdown(TABLE)
    shown = run()
    assert all(re.search(rf"^{name}\b", shown, re.MULTILINE) for name in ATTENTION_BACKENDS)
    assert "fenced_kernel or hybrid" in run("--mem-layout", "layer_first", "--page-size", "64")


def test_the_documents_example_of_a_policy_loads():
    (example,) = re.findall(r"```yaml\n(version: 1\n.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    load_policy_text(example, "policy.md")


def test_the_document_shows_it():
    shown = re.findall(
        r"<!-- policy_matrix -->\n(.*?)<!-- end -->", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL
    )
    assert shown == [markdown(TABLE)]


def test_a_narrow_terminal_gets_a_list_with_whole_words():
    shown = " ".join(run("--mem-layout", "layer_first", columns="80").split())
    assert "sm90, unknown copy_engine" in shown or "sm90, unknown fenced_kernel or" in shown
    assert "fa3, minicpm_flashattn, dual_chunk_flash_attn" in shown
