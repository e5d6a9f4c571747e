"""Faults in a real server's processes: it refuses, says what to do, and serves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import CHILDREN, LAUNCHER, Ended, Machine, inject

pytestmark = pytest.mark.server


def assert_refused(ended: Ended, *words: str, advice: str = "--hicache-io-backend kernel") -> None:
    assert ended.status != 0
    said = ended.lines_of_ours()
    assert len(set(said)) == 1, f"one message, not {len(said)}:\n{ended.output[-4000:]}"
    for word in (*words, advice):
        assert word in said[0]
    assert "Uvicorn running on" not in ended.output
    assert "POST /generate" not in ended.output


@pytest.mark.parametrize(
    ("module", "fault", "target"),
    [
        (
            "sglang.srt.mem_cache.l2_transfer",
            "del L2TransferEngine.submit_device_to_host",
            "L2TransferEngine.submit_device_to_host",
        ),
        ("sglang.srt.managers.scheduler", "del Scheduler.run_batch", "Scheduler.run_batch"),
    ],
)
def test_a_hook_target_is_gone(machine: Machine, module: str, fault: str, target: str) -> None:
    ended = machine.launch(machine.hicache_args(), env=inject(LAUNCHER, module, fault))
    assert_refused(ended, f"{target} is not there")
    assert ended.status == 2
    assert "Load weight begin" not in ended.output


def test_a_hook_target_is_gone_in_the_scheduler_only(machine: Machine) -> None:
    fault = "del L2TransferEngine.submit_device_to_host"
    env = inject(CHILDREN, "sglang.srt.mem_cache.l2_transfer", fault)
    ended = machine.launch(machine.hicache_args("copy_engine"), env=env)
    assert_refused(ended, "L2TransferEngine.submit_device_to_host is not there")


def test_a_hook_cannot_be_applied_in_the_scheduler(machine: Machine) -> None:
    # SGLang logs a hook that fails to apply and goes on.
    fault = """
original_apply = HookRegistry._apply_target.__func__
def _apply_target(cls, target, hooks):
    if target.endswith("Scheduler.run_batch"):
        raise RuntimeError("injected")
    return original_apply(cls, target, hooks)
