"""`hicache-io bench serve` end to end, on SGLang's CPU engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import Machine
from typer.testing import CliRunner

from sglang_hicache.bench import serving
from sglang_hicache.bench.cli import app
from sglang_hicache.bench.serve.result import CPU_WATERMARK

pytestmark = pytest.mark.server


def test_three_arms_take_turns(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_hicache.bench.serve.command.gpu_missing", lambda: "not used here")
    monkeypatch.setattr(serving, "LAUNCH", machine.launcher)
    words = ["--workload", "chat", "--rounds", "1", "--pool-tokens", "2048", "--json", "--out", str(tmp_path)]
    arms = ["--arm", "none", "--arm", "auto", "--arm", "null"]
    done = CliRunner().invoke(app, ["bench", "serve", *arms, *words])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["watermark"] == CPU_WATERMARK
    assert result["problems"] == []
    (cell,) = result["cells"]
    assert [turn["arm"] for turn in cell["turns"]] == ["none", "auto", "null"]
    by_arm = {turn["arm"]: turn for turn in cell["turns"]}
    for turn in by_arm.values():
        assert turn["errors"] == 0
        assert turn["requests"] == cell["workloads"]["chat"]["requests"]
        assert turn["first_token_s"]["count"] == turn["requests"]
    auto, null = by_arm["auto"], by_arm["null"]
    assert by_arm["none"]["host_tokens"] == 0
    assert auto["host_tokens"] > 0
    assert auto["same"] == auto["compared"] == auto["requests"]
    assert auto["written"]["written_bytes"] > 0
    # What was never copied comes back as something else.
    assert null["host_tokens"] > 0
    assert null["same"] < null["compared"]
    plugin = cell["arms"]["null"]["server"]["plugin"]
    assert plugin["written_by"] == {"null": plugin["counters"]["writes"]}
    assert CPU_WATERMARK in (tmp_path / "serve.md").read_text()
    assert {"serve.json", "serve.csv", "serve.md", "serve.html", "logs"} <= {
        p.name for p in tmp_path.iterdir()
    }


def test_a_server_refuses_what_copies_nothing(machine: Machine, tmp_path: Path) -> None:
    from sglang_hicache.bench.serve import null_backend

    ended = machine.launch(machine.hicache_args("null"), env=null_backend.environment(tmp_path))
    assert ended.status == 2
    (line,) = ended.lines_of_ours()
    assert "null copies nothing" in line
    assert "--i-know-this-corrupts" in line
