"""The host pools of a command line, against the memory that each release's own pools hold, and real servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT, VERSIONS

from sglang_hicache.bench.lab import coverage
from sglang_hicache.io_backends.sglang.no_gpu import fake_libcuda
from sglang_hicache.io_backends.sglang.versions import SUPPORTED

CASES = Path(__file__).with_name("prediction_cases.py")
MODELS = ROOT / "tests" / "support" / "models"
SERVERS = json.loads((MODELS / "servers.json").read_text(encoding="utf-8"))
EXPECTED = json.loads((MODELS / "coverage.json").read_text(encoding="utf-8"))

NEEDS_GROUPS = ("0.5.18", "0.5.19")
"""Their pool configuration asks for process groups, which only a running server has."""


def answers(release: str, arch: str, lines: list[list[str]], folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(CASES), arch],
        input=json.dumps(lines),
        env={
            **os.environ,
            **fake_libcuda.environment(folder / "libcuda"),
            "PYTHONPATH": str(VERSIONS / release),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("POOLS")]
    assert said, done.stderr[-3000:]
    ran, found = json.loads(said[0].removeprefix("POOLS"))
    assert ran == release
    assert isinstance(found, list)
    return found


def what_it_is(pool: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(pool[name] for name in ("name", "kind", "layout", "record", "bytes", "tokens", "window"))


@pytest.mark.parametrize("release", SUPPORTED)
def test_each_release_predicts_what_its_pools_hold_or_says_why_not(
    release: str, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    found = answers(release, "sm90", [coverage.arguments(MODELS, each) for each in SERVERS], tmp_path)
    for server, saved, answer in zip(SERVERS, EXPECTED, found, strict=True):
        with subtests.test(f"{server['model']} {server['options']}"):
            assert "refused" not in answer, answer
            if release in NEEDS_GROUPS or (release == "0.5.20" and "--dcp-size" in server["options"]):
                assert answer["pools"] is None
                assert "group" in answer["unknown"]
                continue
            assert answer["unknown"] is None
            assert {pool["name"]: pool["bytes"] for pool in answer["pools"]} == answer["held"]
            # What a pool of a model holds does not differ between these releases.
            assert list(map(what_it_is, answer["pools"])) == list(map(what_it_is, saved["pools"]))


SPECULATIVE = "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4"


class TestOtherKinds:
    """Of the installed release."""

    @pytest.fixture(scope="class")
    def found(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
        cases = {
            "mxfp8": "--kv-cache-dtype mxfp8 --page-size 64",
            "fp8": "--kv-cache-dtype fp8_e4m3",
            "ngram": "--speculative-algorithm NGRAM --speculative-num-draft-tokens 4",
            "dflash": f"--speculative-algorithm DFLASH --speculative-draft-model-path {MODELS / 'Qwen3-0.6B'}",
            "pipeline": f"--pp-size 2 --speculative-algorithm STANDALONE {SPECULATIVE} "
            f"--speculative-draft-model-path {MODELS / 'Qwen3-0.6B'}",
        }
        lines = [
            coverage.arguments(MODELS, {"model": "Qwen3-8B", "options": words}) for words in cases.values()
        ]
        release = SUPPORTED[-1]
        return dict(
            zip(
                cases,
                answers(release, "sm100", lines, tmp_path_factory.mktemp("kinds")),
                strict=True,
            )
        )

    def test_mxfp8_counts_the_scales(self, found: dict[str, dict[str, Any]]) -> None:
        (pool,) = found["mxfp8"]["pools"]
        assert pool["kind"] == "MHATokenToKVPoolMXFP8Host"
        assert pool["bytes"] == found["mxfp8"]["held"]["kv"]

    def test_fp8_is_half_of_bf16(self, found: dict[str, dict[str, Any]]) -> None:
        (pool,) = found["fp8"]["pools"]
        assert pool["bytes"] == found["fp8"]["held"]["kv"] == EXPECTED[0]["pools"][0]["bytes"] / 2

    def test_a_lookup_has_no_layers(self, found: dict[str, dict[str, Any]]) -> None:
        assert [pool["name"] for pool in found["ngram"]["pools"]] == ["kv"]

    def test_a_draft_that_is_known_once_it_is_loaded_is_unknown(
        self, found: dict[str, dict[str, Any]]
    ) -> None:
        assert found["dflash"]["pools"] is None
        assert "DFLASH decides which layers its draft keeps when it is loaded" in found["dflash"]["unknown"]

    def test_the_rest(self, found: dict[str, dict[str, Any]]) -> None:
        print(found["pipeline"])
