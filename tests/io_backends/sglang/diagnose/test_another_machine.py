"""Nothing of this machine decides about a server on another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from sglang_hicache.bench import tiny_model
from sglang_hicache.io_backends.sglang.diagnose import dry_run, gpu_memory
from sglang_hicache.io_backends.sglang.diagnose.command_line import CommandLineError
from sglang_hicache.policy.facts import Fact

pytestmark = pytest.mark.usefixtures("quick_dry_runs")

MODELS = ROOT / "tests" / "support" / "models"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("another") / "model")


def test_an_infiniband_device_that_is_not_here(model: Path) -> None:
    line = (
        f"sglang serve {model} --skip-tokenizer-init --enable-hierarchical-cache --hicache-io-backend auto "
        "--disaggregation-mode prefill --disaggregation-ib-device mlx5_77"
    )
    server = dry_run.server_facts_of(line, {"gpu_arch": "sm90"})
    assert server.facts.value("prefill_attention_backend") == "fa3"
    assert server.facts["gpu_arch"].value == "sm90"


def test_a_fact_that_hangs_on_the_memory_of_the_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size is resolved in a process of its own: SGLang sizes chunks of prefill by the memory."""
    asked: list[Any] = []
    ask = dry_run._ask

    def noted(*given: Any) -> Any:
        asked.append(given[1:])
        return ask(*given)

    monkeypatch.setattr(dry_run, "_ask", noted)
    line = f"sglang serve {model} --skip-tokenizer-init --enable-hierarchical-cache"
    known = dry_run.server_facts_of(line, {"gpu_arch": "sm90"}, gpu_gib=141).facts
    unknown = dry_run.server_facts_of(line, {"gpu_arch": "sm90"}).facts
    assert asked == [("sm90", 141, None), ("sm90", None, None)]
    assert {name: fact.value for name, fact in known.items()} == {
        name: fact.value for name, fact in unknown.items()
    }
    assert len(gpu_memory.sizes("sm90", None)) == 3


def test_qwen3_vl_decodes_by_the_memory_of_the_gpu() -> None:
    """SGLang moves it off fa3 on an H100, and not on a MIG slice of one."""
    model = ROOT / "tests" / "support" / "models" / "Qwen3-VL-8B"
    line = f"sglang serve {model} --skip-tokenizer-init --enable-hierarchical-cache"

    def decode(gib: int | None) -> Fact:
        facts = dry_run.server_facts_of(line, {"gpu_arch": "sm90"}, gpu_gib=gib).facts
        assert facts.value("prefill_attention_backend") == "fa3"
        return facts["decode_attention_backend"]

    assert (decode(80).value, decode(40).value) == ("flashinfer", "fa3")
    unknown = decode(None)
    assert unknown.value is None
    assert unknown.source == (
        "the GPU's memory decides it: flashinfer with 80 GiB, flashinfer with 141 GiB, fa3 with 40 GiB; "
        "give --gpu-memory"
    )


def test_another_program_that_takes_sglangs_options(model: Path) -> None:
    line = (
        f"python3 -m dynamo.sglang --endpoint dyn://a.b.c --model-path {model} --skip-tokenizer-init "
        "--migration-limit 3 --enable-hierarchical-cache --hicache-io-backend auto --page-size 64"
    )
    server = dry_run.server_facts_of(line, {"gpu_arch": "sm90"}, gpu_gib=80)
    assert (server.facts.value("page_size"), server.backend, server.hicache) == (64, "auto", True)
    assert server.not_read == (
        "dynamo.sglang takes SGLang's options among its own; its own options are not read (--endpoint "
        "dyn://a.b.c --migration-limit 3), and what it sets itself is not known"
    )


def test_cuda_is_that_of_the_other_machine_or_unknown() -> None:
    """SGLang refuses this prefill below CUDA 13, and would take this machine's torch for it."""
    model = MODELS / "Qwen3-Next-80B-A3B"
    line = (
        f"sglang serve {model} --skip-tokenizer-init --enable-hierarchical-cache --tp 4 "
        "--linear-attn-prefill-backend flashinfer"
    )
    with pytest.raises(CommandLineError, match=r"with CUDA 12\.9: .*CUDA 13\+.*give --fact cuda=VERSION"):
        dry_run.server_facts_of(line, {"gpu_arch": "sm100"})
    with pytest.raises(CommandLineError, match=r"requires CUDA 13\+, got CUDA 12\.8"):
        dry_run.server_facts_of(line, {"gpu_arch": "sm100", "cuda": "12.8"})
    assert dry_run.server_facts_of(line, {"gpu_arch": "sm100", "cuda": "13.0"}).facts.value("cuda") == "13.0"


def test_a_policy_that_is_refused_is_named(model: Path, tmp_path: Path) -> None:
    """Not what became of the processes that asked for GPUs of other sizes."""
    policy = tmp_path / "open.yaml"
    policy.write_text("rules: []\n")
    line = (
        f"env SGLANG_HICACHE_IO_POLICY={policy} sglang serve {model} --skip-tokenizer-init "
        "--enable-hierarchical-cache --hicache-io-backend auto"
    )
    with pytest.raises(CommandLineError, match=r"open\.yaml:1:1: 'version' is missing; SGLANG_HICACHE"):
        dry_run.server_facts_of(line, {"gpu_arch": "sm90"})
