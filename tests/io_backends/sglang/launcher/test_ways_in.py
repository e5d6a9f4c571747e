"""Every way to ask for a backend and a policy: the command lines, a config file, the variable, the Engine."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from launching import Machine
from repository import ROOT

from sglang_hicache.bench import server_options

pytestmark = pytest.mark.server


POLICY = """\
version: 1
rules:
  - name: mine
    when: {attention_backend: [torch_native]}
    use: {backend: copy_engine, fence_forward: [extend]}
    because: a test
default: {use: {backend: hybrid}, because: a test}
"""

RESOLVE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
import pickle
args = prepare_server_args(sys.argv[1:])
args.resolve_once()
travelled = pickle.loads(pickle.dumps(args))
from sglang.srt.arg_groups.overrides import resolution_result
print('DECISION', json.dumps({
    **travelled._hicache_io.decision, 'raw': travelled.hicache_io_backend,
    'resolved': resolution_result(travelled, 'hicache_io_backend')}))
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


def decision(
    machine: Machine, args: list[str], env: dict[str, str] | None = None, code: str = RESOLVE
) -> dict[str, object]:
    ended = machine.launch(args, env=env, command=("-c", code))
    said = [line for line in ended.output.splitlines() if line.startswith("DECISION ")]
    assert said, ended.output[-3000:]
    result: dict[str, object] = json.loads(said[0].removeprefix("DECISION "))
    return result


def plain(machine: Machine) -> list[str]:
    return [*server_options.base_args(machine.model, cpu_engine=True), "--enable-hierarchical-cache"]


def test_the_shipped_policy_without_any_option(machine: Machine) -> None:
    found = decision(machine, [*plain(machine), "--hicache-io-backend", "auto"])
    assert (found["backend"], found["rule"], found["policy"]) == ("hybrid", "default", "shipped default")
    # What the operator typed stays readable; what SGLang acts on is a name that it knows.
    assert (found["raw"], found["resolved"]) == ("auto", "kernel")


def test_the_policy_option(machine: Machine, policy: Path) -> None:
    found = decision(
        machine, [*plain(machine), "--hicache-io-backend", "auto", "--hicache-io-policy", str(policy)]
    )
    assert (found["backend"], found["rule"], found["fence_forward"]) == ("copy_engine", "mine", ["extend"])


def test_the_policy_variable(machine: Machine, policy: Path) -> None:
    args = [*plain(machine), "--hicache-io-backend", "hybrid"]
    found = decision(machine, args, env={"SGLANG_HICACHE_IO_POLICY": str(policy)})
    # By hand the backend stays; the fences are the matching rule's.
    assert (found["backend"], found["rule"], found["fence_forward"]) == ("hybrid", "mine", ["extend"])


def test_the_option_wins_over_the_variable(machine: Machine, policy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(POLICY.replace("mine", "another"))
    args = [*plain(machine), "--hicache-io-backend", "auto", "--hicache-io-policy", str(policy)]
    assert decision(machine, args, env={"SGLANG_HICACHE_IO_POLICY": str(other)})["rule"] == "mine"


def test_a_config_file(machine: Machine, policy: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"hicache-io-backend: auto\nhicache-io-policy: {policy}\n")
    found = decision(machine, [*plain(machine), "--config", str(config)])
    assert (found["backend"], found["rule"]) == ("copy_engine", "mine")


def test_page_first_direct_keeps_its_layout(machine: Machine) -> None:
    args = [*plain(machine), "--hicache-io-backend", "hybrid", "--hicache-mem-layout", "page_first_direct"]
    found = decision(machine, args)
    assert (found["upstream_io_backend"], found["resolved"]) == ("direct", "direct")
    facts = found["facts"]
    assert isinstance(facts, dict)
    assert facts["mem_layout"] == {"value": "page_first_direct", "source": "resolved by SGLang"}


def test_without_hicache_nothing_happens(machine: Machine) -> None:
    args = [*server_options.base_args(machine.model, cpu_engine=True), "--hicache-io-backend", "auto"]
    code = RESOLVE.split("travelled =")[0] + "print('NONE', not hasattr(args, '_hicache_io'))"
    ended = machine.launch(args, command=("-c", code))
    assert "NONE True" in ended.output
    assert "has nothing to do without --enable-hierarchical-cache" in ended.output


def test_engines_of_one_process(fresh_machine: Machine, policy: Path, tmp_path: Path) -> None:
    """Beside each other: each has its own policy and decision."""
    options = {
        **{"model_path": str(fresh_machine.model), "device": "cpu", "dtype": "float32"},
        **{"attention_backend": "torch_native", "skip_tokenizer_init": True, "max_total_tokens": 1024},
        **{"page_size": 16, "enable_hierarchical_cache": True, "hicache_ratio": 4.0},
    }
    ways = (
        {"hicache_io_backend": "auto", "hicache_io_policy": str(policy)},
        {"hicache_io_backend": "hybrid"},
    )
    script = tmp_path / "engine.py"
    script.write_text(
        f"""