HookRegistry._apply_target = classmethod(_apply_target)
"""
    env = inject(CHILDREN, "sglang.srt.plugins.hook_registry", fault)
    assert_refused(machine.launch(machine.hicache_args(), env=env), "the hook on", "Scheduler.run_batch")


def test_the_plugin_raises_while_loading_in_the_scheduler(machine: Machine) -> None:
    fault = "def _load():\n    raise RuntimeError('injected')\n"
    env = inject(CHILDREN, "sglang_hicache.io_backends.sglang.plugin", fault)
    ended = machine.launch(machine.hicache_args("fenced_kernel"), env=env)
    assert_refused(ended, "failed to load", "injected", "without fences")


def test_the_plugin_is_left_out_in_the_scheduler(machine: Machine) -> None:
    env = inject(CHILDREN, "sglang.srt.environ", "import os\nos.environ['SGLANG_PLUGINS'] = 'another'\n")
    assert_refused(machine.launch(machine.hicache_args(), env=env), "SGLANG_PLUGINS", "without fences")


def test_the_plugin_is_left_out_in_the_launcher(machine: Machine) -> None:
    """None of our code runs then: SGLang itself refuses the name, before anything is loaded."""
    ended = machine.launch(machine.hicache_args(), env={"SGLANG_PLUGINS": "another"})
    assert ended.status == 2
    assert "argument --hicache-io-backend: invalid choice: 'auto'" in ended.output
    assert "Load weight begin" not in ended.output


def test_the_plugin_is_left_out_in_the_launcher_of_an_engine(machine: Machine, tmp_path: Path) -> None:
    """`Engine` checks no choices, so the name reaches a scheduler that has the plug-in; it refuses there."""
    env = inject(CHILDREN, "sglang.srt.environ", "import os\nos.environ.pop('SGLANG_PLUGINS', None)\n")
    script = tmp_path / "engine.py"
    script.write_text(
        "import sglang, sys\n"
        "if __name__ == '__main__':\n"
        f"    sglang.Engine(model_path={str(machine.model)!r}, device='cpu',\n"
        "        attention_backend='torch_native', skip_tokenizer_init=True, page_size=16,\n"
        "        max_total_tokens=1024, enable_hierarchical_cache=True, hicache_io_backend='auto',\n"
        "        log_level='info')\n"
        "    print('Uvicorn running on nothing, but it came up')\n"
    )
    ended = machine.launch(
        [], env={**env, "SGLANG_PLUGINS": "another"}, command=(str(script),), timeout_s=180
    )
    assert_refused(ended, "was not resolved in the launching process", advice="SGLANG_PLUGINS")


@pytest.mark.parametrize("version", ["0.5.17", "0.5.24"])
def test_an_sglang_that_is_not_known(machine: Machine, version: str) -> None:
    env = inject(LAUNCHER, "sglang.version", f"__version__ = {version!r}")
    ended = machine.launch(machine.hicache_args(), env=env)
    assert_refused(ended, f"SGLang {version} is not known", "0.5.18 to 0.5.23")
    assert ended.status == 2


def test_an_sglang_that_is_not_known_still_serves_its_own_backends(machine: Machine) -> None:
    """The refusal is for our names only: parsing `kernel` goes through (and `--help` shows both)."""
    env = inject(LAUNCHER, "sglang.version", "__version__ = '0.5.24'")
    script = (
        "import sys; from sglang.srt.plugins import load_plugins; load_plugins();"
        "from sglang.srt.server_args import prepare_server_args;"
        "print('parsed', prepare_server_args(sys.argv[1:]).hicache_io_backend)"
    )
    args = machine.hicache_args("kernel")
    ended = machine.launch(args, env=env, command=("-c", script))
    assert "parsed kernel" in ended.output
    assert ended.status == 0


EMBEDDING = """
import sys, time
import sglang
from sglang.srt.entrypoints.http_server import launch_server
from sglang.srt.server_args import ServerArgs

OPTIONS = dict(
    model_path=sys.argv[2], device="cpu", attention_backend="torch_native", skip_tokenizer_init=True,
    page_size=16, max_total_tokens=1024, enable_hierarchical_cache=True, hicache_io_backend="auto",
    skip_server_warmup=True,
)

def run():
    try:
        sglang.Engine(**OPTIONS) if sys.argv[1] == "engine" else launch_server(ServerArgs(**OPTIONS))
    except BaseException as error:
        print("CAUGHT", error, flush=True)

if __name__ == "__main__":
    run()
    time.sleep(600)
"""
"""A program that starts SGLang itself, catches what that raises, and goes on with something else."""


@pytest.mark.parametrize("way", ["engine", "launch_server"])
def test_a_refusal_in_the_scheduler_ends_the_program_that_started_it(
    machine: Machine, tmp_path: Path, way: str
) -> None:
    env = inject(CHILDREN, "sglang.srt.managers.scheduler", "del Scheduler.run_batch")
    if way == "launch_server":
        env = {}  # its arguments were made before plug-ins were loaded: that is the reason
    script = tmp_path / "program.py"
    script.write_text(EMBEDDING)
    ended = machine.launch([], env=env, command=(str(script), way, str(machine.model)), timeout_s=90)
    assert ended.status != 0
    assert "CAUGHT" not in ended.output
    said = [line for line in set(ended.lines_of_ours()) if line.startswith("sglang-hicache-io:")]
    cause = {"engine": "Scheduler.run_batch is not there", "launch_server": "plugins.load_plugins() before"}
    assert len(said) == 1, ended.output[-3000:]
    assert cause[way] in said[0]
