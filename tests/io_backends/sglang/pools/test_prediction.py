"""The host pools of a command line, against what the pools of each release hold, and against real servers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import releases
from launching import CHILDREN, Machine, inject
from repository import ROOT

from sglang_hicache.bench import server_options, serving
from sglang_hicache.bench.lab import coverage
from sglang_hicache.io_backends.sglang.diagnose import dry_run
from sglang_hicache.io_backends.sglang.versions import SUPPORTED

CASES = Path(__file__).with_name("prediction_cases.py")
MODELS = ROOT / "tests" / "support" / "models"
SERVERS = json.loads((MODELS / "servers.json").read_text(encoding="utf-8"))
EXPECTED = json.loads((MODELS / "coverage.json").read_text(encoding="utf-8"))

NEEDS_GROUPS = ("0.5.18", "0.5.19")
"""Their pool configuration asks for process groups, which only a running server has."""


def answers(release: str, arch: str, lines: list[list[str]], folder: Path) -> list[dict[str, Any]]:
    return releases.answers(CASES, release, arch, lines, folder, CASES.parents[1] / "handover")


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

FP8_CHECKPOINT = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
FP8_WEIGHTS = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def quantized(how: dict[str, str]) -> str:
    """Options with which a model's config.json says so."""
    text = json.dumps({"quantization_config": how}, separators=(",", ":"))
    return f"--json-model-override-args {text}"


class TestOtherKinds:
    """Of the installed release."""

    @pytest.fixture(scope="class")
    def found(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
        draft = MODELS / "Qwen3-0.6B"
        cases = {
            "mxfp8": "--kv-cache-dtype mxfp8 --page-size 128",
            "fp8": "--kv-cache-dtype fp8_e4m3",
            "fp8 checkpoint": quantized(FP8_CHECKPOINT),
            "fp8 weights": quantized(FP8_WEIGHTS),
            "ngram": "--speculative-algorithm NGRAM --speculative-num-draft-tokens 4",
            "dflash": f"--speculative-algorithm DFLASH --speculative-draft-model-path {draft}",
            "pipeline": f"--pp-size 2 --speculative-algorithm STANDALONE {SPECULATIVE} "
            f"--speculative-draft-model-path {draft}",
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

    def test_mxfp8_is_unknown_where_its_kernel_is_not_built(self, found: dict[str, dict[str, Any]]) -> None:
        assert found["mxfp8"]["pools"] is None
        assert "MXFP8 KV host pool needs the staged JIT" in found["mxfp8"]["unknown"]

    def test_fp8_is_half_of_bf16(self, found: dict[str, dict[str, Any]]) -> None:
        (pool,) = found["fp8"]["pools"]
        assert pool["bytes"] == found["fp8"]["held"]["kv"] == EXPECTED[0]["pools"][0]["bytes"] / 2

    def test_a_checkpoint_may_ask_for_fp8_rows(self, found: dict[str, dict[str, Any]]) -> None:
        (pool,) = found["fp8 checkpoint"]["pools"]
        assert pool["bytes"] == EXPECTED[0]["pools"][0]["bytes"] / 2
        (pool,) = found["fp8 weights"]["pools"]
        assert pool["bytes"] == EXPECTED[0]["pools"][0]["bytes"]

    def test_a_lookup_has_no_layers(self, found: dict[str, dict[str, Any]]) -> None:
        assert [pool["name"] for pool in found["ngram"]["pools"]] == ["kv"]

    def test_a_draft_that_is_known_once_it_is_loaded_is_unknown(
        self, found: dict[str, dict[str, Any]]
    ) -> None:
        assert found["dflash"]["pools"] is None
        assert "DFLASH decides which layers its draft keeps when it is loaded" in found["dflash"]["unknown"]

    def test_the_first_stage_of_a_pipeline_has_half_of_the_target_and_no_draft(
        self, found: dict[str, dict[str, Any]]
    ) -> None:
        (pool,) = found["pipeline"]["pools"]
        assert pool["bytes"] == EXPECTED[0]["pools"][0]["bytes"] / 2


WITHOUT_ATTENTION = """
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

# Without a GPU a draft has no attention backend and no kernel that moves its tokens; its pools are there.
MHATokenToKVPool._init_kv_copy_and_warmup = lambda self: setattr(self, "_kv_copy_config", None)
EagleDraftWorker.init_attention_backend = lambda self: None
EagleDraftWorker.init_cuda_graphs = lambda self: None
"""


@pytest.mark.server
@pytest.mark.parametrize("algorithm", ["EAGLE3", "STANDALONE"])
def test_a_real_server_has_the_pools_that_were_predicted(
    algorithm: str, machine: Machine, tmp_path: Path
) -> None:
    """It is asked for its pools, and for no token: nothing could draft one here."""
    machine = machine.with_python_of_its_own()
    config = json.loads((machine.model / "config.json").read_text(encoding="utf-8"))
    draft = tmp_path / "draft"
    draft.mkdir()
    if algorithm == "EAGLE3":
        config |= {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1}
        config["draft_vocab_size"] = config["vocab_size"]
    else:
        config |= {"num_hidden_layers": 2}
    (draft / "config.json").write_text(json.dumps(config), encoding="utf-8")
    hicache = server_options.HiCache("auto")
    words = server_options.base_args(machine.model, cpu_engine=True, hicache=hicache)
    words += ["--speculative-algorithm", algorithm, *SPECULATIVE.split(), "--skip-server-warmup"]
    words += ["--speculative-draft-model-path", str(draft), "--speculative-draft-load-format", "dummy"]
    env = {**machine.env(), **inject(CHILDREN, "sglang.srt.speculative.eagle_worker_v2", WITHOUT_ATTENTION)}
    env["SGLANG_DISABLED_MODEL_ARCHS"] = ""
    with serving.ServerProcess(words, log=tmp_path / "log", env=env, launch=machine.launcher) as server:
        real = serving.server_info(server.url)["internal_states"][0]["hicache_io"]["pools"]
    line = shlex.join(["SGLANG_USE_CPU_ENGINE=1", "sglang", "serve", *words])
    predicted = dry_run.server_facts_of(line)
    assert predicted.pools_unknown is None
    rows = [pool.to_dict() for pool in predicted.pools]
    assert list(map(what_it_is, rows)) == list(map(what_it_is, real))
    assert [row["share"] for row in rows] == [row["share"] for row in real]
    assert [row["name"] for row in real] == ["kv", "draft"]