import json, sglang
if __name__ == "__main__":
    engines = [sglang.Engine(**{options!r}, **way) for way in {ways!r}]
    for engine in engines:
        answer = engine.generate(input_ids=list(range(200)), sampling_params={{"max_new_tokens": 4}})
        state = engine.get_server_info()["internal_states"][0]["hicache_io"]
        print("STATE", json.dumps([len(answer["output_ids"]), state["backend"], state["rule"],
                                   state["counters"]["bytes"]]), flush=True)
    engines[0].shutdown()  # SGLang ends all children of the process
"""
    )
    ended = fresh_machine.launch([], command=(str(script),), timeout_s=240)
    said = [json.loads(line[6:]) for line in ended.output.splitlines() if line.startswith("STATE ")]
    assert len(said) == 2, ended.output[-3000:]
    assert [each[:3] for each in said] == [[4, "copy_engine", "mine"], [4, "hybrid", "default"]]
    assert all(nbytes > 0 for *_, nbytes in said)


def test_the_engine_refuses_with_an_exception_that_a_caller_can_catch(
    machine: Machine, tmp_path: Path
) -> None:
    script = tmp_path / "engine.py"
    script.write_text(
        f"""
import sglang
if __name__ == "__main__":
    try:
        sglang.Engine(model_path={str(machine.model)!r}, device="cpu", enable_hierarchical_cache=True,
                      hicache_io_backend="hybird")
    except ValueError as error:
        print("CAUGHT", error)
"""
    )
    ended = machine.launch([], command=(str(script),))
    assert "CAUGHT sglang-hicache-io: --hicache-io-backend: no backend 'hybird'" in ended.output
    assert "did you mean 'hybrid'?" in ended.output


THEIR_PROGRAM = """
import argparse, json
from sglang.srt.server_args import ServerArgs

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = ServerArgs.from_cli_args(parser.parse_args())
    args.resolve_once()
    print("DECISION", json.dumps(args._hicache_io.decision))
"""
"""Reads SGLang's options without its plug-ins."""

THE_CURE = """python -c 'import runpy, sglang.srt.plugins as p; p.load_plugins();
runpy.run_module("their.program", run_name="__main__", alter_sys=True)' OPTIONS"""


def test_a_program_that_reads_sglangs_options_without_plugins(machine: Machine, tmp_path: Path) -> None:
    package = tmp_path / "their"
    package.mkdir()
    (package / "program.py").write_text(THEIR_PROGRAM)
    args = machine.hicache_args("auto")
    env = {"PYTHONPATH": str(tmp_path)}
    ended = machine.launch(args, env=env, command=("-m", "their.program"))
    assert ended.status == 2
    assert "invalid choice: 'auto'" in ended.output
    assert THE_CURE in (ROOT / "docs" / "operations.md").read_text()
    code = shlex.split(THE_CURE)[2]
    assert decision(machine, args, env=env, code=code)["backend"] == "hybrid"
