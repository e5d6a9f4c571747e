"""What nvidia-smi and NVML say of this machine's GPUs decides nothing about a server on another one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_hicache.bench import tiny_model
from sglang_hicache.io_backends.sglang.diagnose import dry_run

SMI = """#!/bin/sh
echo nvidia-smi >> "$ASKED"
echo 8192
"""

NVML = '''
"""A machine with a Turing GPU, for whoever asks."""
import os


class NVMLError(Exception):
    pass


def _said(answer):
    def say(*_):
        with open(os.environ["ASKED"], "a") as file:
            file.write("NVML\\n")
        return answer

    return say


def __getattr__(name):
    if not name.startswith("nvml"):
        raise AttributeError(name)
    answers = {"nvmlDeviceGetCount": 1, "nvmlDeviceGetCudaComputeCapability": (7, 5)}
    return _said(answers.get(name, "Tesla T4"))
'''


def test_a_small_old_gpu_here_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model.write(tmp_path / "model")
    line = f"sglang serve {model} --skip-tokenizer-init --enable-hierarchical-cache --hicache-io-backend auto"
    without = dry_run.server_facts_of(line, {"gpu_arch": "sm90"})
    asked, programs, modules = tmp_path / "asked", tmp_path / "bin", tmp_path / "modules"
    programs.mkdir()
    modules.mkdir()
    (programs / "nvidia-smi").write_text(SMI)
    (programs / "nvidia-smi").chmod(0o755)
    (modules / "pynvml.py").write_text(NVML)
    monkeypatch.setenv("ASKED", str(asked))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(modules))
    beside = dry_run.server_facts_of(line, {"gpu_arch": "sm90"})
    assert beside == without
    assert beside.facts.value("prefill_attention_backend") == "fa3"
    assert not asked.exists() or "nvidia-smi" not in asked.read_text()
