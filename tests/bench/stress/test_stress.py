"""`hicache-io stress` against real servers on the CPU engine, and what an experiment leaves out."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from launching import Machine
from own_process import run_cases
from typer.testing import CliRunner

from sglang_hicache.bench import damaged, serving, tiny_model
from sglang_hicache.bench.cli import app

HERE = Path(__file__).parent


def stress(*args: str, status: int) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["stress", *args, "--json"])
    assert done.exit_code == status, (done.stderr, done.exception)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def server(machine: Machine, folder: Path, backend: str, *more: str, **env: str) -> serving.ServerProcess:
    return serving.ServerProcess(
        machine.hicache_args(backend, *more),
        log=folder / "server.log",
        env={**machine.env(), **tiny_model.environment(), **env},
        launch=machine.launcher,
    )


@pytest.fixture(scope="module")
def good_server(
    machine: Machine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[serving.ServerProcess]:
    with server(machine, tmp_path_factory.mktemp("good"), "auto") as running:
        yield running


def later(running: serving.ServerProcess, number: signal.Signals, seconds: float) -> None:
    """Send a signal to all of a server's processes, while it is under load."""
    port = urlsplit(running.url).port
    (listener,) = {
        each.pid
        for each in psutil.net_connections("tcp4")
        if each.status == "LISTEN" and each.laddr.port == port
    }
    group = os.getpgid(listener)
    threading.Timer(seconds, lambda: os.killpg(group, number)).start()


@pytest.mark.server
def test_a_minute_of_pressure(good_server: serving.ServerProcess) -> None:
    result = stress(good_server.url, "--duration", "60s", status=0)
    (side,) = result["servers"]
    assert side["survived_s"] >= 60
    assert side["ok"] == side["requests"] > 100
    assert side["tie_nats"] == 0, "every output is the first one, to the token"
    # The pressure was there: write-through, eviction, and prefixes that came back.
    counters = side["plugin_counters"]
    assert counters["producer_fences"] == counters["writes"] > 100
    assert side["checked_from_host"] > side["requests"] / 10
    assert result["engine"] == "cpu"
    assert any("nothing about a GPU" in note for note in result["notes"])


@pytest.mark.server
def test_a_server_that_stops_answering(good_server: serving.ServerProcess) -> None:
    later(good_server, signal.SIGSTOP, 2)
    try:
        (side,) = stress(good_server.url, "--duration", "5m", "--silent", "3", status=1)["servers"]
    finally:
        later(good_server, signal.SIGCONT, 0)
    assert side["ended"] == "hung"
    assert "/health does not answer" in side["first_problem"]["what"]


@pytest.mark.server
def test_a_server_that_is_killed(good_server: serving.ServerProcess) -> None:
    later(good_server, signal.SIGKILL, 3)
    (side,) = stress(good_server.url, "--duration", "5m", status=1)["servers"]
    assert side["ended"] == "dead"
    assert 0 < side["errors"] <= 8
    assert side["ok"] > 0


@pytest.mark.server
def test_a_damaged_write_back_is_found(machine: Machine, tmp_path: Path) -> None:
    """Its server also runs an experiment, which on the CPU changes no output: there is one stream."""
    experiment = ("--hicache-io-unsafe-fences", "none", "--i-know-this-corrupts")
    third_party = damaged.environment(tmp_path / "installed")
    with server(machine, tmp_path, damaged.NAME, *experiment, **third_party) as running:
        result = stress(running.url, "--waves", "2", status=1)
    (side,) = result["servers"]
    assert side["wrong"] > 0
    assert side["errors"] == 0
    assert side["first_problem"]["kind"] == "wrong output"
    assert side["unsafe_fences"] == "none"
    assert any("--hicache-io-unsafe-fences none" in note for note in result["notes"])
    assert side["plugin_counters"]["writes"] > 0
    assert side["plugin_counters"]["producer_fences"] == 0
    warnings = [line for line in running.log.read_text().splitlines() if "none: UNSAFE EXPERIMENT" in line]
    assert len(warnings) == 1, "each scheduler says it once"


ROUNDING = ("--dtype", "bfloat16")
"""Prefixes that are computed again in other pieces round otherwise, and turn a near tie now and then."""


@pytest.mark.server
def test_rounding_is_not_called_wrong(machine: Machine, tmp_path: Path) -> None:
    with server(machine, tmp_path, "auto", *ROUNDING) as running:
        result = stress(running.url, "--waves", "8", status=0)
    (side,) = result["servers"]
    assert (side["tie_nats"], side["wrong"], side["undecided"]) == (0.25, 0, 0)
    assert side["checked_from_host"] > 20


