"""What people type instead of this project's names: understood, or refused at once with what they meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from sglang_hicache.bench.cli import app
from sglang_hicache.bench.explain import launch_line
from sglang_hicache.io_backends.policy_files import load_policy_text
from sglang_hicache.io_backends.sglang.diagnose import (
    checks,
    command_line,
    dry_run,
    gpu_memory,
    server_checks,
)
from sglang_hicache.io_backends.sglang.launcher import options
from sglang_hicache.policy import gpu_names
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.format.lint import warnings
from sglang_hicache.policy.gpu_names import architecture
from sglang_hicache.policy.names import NameProblem

WITHOUT_SGLANG = True


def run(*arguments: str, **env: str | None) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"NO_COLOR": "1", **env})


@pytest.mark.parametrize(
    ("word", "arch"),
    [
        ("sm90", "sm90"),
        ("sm90a", "sm90"),
        ("sm103f", "sm103"),
        ("cpu", "cpu"),
        ("h100", "sm90"),
        ("NVIDIA H100 80GB HBM3", "sm90"),
        ("NVIDIA H100 NVL", "sm90"),
        ("GH200 480GB", "sm90"),
        ("hopper", "sm90"),
        ("NVIDIA B200", "sm100"),
        ("GB200 NVL72", "sm100"),
        ("NVIDIA GB300", "sm103"),
        ("A100-SXM4-80GB", "sm80"),
        ("A10G", "sm86"),
        ("L40S", "sm89"),
        ("rtx4090", "sm89"),
        ("NVIDIA RTX 6000 Ada Generation", "sm89"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "sm120"),
        ("GeForce RTX 5090", "sm120"),
        ("RTX A6000", "sm86"),
        ("Tesla T4", "sm75"),
        ("DGX Spark", "sm121"),
    ],
)
def test_a_gpu_by_any_of_its_names(word: str, arch: str) -> None:
    assert architecture(word) == arch == gpu_names.canonical(word)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("blackwell", "'blackwell' is sm100 (B200), sm103 (B300) or sm120 (RTX): name one architecture"),
        ("NVIDIA Ampere", "'NVIDIA Ampere' is sm80 (A100, A30) or sm86"),
        ("h100 and b200", "'h100 and b200' names GPUs of sm100, sm90: name one architecture"),
        ("h900", "unknown GPU architecture 'h900'"),
        ("mi300", "unknown GPU architecture 'mi300'"),
        ("sm_90", "(did you mean 'sm90'?)"),
        ("6000", "unknown GPU architecture '6000'"),
        ("", "unknown GPU architecture ''"),
    ],
)
def test_what_could_mean_several_or_none_is_refused(word: str, said: str) -> None:
    with pytest.raises(NameProblem) as refused:
        architecture(word)
    assert said in str(refused.value)
    assert gpu_names.canonical(word) == word


@given(st.text(st.sampled_from("ahHblLsm0123456789 -")))
def test_no_text_is_near_enough_to_an_architecture(word: str) -> None:
    """Only whole words count: h1000 and sm9000 are nothing, and nothing is guessed."""
    try:
        found = architecture(word)
    except NameProblem:
        return
    parts = gpu_names._words(word)
    assert found == gpu_names.canonical(word)
    assert word.startswith("sm") or any(gpu_names._ARCH_OF.get(part) == found for part in parts)


def test_a_name_on_the_command_line_decides_as_its_architecture_and_is_said_once() -> None:
    by_name = run("explain", "--attention-backend", "fa3", "--gpu-arch", "H100", "--json")
    by_arch = run("explain", "--attention-backend", "fa3", "--gpu-arch", "sm90", "--json")
    assert by_name.exit_code == 0
    assert json.loads(by_name.stdout) == json.loads(by_arch.stdout)
    assert by_name.stderr == "gpu_arch: 'H100' is taken as sm90\n"
    assert by_arch.stderr == ""
    as_fact = run("explain", "--fact", "gpu_arch=sm90,page_size=64", "--what-if", "gpu_arch=b200")
    assert as_fact.stderr == "gpu_arch: 'b200' is taken as sm100\n"


def test_an_architecture_that_nobody_knows_is_warned_of() -> None:
    """In the answer itself, whatever becomes of standard error, and without a guess at what was meant: a new
    GPU's number is near that of another.
    """
    given = ("explain", "--attention-backend", "fa3", "--gpu-arch", "sm91")
    found = run(*given, "--json")
    assert (found.exit_code, found.stderr) == (0, "")
    told = json.loads(found.stdout)
    said = "no GPU of sm91 is known to this release, and no shipped rule was made for one; known are sm70, "
    assert told["facts"]["gpu_arch"]["value"] == "sm91"
    assert told["doubts"]["gpu_arch"].startswith(said)
    for arguments in (given, (*given, "--verbose")):
        assert f"Careful gpu_arch: {said}" in " ".join(run(*arguments).stdout.split())
    known = ("explain", "--attention-backend", "fa3", "--gpu-arch", "sm90")
    assert json.loads(run(*known, "--json").stdout)["doubts"] == {}
    assert "known to this release" not in run(*known).output
    then = " ".join(run(*known, "--what-if", "gpu_arch=sm91").stdout.split())
    assert said in then[then.index("What if") :]
    assert said in " ".join(run("doctor", "--gpu-arch", "sm91").stderr.split())


def test_doctor_finds_that_nobody_knows_a_servers_architecture() -> None:
    policy = load_policy_text(POLICY.format(arch="sm90"), "p.yaml")
    for arch, count in (("sm91", 1), ("sm90", 0), ("cpu", 0)):
        facts = Facts.given(gpu_arch=arch, device="cuda", prefill_attention_backend="triton")
        asked = dry_run.Server(facts, "auto", None, True)
        odd = [
            [each.status for each in found if "known to this release" in each.text]
            for found in (server_checks.server(asked, policy), checks.machine(facts))
        ]
        assert odd == [["warning"] * count] * 2


POLICY = """\
version: 1
rules:
- name: mine
  when: {{gpu_arch: [{arch}], device: cuda}}
  use: {{backend: copy_engine}}
  because: a test
