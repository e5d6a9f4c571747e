"""What bad input gets: one clear line, status 2, before the model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import Ended, Machine

pytestmark = pytest.mark.server


def assert_one_line(ended: Ended, *words: str) -> None:
    assert ended.status == 2, ended.output[-3000:]
    errors = [
        line
        for line in ended.output.splitlines()
        if "error: argument" in line or "sglang-hicache-io:" in line
    ]
    assert len(errors) == 1, ended.output[-3000:]
    for word in words:
        assert word in errors[0]
    assert "Traceback" not in ended.output
    assert "Load weight begin" not in ended.output


def test_a_misspelt_backend(machine: Machine) -> None:
    ended = machine.launch(machine.hicache_args("hybird"))
    assert_one_line(ended, "no backend 'hybird'", "did you mean 'hybrid'?")


def test_a_policy_file_that_is_not_there(machine: Machine, tmp_path: Path) -> None:
    missing = tmp_path / "policy.yaml"
    ended = machine.launch(machine.hicache_args("auto", "--hicache-io-policy", str(missing)))
    assert_one_line(ended, "policy.yaml", "there is no such file")


@pytest.fixture
def broken_policy(tmp_path: Path) -> Path:
    path = tmp_path / "broken.yaml"
    path.write_text(
        "version: 1\nrules: []\ndefault:\n  use: {backend: hybird, fence_forward: []}\n  because: x\n"
    )
    return path


def test_a_broken_policy_file(machine: Machine, broken_policy: Path) -> None:
    ended = machine.launch(machine.hicache_args("auto", "--hicache-io-policy", str(broken_policy)))
    assert_one_line(ended, "broken.yaml:4:", "hybird", "did you mean 'hybrid'?")


def test_a_broken_policy_file_named_by_the_variable(machine: Machine, broken_policy: Path) -> None:
    ended = machine.launch(machine.hicache_args(), env={"SGLANG_HICACHE_IO_POLICY": str(broken_policy)})
    assert ended.status == 2
    assert "broken.yaml:4:" in ended.output
    assert "Traceback" not in ended.output


def test_what_was_refused_is_the_last_thing_said(machine: Machine, broken_policy: Path) -> None:
    """Not how SGLang ends behind it."""
    command = ("-c", "from sglang.cli.main import main; main()", "serve")
    ended = machine.launch(
        machine.hicache_args(), command=command, env={"SGLANG_HICACHE_IO_POLICY": str(broken_policy)}
    )
    assert ended.status == 2
    assert "broken.yaml:4:" in ended.output.strip().splitlines()[-1]


@pytest.mark.parametrize("backend", ["copy_engine", "fenced_kernel"])
def test_a_layout_the_backend_cannot_do(machine: Machine, backend: str) -> None:
    ended = machine.launch(machine.hicache_args(backend, "--hicache-mem-layout", "page_head"))
    assert_one_line(ended, f"{backend} cannot serve --hicache-mem-layout page_head", "page_first_direct")


def test_a_policy_without_hicache(machine: Machine, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\nrules: []\ndefault: {use: {backend: hybrid}, because: x}\n")
    args = ["--model-path", str(machine.model), "--skip-tokenizer-init", "--device", "cpu"]
    ended = machine.launch([*args, "--hicache-io-policy", str(policy), "--hicache-io-backend", "auto"])
    assert_one_line(ended, "--enable-hierarchical-cache")


def test_a_policy_with_sglangs_own_backend(machine: Machine, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\nrules: []\ndefault: {use: {backend: hybrid}, because: x}\n")
    ended = machine.launch(machine.hicache_args("kernel", "--hicache-io-policy", str(policy)))
    assert_one_line(ended, "has no say over --hicache-io-backend kernel")


def test_a_misspelt_backend_in_a_config_file(machine: Machine, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("hicache-io-backend: copy_engin\n")
    args = machine.hicache_args("auto")
    position = args.index("--hicache-io-backend")
    del args[position : position + 2]
    ended = machine.launch([*args, "--config", str(config)])
    assert_one_line(ended, "no backend 'copy_engin'", "did you mean 'copy_engine'?")


def test_sglang_serve_refuses_alike(machine: Machine) -> None:
    command = ("-c", "from sglang.cli.main import main; main()", "serve")
    ended = machine.launch(machine.hicache_args("hybird"), command=command)
    assert_one_line(ended, "did you mean 'hybrid'?")