@pytest.mark.server
def test_damage_is_told_from_rounding(machine: Machine, tmp_path: Path) -> None:
    third_party = damaged.environment(tmp_path / "installed")
    with server(machine, tmp_path, damaged.NAME, *ROUNDING, **third_party) as running:
        result = stress(running.url, "--waves", "2", status=1)
    (side,) = result["servers"]
    assert side["wrong"] > 0
    assert "by the server's own recomputation" in side["first_problem"]["what"]


@pytest.mark.sglang
def test_what_an_experiment_leaves_out(subtests: pytest.Subtests, plain_python: tuple[str, ...]) -> None:
    run_cases(subtests, HERE.parent / "race" / "unsafe_cases.py", {}, plain_python)


# Every way to ask for it, in one process: most of its time is SGLang's import.
ASK = """
import contextlib, io, json, pickle, sys
from sglang.srt.plugins import load_plugins
load_plugins()
import sglang.srt.entrypoints.engine as engine
from sglang.srt.server_args import prepare_server_args
from sglang_hicache.io_backends.sglang.launcher import options

found = {}
for name, words in json.loads(%(asked)r).items():
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = prepare_server_args(sys.argv[1:] + words)
            args.resolve_once()
        carried = getattr(pickle.loads(pickle.dumps(args)), '_hicache_io', None)
        found[name] = carried and [carried.decision['unsafe_fences'], carried.decision['fence_forward']]
    except SystemExit as end:
        found[name] = [end.code, said.getvalue()]
options.accept_engine_keywords(None)
for name, keywords in json.loads(%(keywords)r).items():
    try:
        args = engine.Engine.server_args_class(
            model_path=sys.argv[sys.argv.index('--model-path') + 1], device='cpu', **keywords)
        args.resolve_once()
        found[name] = args._hicache_io.decision['unsafe_fences']
    except Exception as error:
        found[name] = [type(error).__name__, str(error)]
print('FOUND', json.dumps(found))
"""

OPTION, CONFIRM = "--hicache-io-unsafe-fences", "--i-know-this-corrupts"
BY_HAND = ["--enable-hierarchical-cache", "--hicache-io-backend", "fenced_kernel"]
ENGINE = {"enable_hierarchical_cache": True, "hicache_io_backend": "fenced_kernel"}


@pytest.mark.server
def test_who_may_ask_for_it(machine: Machine) -> None:
    asked = {
        "confirmed": [*BY_HAND, OPTION, "producer", CONFIRM],
        "control": [*BY_HAND, OPTION, "both", CONFIRM],
        "not confirmed": [*BY_HAND, OPTION, "none"],
        "only confirmed": [*BY_HAND, CONFIRM],
        "SGLang's own": [*BY_HAND[:2], "kernel", OPTION, "none", CONFIRM],
        "no HiCache": ["--hicache-io-backend", "auto", OPTION, "none", CONFIRM],
        "no such choice": [*BY_HAND, OPTION, "forward", CONFIRM],
    }
    keywords = {
        "engine": {**ENGINE, "hicache_io_unsafe_fences": "none", "i_know_this_corrupts": True},
        "engine, not confirmed": {**ENGINE, "hicache_io_unsafe_fences": "none"},
        "engine, no such choice": {**ENGINE, "hicache_io_unsafe_fences": "no", "i_know_this_corrupts": True},
    }
    script = ASK % {"asked": json.dumps(asked), "keywords": json.dumps(keywords)}
    args = ["--model-path", str(machine.model), "--skip-tokenizer-init", "--device", "cpu"]
    ended = machine.launch(args, command=("-c", script))
    said = [line for line in ended.output.splitlines() if line.startswith("FOUND ")]
    assert said, ended.output[-3000:]
    found = json.loads(said[0].removeprefix("FOUND "))
    assert found["confirmed"] == ["producer", []]
    assert found["control"] == ["both", ["extend", "decode"]]
    assert found["engine"] == "none"
    for name, words in {
        "not confirmed": f"say {CONFIRM} too",
        "only confirmed": f"confirms {OPTION}, which is not given",
        "SGLang's own": "has no say over --hicache-io-backend kernel",
        "no HiCache": "needs HiCache",
        "no such choice": "invalid choice: 'forward'",
    }.items():
        status, message = found[name]
        assert status == 2, (name, found[name])
        assert words in message
    for name, words in {
        "engine, not confirmed": f"say {CONFIRM} too",
        "engine, no such choice": "choose from none, producer, both",
    }.items():
        kind, message = found[name]
        assert kind == "RefusedError", (name, found[name])
        assert words in message