default: {{use: {{backend: hybrid, fence_forward: []}}, because: a test}}
"""


@pytest.mark.parametrize("name", ["H100", "NVIDIA H100 80GB HBM3", "hopper", "sm90a"])
def test_a_name_in_a_policy_file_matches_its_architecture(name: str) -> None:
    policy = load_policy_text(POLICY.format(arch=name), "p.yaml")
    facts = {"sm90": "mine", "sm100": "default", "sm80": "default"}
    assert {arch: decide(policy, Facts.given(gpu_arch=arch, device="cuda")).rule for arch in facts} == facts
    said = [each.message for each in warnings(policy) if each.message.startswith("gpu_arch")]
    assert said == ([] if name == "sm90a" else [f"gpu_arch: '{name}' is taken as sm90"])


def test_an_unknown_architecture_in_a_policy_file_is_warned_of() -> None:
    policy = load_policy_text(POLICY.format(arch="sm91"), "p.yaml")
    assert any("no GPU of sm91" in each.message for each in warnings(policy))


def test_a_rule_that_an_earlier_one_covers_by_another_name_is_found() -> None:
    again = POLICY.replace("name: mine", "name: second").split("rules:\n")[1].split("default")[0]
    text = POLICY.format(arch="sm90").replace("default:", again.format(arch="H200") + "default:")
    with pytest.raises(ValueError, match="rule 'second' can never match"):
        load_policy_text(text, "p.yaml")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "sglang serve /nowhere --hicache-io-backend atuo",
            "--hicache-io-backend: unknown backend 'atuo' (did you mean 'auto'?)",
        ),
        ("sglang serve /nowhere --hicache-io-backend=krenel", "(did you mean 'kernel'?)"),
        (
            "sglang serve /nowhere/model --hicache-io-backend auto",
            "--model-path: there is no folder /nowhere/model on this machine; nothing is downloaded, and "
            "only a model's config.json is read: name a folder that holds it",
        ),
        (
            "sglang serve org/model --speculative-draft-model-path ./draft",
            "--speculative-draft-model-path: there is no folder ./draft",
        ),
        (
            "sglang serve org/model --hicache-io-policy /nowhere.yaml",
            "--hicache-io-policy: /nowhere.yaml: there",
        ),
    ],
)
@pytest.mark.parametrize("command", ["explain", "doctor"])
def test_a_typo_in_a_servers_command_line_is_said_before_sglang_is_imported(
    line: str, said: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: Any) -> Any:
        raise AssertionError("SGLang was asked")

    monkeypatch.setattr(dry_run, "_ask", ask)
    found = run(command, "--gpu-arch", "sm90", "--server-args", line)
    assert found.exit_code == 2, found.output
    assert found.stderr.startswith("--server-args: ")
    assert said in found.stderr
    assert found.stderr.count("\n") == 1
    assert found.stdout == ""


@pytest.mark.parametrize(
    ("variable", "owner"),
    [("SGLANG_HICACHE_IO_POLICY", "policy"), ("SGLANG_HICACHE_IO_MACHINE_POLICY", "machine")],
)
def test_a_policy_that_a_variable_names_is_said_to_be(variable: str, owner: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    fix = f"; {variable} names this file: correct it, or unset the variable"
    assert f"{path}: there is no such file{fix}" in run("explain", **{variable: str(path)}).stderr
    if owner == "machine":
        return
    path.write_text("version: 2\n")
    assert run("policy", "show", **{variable: str(path)}).stderr.rstrip().endswith(fix)
    by_option = run("explain", "--policy", str(path), **{variable: ""}).stderr
    assert variable not in by_option


def test_the_variables_of_the_server_count_and_not_those_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container has none of them."""
    mine, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    for path in (mine, other):
        path.write_text(POLICY.format(arch="sm90"))
    monkeypatch.setenv("SGLANG_HICACHE_IO_POLICY", str(other))
    facts = Facts.given(gpu_arch="sm90")

    def source(policy: Path | None, variables: dict[str, str]) -> str:
        server = dry_run.Server(facts, "auto", str(policy) if policy else None, True, variables=variables)
        return server.policy_in_force().source

    assert source(None, {}) == "shipped default"
    assert source(mine, {"SGLANG_HICACHE_IO_POLICY": str(mine)}) == str(mine)
    assert source(mine, {"SGLANG_HICACHE_IO_POLICY": str(other)}) == str(mine)
    mine.unlink()
    with pytest.raises(ValueError, match="SGLANG_HICACHE_IO_POLICY names this file"):
        source(mine, {"SGLANG_HICACHE_IO_POLICY": str(mine)})
    assert os.environ["SGLANG_HICACHE_IO_POLICY"] == str(other)


