"""What a whole command line resolves to, without a GPU and without a server."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from sglang_hicache.bench import tiny_model
from sglang_hicache.bench.cli import app
from sglang_hicache.io_backends.sglang.diagnose import command_line, dry_run_child
from sglang_hicache.io_backends.sglang.diagnose.command_line import CommandLineError
from sglang_hicache.io_backends.sglang.diagnose.dry_run import server_facts_of
from sglang_hicache.io_backends.sglang.diagnose.pool_sizes import Sizing

# What follows `sglang serve`.
WORDS = st.lists(
    st.sampled_from(["/m", "--tp", "2", "--model-type", "--model-type=llm", "--model-path=/n", "llm"])
)


@settings(deadline=None)  # the first example imports SGLang
@given(words=WORDS)
def test_the_options_of_sglang_serve_are_as_sglang_takes_them(libcuda: None, words: list[str]) -> None:
    from sglang.cli import serve

    try:
        kind, expected = serve._extract_model_type_override(words)
        expected, _ = serve._normalize_positional_model_path(expected)
    except ValueError:
        kind = ""
    if kind in ("auto", "llm"):
        assert command_line.read(shlex.join(["sglang", "serve", *words])).argv == expected
    else:
        with pytest.raises(CommandLineError, match="--model-type"):
            command_line.read(shlex.join(["sglang", "serve", *words]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("dry_run") / "model")


def explain(line: str, *more: str) -> Result:
    return CliRunner().invoke(app, ["explain", "--server-args", line, *more])


def test_sglangs_own_choice_for_a_gpu_that_is_not_here(model: Path) -> None:
    line = f"sglang serve --model-path {model} --skip-tokenizer-init --enable-hierarchical-cache --tp 2"
    result = explain(f"{line} --hicache-io-backend hybrid", "--gpu-arch", "sm100", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    facts = found["facts"]
    told = "resolved by SGLang, told of gpu_arch sm100"
    assert facts["prefill_attention_backend"] == {"value": "trtllm_mha", "source": told}
    assert (facts["page_size"]["value"], facts["tp"]["value"]) == (64, 2)
    assert facts["gpu_arch"] == {"value": "sm100", "source": "given"}
    assert facts["gpu_name"]["value"] is None
    assert found["backend"] == "hybrid"


@pytest.mark.usefixtures("quick_dry_runs")
def test_what_is_given_beside_it_counts_first(model: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\nrules: []\ndefault: {use: {backend: copy_engine}, because: a test}\n")
    line = (
        f"SGLANG_USE_SGL_FA3_KERNEL=true --model-path {model} --skip-tokenizer-init "
        f"--enable-hierarchical-cache --hicache-io-backend auto --hicache-io-policy {policy}"
    )
    result = explain(line, "--gpu-arch", "sm90", "--sgl-kernel", "0.4.7", "--page-size", "32", "--json")
    found = json.loads(result.stdout)
    assert found["backend"] == "copy_engine"
    assert found["facts"]["sgl_kernel"] == {"value": "0.4.7", "source": "given"}
    assert found["facts"]["page_size"] == {"value": 32, "source": "given"}


@pytest.mark.usefixtures("quick_dry_runs")
@pytest.mark.parametrize(
    ("options", "more", "words"),
    [
        (
            "--enable-hierarchical-cache --hicache-io-backend hybird",
            ["--gpu-arch", "sm90"],
            "did you mean 'hybrid'?",
        ),
        ("", ["--gpu-arch", "sm90"], "this server runs without HiCache: add --enable-hierarchical-cache"),
    ],
)
def test_what_a_server_would_refuse(model: Path, options: str, more: list[str], words: str) -> None:
    result = explain(f"--model-path {model} --skip-tokenizer-init {options}", *more)
    assert result.exit_code == 2
    # Above it at most what was done meanwhile.
    last = result.stderr.splitlines()[-1]
    assert last.startswith("--server-args: ")
    assert words in last
    assert result.stdout == ""


@pytest.mark.usefixtures("quick_dry_runs")
def test_what_the_plug_in_would_refuse_is_an_answer(model: Path) -> None:
    """Status 1, as where the decision says so; 2 is for what cannot be read."""
    options = "--enable-hierarchical-cache --hicache-io-backend auto --enable-pdmux"
    given = f"--model-path {model} --skip-tokenizer-init {options}", "--gpu-arch", "sm90"
    result = explain(*given)
    assert result.exit_code == 1, result.output
    words = " ".join(result.stdout.split())
    assert words.startswith("A server would refuse this: --enable-pdmux runs forwards on streams that")
    assert json.loads(explain(*given, "--json").stdout)["refused"].startswith("--enable-pdmux")


def test_a_machine_without_a_gpu_asks_for_the_architecture(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = explain(f"--model-path {model} --skip-tokenizer-init --enable-hierarchical-cache")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "--server-args: SGLang asks the GPU while it resolves, and there is none here: "
        "add --gpu-arch, such as sm90"
    )


@pytest.mark.usefixtures("quick_dry_runs")
def test_nothing_is_downloaded() -> None:
    result = explain("sglang serve nobody/nothing --enable-hierarchical-cache", "--gpu-arch", "sm90")
    assert result.exit_code == 2
    assert "the model nobody/nothing (--model-path) is not on this machine" in result.stderr


@pytest.mark.usefixtures("quick_dry_runs")
def test_a_draft_is_not_downloaded_either(model: Path) -> None:
    draft = "--speculative-algorithm EAGLE --speculative-draft-model=nobody/draft --trust-remote-code"
    line = f"--model-path {model} --skip-tokenizer-init {draft}"
    result = explain(line, "--gpu-arch", "sm90")
    assert result.exit_code == 2
    assert "the model nobody/draft (--speculative-draft-model-path) is not on this machine" in result.stderr


def test_models_by_every_option_that_can_name_one(libcuda: None, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model-path: a/a\n")
    options = (
        f"--config {config} --tokenizer-path=b/b --speculative-draft-model c/c --uno-lora-path d/d "
        "--lora-paths e/e name=f/f"
    )
    assert dry_run_child._models(shlex.split(options)) == [
        ("--model-path", "a/a"),
        ("--tokenizer-path", "b/b"),
        ("--speculative-draft-model-path", "c/c"),
        ("--uno-lora-path", "d/d"),
        ("--lora-paths", "e/e"),
        ("--lora-paths", "f/f"),
    ]


DECODE = "--disaggregation-mode decode"


@pytest.mark.usefixtures("quick_dry_runs")
@pytest.mark.parametrize(
    ("options", "retraction", "offload"),
    [
        ("--enable-hierarchical-cache", None, None),
        # With no option more, SGLang backs up what it retracts in a host pool of its own.
        (DECODE, "only with --enable-hierarchical-cache", None),
        (
            f"{DECODE} --disaggregation-decode-enable-radix-cache --enable-hierarchical-cache "
            "--disaggregation-decode-retraction-backup cpu_tensor",
            None,
            None,
        ),
        (
            f"{DECODE} --disaggregation-decode-enable-radix-cache --enable-hierarchical-cache "
            "--disaggregation-decode-retraction-backup host_pool",
            "past SGLang's write fence, which only start_writing has",
            None,
        ),
        (
            f"{DECODE} --disaggregation-decode-enable-offload-kvcache --hicache-storage-backend file",
            None,
            "a controller of its own",
        ),
    ],
)
def test_what_a_decode_server_writes_past_sglangs_fence(
    model: Path, options: str, retraction: str | None, offload: str | None
) -> None:
    line = f"sglang serve --model-path {model} --skip-tokenizer-init {options}"
    asked = server_facts_of(line, {"gpu_arch": "sm90"})
    for found, words in ((asked.retraction, retraction), (asked.offload, offload)):
        assert (found is None) == (words is None)
        assert words is None or (found is not None and words in found)


@pytest.mark.usefixtures("quick_dry_runs")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--hicache-size 50 --tp 8", Sizing(size_gb=50, ratio=2.0, ranks=8)),
        ("--hicache-ratio 3 --tp 2 --dp 4", Sizing(ratio=3.0, ranks=2, replicas=4)),
        ("--tp 8 --dp 8 --enable-dp-attention", Sizing(ratio=2.0, fraction=0.8, ranks=8)),
        ("--tp 4 --pp-size 2 --nnodes 2", Sizing(ratio=2.0, fraction=0.8, ranks=8, stages=2, nodes=2)),
    ],
)
def test_how_large_the_host_pools_are_to_be(model: Path, options: str, expected: Sizing) -> None:
    """And with the memory saver, whose library is not loaded here, the pools are known."""
    line = f"sglang serve --model-path {model} --skip-tokenizer-init --enable-hierarchical-cache {options}"
    asked = server_facts_of(f"{line} --enable-memory-saver", {"gpu_arch": "sm90"}, gpu_gib=80)
    assert asked.sizing is not None
    assert replace(asked.sizing, gpu_fraction=None) == expected
    assert asked.sizing.gpu_fraction is not None
    assert (asked.memory_saver, asked.gpu_gib) == (True, 80)
    assert asked.pools_unknown is None
