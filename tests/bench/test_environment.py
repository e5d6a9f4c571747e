"""What a saved figure says of where it comes from."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from repository import ROOT

from sglang_hicache.bench.measure import environment

RESULTS = ROOT / "bench" / "results"


@pytest.mark.parametrize(
    ("typed", "saved"),
    [
        ("/home/me/bench.json", "bench.json"),
        ("--out=/home/me/bench.json", "--out=bench.json"),
        ("-o/home/me/bench.json", "-obench.json"),
        ("~/figures/x.json", "x.json"),
        ("~me/figures/x.json", "x.json"),
        ("/home/me/with space/x y.json", "x y.json"),
        ("/a/b/", "b"),
        ("/", ""),
        ("first,/a/b,/c/d", "first,b,d"),
        ("--mount=/a/b:/c/d", "--mount=b:d"),
        ("bench/results/x.json", "bench/results/x.json"),
        ("../x/y.json", "../x/y.json"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("http://127.0.0.1:30000/v1", "http://127.0.0.1:30000/v1"),
        ("--compare=https://host/a/b", "--compare=https://host/a/b"),
        ("--budget", "--budget"),
    ],
)
def test_a_figure_keeps_no_folder_of_the_machine_that_a_user_typed(
    monkeypatch: pytest.MonkeyPatch, typed: str, saved: str
) -> None:
    assert environment.without_folders(typed) == saved
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hicache-io", "bench", typed])
    assert shlex.split(environment.describe_environment(cpu=True)["command"])[-2:] == ["bench", saved]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: path.parent.name)
def test_no_saved_command_of_this_repository_has_one(path: Path) -> None:
    def commands(data: object) -> list[str]:
        if isinstance(data, dict):
            mine = [str(data["command"])] if isinstance(data.get("command"), str) else []
            return mine + [each for value in data.values() for each in commands(value)]
        return [each for value in data for each in commands(value)] if isinstance(data, list) else []

    for command in commands(json.loads(path.read_text(encoding="utf-8"))):
        assert not re.search(r"(?<![\w.:/])~?/\w", command), command