def test_a_tree_of_sglang_that_is_not_there_is_made_by_make_versions(tmp_path: Path) -> None:
    found = run("race", "--sglang-path", str(tmp_path / ".sglang-versions" / "0.5.18"))
    assert found.exit_code == 2
    assert "make versions" in found.stderr


@pytest.mark.parametrize("program", ["sglang", "launch_server.py"])
def test_a_server_is_refused_before_it_parses(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{program}", "serve", "m", "--hicache-io-backend", "atuo"])
    with pytest.raises(SystemExit) as ended:
        options.refuse_early(None)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "sglang-hicache-io: --hicache-io-backend: no backend 'atuo' (there are auto, fenced"
    )
    assert said.endswith("; did you mean 'auto'?\n")
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{program}", "serve", "m", "--hicache-io-policy=/nowhere"])
    with pytest.raises(SystemExit):
        options.refuse_early(None)
    assert "--hicache-io-policy: /nowhere: there is no such file" in capsys.readouterr().err


def test_another_programs_options_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/other", "--hicache-io-backend", "atuo"])
    options.refuse_early(None)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sglang", "serve", "m", "--hicache-io-backend", "auto"])
    options.refuse_early(None)


def test_no_usage_is_printed_above_a_refusal() -> None:
    code = (
        "import argparse\n"
        "from sglang_hicache.io_backends.sglang.launcher import options\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--hicache-io-backend', choices=['kernel'], help='x')\n"
        "options.extend_parser(None)(None, parser)\n"
        "parser.parse_args(['--hicache-io-backend', 'atuo'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "did you mean 'auto'?" in done.stderr


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("H100", 80),
        ("NVIDIA H100 80GB HBM3", 80),
        ("NVIDIA H100 NVL", 94),
        ("h200", 141),
        ("A100-SXM4-40GB", 40),
        ("A100", None),  # 40 or 80
        ("GH200 480GB", None),  # its CPU's
        ("sm90", None),
        ("hopper", None),
        ("", None),
    ],
)
def test_a_gpus_name_tells_its_memory_where_there_is_one(name: str, gib: int | None) -> None:
    assert gpu_names.memory_gib(name) == gib


