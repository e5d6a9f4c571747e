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
from sglang_hicache.io_backends.sglang.pools import geometry
from sglang_hicache.io_backends.sglang.versions import SUPPORTED, release_of

CASES = Path(__file__).with_name("prediction_cases.py")
MODELS = ROOT / "tests" / "support" / "models"
SERVERS = json.loads((MODELS / "servers.json").read_text(encoding="utf-8"))
EXPECTED = json.loads((MODELS / "coverage.json").read_text(encoding="utf-8"))


def answers(release: str, arch: str, lines: list[list[str]], folder: Path) -> list[dict[str, Any]]:
    return releases.answers(CASES, release, arch, lines, folder, CASES.parents[1] / "handover")


def what_it_is(pool: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(pool[name] for name in ("name", "kind", "record", "bytes", "tokens", "window"))


def allocates_on_a_gpu(release: str, server: dict[str, Any]) -> bool:
    """States of drafts: SGLang before 0.5.20 asks for them on ``cuda``, whatever the device is."""
    return release < "0.5.20" and "Next" in server["model"] and "NEXTN" in server["options"]


@pytest.mark.parametrize("release", SUPPORTED)
def test_each_release_predicts_what_its_pools_hold_or_says_why_not(
    release: str, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    found = answers(release, "sm90", [coverage.arguments(MODELS, each) for each in SERVERS], tmp_path)
    for server, saved, answer in zip(SERVERS, EXPECTED, found, strict=True):
        with subtests.test(f"{server['model']} {server['options']}"):
            assert "refused" not in answer, answer
            if allocates_on_a_gpu(release, server):
                assert answer["pools"] is None
                assert "no NVIDIA driver" in answer["unknown"]
                continue
            assert answer["unknown"] is None
            assert bytes_of(answer) == answer["held"]
            # What a pool of a model holds does not differ between these releases.
            assert list(map(what_it_is, answer["pools"])) == list(map(what_it_is, saved["pools"]))
            for pool in answer["pools"]:
                if pool["kind"] == "DeepSeekV4PagedHostPool" or pool["record"] == "row":
                    assert (pool["index_step"] > 1) == (pool["undescribed"] is None)
                    assert (pool["index_step"] > 1) == release_of(release).index_steps


def bytes_of(answer: dict[str, Any]) -> dict[str, float]:
    return {pool["name"]: pool["bytes"] for pool in answer["pools"]}


SPECULATIVE = "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4"

FP8_CHECKPOINT = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
FP8_WEIGHTS = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def quantized(how: dict[str, str]) -> str:
    """Options with which a model's config.json says so."""
    text = json.dumps({"quantization_config": how}, separators=(",", ":"))
    return f"--json-model-override-args {text}"


DRAFT = MODELS / "Qwen3-0.6B"
UNIFIED = "--tp 4 --enable-unified-memory --page-size 64 --attention-backend triton"
SHARDED = (
    "--disaggregation-mode prefill --disaggregation-transfer-backend mooncake --enable-kv-cache-sharding"
)
SM100 = {
    "mxfp8": ("Qwen3-8B", "--kv-cache-dtype mxfp8 --page-size 128"),
    "fp4": ("Qwen3-8B", "--kv-cache-dtype fp4_mx_block16"),
    "sparse": ("MiniMax-M3", "--tp 4"),
    "nvfp4": ("MiniMax-M3-NVFP4", "--tp 4"),
    "qsa": ("Qwen4-Exp", "--tp 2"),
    "windows": ("gpt-oss-120b", UNIFIED),
    "states": ("Qwen3-Next-80B-A3B", "--tp 4 --enable-unified-memory"),
    "sharded": ("DeepSeek-R1", f"--tp 8 --page-size 64 --attention-backend trtllm_mla {SHARDED}"),
    "attention dp": ("Qwen3-8B", "--tp 4 --dp 2 --enable-dp-attention"),
    "tensor parallel": ("Qwen3-8B", "--tp 4"),
}
"""Servers on sm100: a model and its options."""

SM100_INSTALLED = {
    "fp8": "--kv-cache-dtype fp8_e4m3",
    "fp8 checkpoint": quantized(FP8_CHECKPOINT),
    "fp8 weights": quantized(FP8_WEIGHTS),
    "ngram": "--speculative-algorithm NGRAM --speculative-num-draft-tokens 4",
    "dflash": f"--speculative-algorithm DFLASH --speculative-draft-model-path {DRAFT}",
    "pipeline": f"--pp-size 2 --speculative-algorithm STANDALONE {SPECULATIVE} "
    f"--speculative-draft-model-path {DRAFT}",
}
"""The same of Qwen3-8B, which only the installed release is asked about."""


Sm100 = tuple[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module", params=SUPPORTED)
def sm100(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sm100:
    """A release and its answers by name, all of one process: most of its time is SGLang's import."""
    release = request.param
    servers = dict(SM100)
    if release == SUPPORTED[-1]:
        servers |= {name: ("Qwen3-8B", words) for name, words in SM100_INSTALLED.items()}
    lines = [coverage.arguments(MODELS, {"model": m, "options": words}) for m, words in servers.values()]
    found = answers(release, "sm100", lines, tmp_path_factory.mktemp("sm100"))
    return release, dict(zip(servers, found, strict=True))


def test_scales_are_held_on_the_host_or_no_server_starts(sm100: Sm100) -> None:
    release, found = sm100
    mxfp8, fp4 = found["mxfp8"], found["fp4"]
    lost = "no server may start with them: pool kv: its device rows have scales beside them"
    if release < "0.5.21":
        assert mxfp8["pools"] is None
        assert lost in mxfp8["unknown"]
    else:
        (pool,) = mxfp8["pools"]
        assert pool["kind"] == "MHATokenToKVPoolMXFP8Host"
        # A scale for each 32 elements of the fp8 rows, which are half of bf16.
        assert pool["bytes"] == mxfp8["held"]["kv"] == EXPECTED[0]["pools"][0]["bytes"] / 2 * 33 / 32
        assert "scales" in pool["undescribed"]
    assert fp4["pools"] is None
    refused = "MHA host transfers do not support KV scale layout" if release == "0.5.23" else lost
    assert refused in fp4["unknown"]


def test_heads_are_divided_among_the_ranks_of_one_group(sm100: Sm100) -> None:
    _, found = sm100
    whole = EXPECTED[0]["pools"][0]["bytes"]
    for name, ranks in (("attention dp", 2), ("tensor parallel", 4)):
        (pool,) = found[name]["pools"]
        assert pool["bytes"] == found[name]["held"]["kv"] == whole / ranks


def test_kinds_of_pools_that_only_some_releases_have(sm100: Sm100, subtests: pytest.Subtests) -> None:
    release, found = sm100
    expected = {
        "sparse": ["MHATokenToKVPoolHost", "MHATokenToKOnlyPoolHost"],
        "nvfp4": ["MiniMaxM3Nvfp4MainKVPoolHost", "MiniMaxM3Nvfp4IndexKPoolHost"],
        "qsa": ["MHATokenToKVPoolHost", "MambaPoolHost", "QSAIndexerPoolHost"],
        "windows": ["UnifiedPageEnvelopeHostPool"] * 2,
        "states": ["MHATokenToKVPoolHost", "MambaPoolHost"],
        "sharded": ["PageInterleaveHostPool"],
    }
    for name, kinds in expected.items():
        answer = found[name]
        with subtests.test(name):
            if name == "qsa" and release in ("0.5.20", "0.5.21"):
                assert answer["pools"] is None
                assert (
                    "no server may start with them: the device cache has compressed index"
                    in answer["unknown"]
                )
                continue
            if release != "0.5.23":  # they refuse it, hold it otherwise, or say that they do not build it
                assert "refused" in answer or answer["unknown"] or bytes_of(answer) == answer["held"]
                continue
            assert answer["unknown"] is None
            assert [pool["kind"] for pool in answer["pools"]] == kinds
            assert bytes_of(answer) == answer["held"]
            if name == "sharded":
                assert "indices SGLang translates" in answer["pools"][0]["undescribed"]
                assert (answer["pools"][0]["record"], answer["pools"][0]["tokens"]) == ("row", 8)
            if name == "states":
                assert answer["pools"][0]["undescribed"] == geometry.TRANSLATED


@pytest.mark.parametrize("sm100", SUPPORTED[-1:], indirect=True)
class TestOtherKinds:
    """Of the installed release."""

    @pytest.fixture
    def found(self, sm100: Sm100) -> dict[str, dict[str, Any]]:
        return sm100[1]

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