def answered(prefill: str, decode: str = "fa3") -> dict[str, Any]:
    facts = {
        "prefill_attention_backend": {"value": prefill, "source": "resolved by SGLang"},
        "decode_attention_backend": {"value": decode, "source": "resolved by SGLang"},
    }
    return {"facts": facts, "backend": "auto"}


def test_what_the_gpus_memory_decides_is_unknown_where_that_is_not_known() -> None:
    merged = gpu_memory.merged({80: answered("fa3", "flashinfer"), 141: answered("fa3", "fa3")})
    assert merged["backend"] == "auto"
    assert merged["facts"]["prefill_attention_backend"]["value"] == "fa3"
    assert merged["facts"]["decode_attention_backend"] == {
        "value": None,
        "source": "the GPU's memory decides it: flashinfer with 80 GiB, fa3 with 141 GiB; give --gpu-memory",
    }
    assert gpu_memory.merged({80: answered("fa3"), 141: answered("fa3")}) == answered("fa3")
    too_small = {80: answered("fa3"), 40: {"error": "SGLang cannot resolve this: no room"}}
    assert gpu_memory.merged(too_small) == {
        "error": "with 40 GiB of GPU memory: SGLang cannot resolve this: no room (give --gpu-memory)"
    }
    assert gpu_memory.merged({80: {"error": "x"}, 40: {"error": "y"}}) == {"error": "x"}


def test_every_size_is_asked_about_where_none_is_given() -> None:
    assert gpu_memory.sizes("sm90", None) == (80, 141, 40)
    assert gpu_memory.sizes("sm90", 94) == (94,)
    assert len(gpu_memory.sizes("sm999", None)) > 3


def test_a_program_that_takes_sglangs_options_is_read_and_named() -> None:
    found = command_line.read("SGLANG_X=1 python -m dynamo.sglang --model-path m --endpoint e")
    assert found.argv == ["--model-path", "m", "--endpoint", "e"]
    assert (found.program, found.variables) == ("dynamo.sglang", {"SGLANG_X": "1"})
    assert command_line.read("sglang serve m").program == ""
    words = launch_line.of_server(found.argv, {}, backend="auto", policy=None, program=found.program)
    assert words[:3] == ["python", "-m", "dynamo.sglang"]


def test_what_cuda_decides_is_unknown_and_never_this_machines() -> None:
    found = gpu_memory.merged({"13.0": answered("fa3"), "12.9": answered("triton")}, gpu_memory.CUDA)
    (fact,) = [each for each in found["facts"].values() if each["value"] is None]
    assert fact["source"].startswith("the CUDA that torch was built for decides it: fa3 with CUDA 13.0")
    refused = gpu_memory.merged({"13.0": answered("fa3"), "12.9": {"error": "x"}}, gpu_memory.CUDA)
    assert refused == {"error": "with CUDA 12.9: x (give --fact cuda=VERSION)"}
