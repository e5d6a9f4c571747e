"""`hicache-io bench serve`: what it refuses, how its servers are started, and the plans for a GPU machine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

pytest.importorskip("aiohttp")

from sglang_hicache.bench import damaged
from sglang_hicache.bench.cli import app
from sglang_hicache.bench.lab import cell_server, gpu_plan, gpu_plans, gpu_stress
from sglang_hicache.bench.serve import arms, models, null_backend, public, result, run, scrape, workloads
from sglang_hicache.bench.serve.account import arm_round
from sglang_hicache.bench.serve.arms import Cell
from sglang_hicache.bench.serve.load import Loaded
from sglang_hicache.bench.serve.models import ServedModel
from sglang_hicache.bench.serve.result import CellResult
from sglang_hicache.io_backends.interface import Backend
from sglang_hicache.io_backends.registry import available_backends
from sglang_hicache.io_backends.sglang import unsafe
from sglang_hicache.policy.names import NameProblem

MODEL = ServedModel("kvheavy", "/models/kvheavy", 512)


@pytest.fixture(autouse=True)
def this_process_ends_as_before() -> Iterator[None]:
    """What runs on a lent machine says what SIGTERM does."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("serve.command", "lab.gpu_plan", "lab.cell_server"):
        monkeypatch.setattr(f"sglang_hicache.bench.{module}.gpu_missing", lambda: "none here")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arm", "hybird"], "did you mean 'hybrid'"),
        (["--arm", "auto", "--arm", "auto"], "an arm was named twice"),
        (["--arm", "kernel"], "SGLang's own write-back needs CUDA"),
        (["--workload", "chatt"], "did you mean 'chat'"),
        (["--layout", "page_frist"], "did you mean 'page_first'"),
        (["--model", "kvheavi"], "did you mean 'kvheavy'"),
        (["--rounds", "0"], "--rounds"),
        (["--pool-tokens", "10"], "--pool-tokens"),
    ],
)
def test_wrong_input_is_refused_with_a_line(words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", "serve", *words])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert "Traceback" not in done.output


@pytest.mark.parametrize(("arm", "fences"), [("unsafe-none", "none"), ("unsafe-producer", "producer")])
def test_an_experiment_names_its_fences_and_is_confirmed(tmp_path: Path, arm: str, fences: str) -> None:
    words = arms.server_args(Cell("c", models.make("tiny", tmp_path)), arm)
    assert words[words.index("--hicache-io-unsafe-fences") + 1] == fences
    assert "--i-know-this-corrupts" in words
    assert "--i-know-this-corrupts" not in arms.server_args(
        Cell("c", models.make("tiny", tmp_path)), "kernel"
    )


def test_each_arm_is_a_server_with_its_own_write_back() -> None:
    cell = Cell("x", MODEL, page_size=1, mem_layout="page_first", more=("--attention-backend", "fa3"))
    found = {arm: arms.server_args(cell, arm) for arm in arms.ARMS}
    for arm, words in found.items():
        assert ("--enable-hierarchical-cache" in words) == (arm != arms.NONE)
        if arm != arms.NONE:
            assert words[words.index("--hicache-io-backend") + 1] == (
                "fenced_kernel" if arm in arms.EXPERIMENTS else arm
            )
        # Only the one that copies nothing, and only with the confirmation.
        assert (unsafe.CONFIRM in words) == (arm in (unsafe.NULL, *arms.EXPERIMENTS))
        assert (unsafe.OPTION in words) == (arm in arms.EXPERIMENTS)
        assert words[words.index("--attention-backend") + 1] == "fa3"
    same = [words for arm, words in found.items() if arm in arms.SGLANGS]
    assert [word for word in same[0] if word not in arms.SGLANGS] == [
        word for word in same[1] if word not in arms.SGLANGS
    ]


def test_a_cell_says_when_outputs_can_be_compared() -> None:
    assert not Cell("x", MODEL).exact()
    assert Cell("x", MODEL, deterministic=True).exact()
    dummy = ServedModel("qwen3-8b", "/models/q", 512, ("--load-format", "dummy"), real_weights=False)
    assert not Cell("x", dummy, deterministic=True).exact()
    assert "--load-format" in arms.server_args(Cell("x", dummy), "auto")
    assert "--skip-tokenizer-init" in arms.server_args(Cell("x", MODEL), "auto")
    assert "--skip-tokenizer-init" not in arms.server_args(Cell("x", MODEL, tokenizer=True), "auto")


def test_what_copies_nothing_is_in_no_installation(tmp_path: Path) -> None:
    assert unsafe.NULL not in available_backends()
    (variables,) = null_backend.environment(tmp_path).items()
    assert variables[0] == "PYTHONPATH"
    text = (tmp_path / "hicache_io_null-0.dist-info" / "entry_points.txt").read_text()
    assert "null = sglang_hicache.bench.serve.null_backend:NullBackend" in text
    assert arms.server_env("auto", tmp_path) == {}
    assert "damaged" in str(arms.server_env(damaged.NAME, tmp_path / "damaged"))
    device: Any = None
    backend = null_backend.NullBackend(device, {})
    assert isinstance(backend, Backend)


def test_an_arm_can_be_served_by_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, site, other = tmp_path / "mine", tmp_path / "site", tmp_path / "other"
    (mine / "sglang_hicache").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", f"{mine}{os.pathsep}{site}")
    env = arms.server_env("auto@old", tmp_path, {"old": other})
    assert env == {"PYTHONPATH": f"{other}{os.pathsep}{site}"}
    cell = Cell("x", MODEL)
    assert arms.server_args(cell, "auto@old") == arms.server_args(cell, "auto")
    arms.check_arms(["auto@old"])
    with pytest.raises(NameProblem):
        arms.check_arms(["atuo@old"])
    assert arms.unserved("kernel@old", cpu=True)


def test_other_code_is_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_plan.main(["first", "--rehearse", "--beside", f"old={tmp_path}"])
    assert "no checkout is there" in capsys.readouterr().err


def test_a_model_is_taken_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 77}}))
    found = models.make(str(tmp_path), tmp_path / "made")
    assert (found.vocab_size, found.path) == (77, str(tmp_path.resolve()))


def test_sgls_own_benchmark_is_read_as_the_others() -> None:
    text = {
        "duration": 2.5,
        "input_lens": [100, 90],
        "output_lens": [3, 0],
        "ttfts": [0.5, 0.0],
        "itls": [[0.1, 0.2], []],
        "errors": ["", "HTTP 500"],
        "cached_tokens_details": [{"device": 10, "host": 60}, None],
    }
    found = public.loaded("gsp", text)
    first, second = found.asked
    assert (first.host_tokens, first.device_tokens, first.output_tokens) == (60, 10, 3)
    assert first.seconds == pytest.approx(0.8)
    assert (first.error, second.error) == (None, "HTTP 500")
    assert found.seconds == 2.5


@pytest.mark.parametrize("name", public.NAMES)
def test_sgls_own_benchmark_overflows_the_device_pool(name: str) -> None:
    words = public.public(name).args(65_536, 3)
    value = {word: words[words.index(word) + 1] for word in words if word.startswith("--")}
    system, groups = int(value["--gsp-system-prompt-len"]), int(value["--gsp-num-groups"])
    assert system * groups > 1.4 * 65_536
    assert value["--seed"] == "3"
    assert "sglang.benchmark.serving" in public.command(
        "http://x", "m", public.public(name), 1024, 0, Path("o")
    )


def test_what_sgls_own_benchmark_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public, "find_spec", lambda name: None if name == "pandas" else object())
    assert public.missing(str(tmp_path), 1) == "pandas is not installed"


def test_every_plan_is_made_of_what_there_is() -> None:
    for steps in gpu_plans.PLANS.values():
        names = [step.name for step in steps]
        assert len(set(names)) == len(names)
        for step in steps:
            arms.check_arms(step.arms)
            assert set(step.workloads) <= {*workloads.NAMES, *public.NAMES}
            assert step.model in models.NAMES
            small = step.rehearsal()
            assert small.arms
            assert not set(small.arms) & set(arms.SGLANGS)
    for step in gpu_plans.PLANS["bytes"]:
        assert step.deterministic
        assert {arms.NONE, damaged.NAME} <= set(step.arms)
        assert step.model in (models.HEAVY, models.MLA, models.SWA, models.MAMBA)


def test_host_memory_of_a_step_is_that_of_the_servers_that_are_up_together() -> None:
    # 36 layers, K and V of 8 heads of 128, two bytes each; 27 layers of 512 + 64.
    assert gpu_plans.kv_bytes_per_token(models.KVHEAVY) == 36 * 2 * 8 * 128 * 2
    assert gpu_plans.kv_bytes_per_token(models.MLAHEAVY) == 27 * 576 * 2
    step = gpu_plans.PlannedCell("x", ("none", "auto", "kernel"), pool_tokens=1000, ratio=2)
    all_at_once, alone = (
        gpu_plans.host_bytes(step, 10),
        gpu_plans.host_bytes(gpu_plans.PlannedCell("x", step.arms, pool_tokens=1000, ratio=2, at_once=1), 10),
    )
    assert all_at_once - alone == 20_000 + 2 * gpu_plans.SERVER_BYTES
    for steps in gpu_plans.PLANS.values():
        for step in steps:
            config = {models.HEAVY: models.KVHEAVY, models.MLA: models.MLAHEAVY}.get(step.model)
            if config is not None:
                assert gpu_plans.host_bytes(step, gpu_plans.kv_bytes_per_token(config)) < 120 * 2**30


def test_a_cell_that_fails_does_not_stop_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(cell: Cell, given: run.ServeOptions, budget: run.Budget, say: run.Say, save: Any) -> CellResult:
        if cell.page_size == 1:
            raise RuntimeError("out of something")
        given.logs.mkdir(parents=True, exist_ok=True)
        (given.logs / "a.log").write_text("hello")
        return CellResult.of(cell)

    monkeypatch.setattr(run, "run_cell", fake)
    monkeypatch.setattr("sglang_hicache.bench.lab.gpu_plans.models.make", lambda name, folder: MODEL)
    words = ["first", "--rehearse", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert gpu_plan.main(words) == 1
    saved = result.load(tmp_path / "out" / "first.json")
    assert [cell.name for cell in saved.cells] == ["kvheavy-page64"]
    assert "out of something" in capsys.readouterr().err
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["first-logs.tar.gz", "first.csv", "first.html", "first.json", "first.md"]


class AwakeServer:
    """Stands for a server of which it matters whether it runs.

    Attributes:
        awake: of all of them.
    """

    awake: ClassVar[set[str]] = set()
    url = ""

    def __init__(self, arm: str) -> None:
        self.arm = arm
        self.awake.add(arm)

    def pause(self) -> None:
        self.awake.discard(self.arm)

    def resume(self) -> None:
        self.awake.add(self.arm)


def test_servers_sleep_while_another_has_its_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An idle scheduler polls, and the loaded one waits for the CPU."""
    AwakeServer.awake.clear()
    arms = ("kernel", "auto", "null")
    during: list[tuple[str, set[str]]] = []
    last: list[set[str]] = []
    locked: list[Path | None] = []

    def turn(name: str, arm: str, number: int, *_: Any) -> Any:
        during.append((arm, set(AwakeServer.awake)))
        if arm == "auto":
            raise OSError("it does not answer")
        return arm_round(name, arm, number, Loaded((), 1.0, 0.0), scrape.Written()), {}

    def all_awake(*_: Any) -> None:
        assert AwakeServer.awake == set(arms)
        assert locked

    async def warm(*_: Any) -> list[None]:
        all_awake()
        return [None] * 3

    @contextmanager
    def alone(lock: Path | None) -> Iterator[None]:
        assert not AwakeServer.awake  # whoever waits for the lock takes no CPU from who has it
        locked.append(lock)
        try:
            yield
        finally:
            locked.pop()

    up = [SimpleNamespace(arm=arm, server=AwakeServer(arm), turns=[]) for arm in arms]
    for name, fake in (
        ("_start", lambda *_: up),
        ("_turn", turn),
        ("_warm_up", warm),
        ("_alone", alone),
        ("freeze_gc", all_awake),
    ):
        monkeypatch.setattr(run, name, fake)
    monkeypatch.setattr(run, "_last_words", lambda each, result: last.append(set(AwakeServer.awake)))
    given = run.ServeOptions(arms, ("chat",), 2, logs=tmp_path)
    cell = Cell("x", MODEL, page_size=64, pool_tokens=4096)
    run.run_cell(cell, given, run.Budget(None), lambda line: None, lambda part: None)
    assert during == [(arm, {arm}) for arm in (*arms, *arms[::-1])]
    assert all(each.arm in awake for each, awake in zip(up, last, strict=True))


@pytest.mark.parametrize(
    ("enough_s", "budget_s", "turns", "lines"),
    [(60.0, 1e6, 7, 0), (float("inf"), 95.0, 9, 1)],
    ids=["each arm has had enough", "the time is up"],
)
def test_rounds_end_where_no_arm_gets_a_turn(
    enough_s: float,
    budget_s: float,
    turns: int,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Turns of 10 s, and a thousand rounds were asked for."""
    spent = [0.0]

    class Clock(run.Budget):
        def left_s(self) -> float:
            return budget_s - spent[0]

    def start(*_: Any) -> list[Any]:
        return [SimpleNamespace(arm="auto", server=AwakeServer("auto"), turns=[])]

    def turn(name: str, arm: str, number: int, *_: Any) -> Any:
        spent[0] += 10
        return arm_round(name, arm, number, Loaded((), 10.0, 0.0), scrape.Written()), {}

    async def warm(*_: Any) -> list[None]:
        return [None]

    for name, fake in (("_start", start), ("_turn", turn), ("_warm_up", warm)):
        monkeypatch.setattr(run, name, fake)
    monkeypatch.setattr(run, "freeze_gc", lambda server: None)
    monkeypatch.setattr(run, "_last_words", lambda each, result: None)
    given = run.ServeOptions(("auto",), ("chat",), 1000, logs=tmp_path, enough_s=enough_s)
    cell = Cell("x", MODEL, page_size=64, pool_tokens=4096, cpu_engine=True)
    found = run.run_cell(cell, given, Clock(None), lambda line: None, lambda part: None)
    assert len(found.turns) == turns
    assert len(found.skipped) == lines


@pytest.mark.parametrize("asked", [("gsp", "gsp-turns"), ("chat", "gsp")])
def test_chats_fill_the_pools_before_sglangs_own_benchmark(
    asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no small form, and the first server of a round would be the one that touches host memory."""
    warmed: list[tuple[str, Any]] = []

    async def ask(url: str, made: workloads.Workload, limit_s: float) -> Loaded:
        warmed.append((url, made.requests))
        return Loaded((), 0.1, 0.0)

    monkeypatch.setattr(run, "ask", ask)
    cell = Cell("x", MODEL, page_size=64, pool_tokens=4096)
    up: Any = [SimpleNamespace(arm="auto", server=SimpleNamespace(url="http://a"))]
    given = run.ServeOptions(("auto",), asked)
    assert asyncio.run(run._warm_up(cell, up, given, run.Budget(None))) == [None]
    chats = workloads.maker("chat")(4096, MODEL.vocab_size, run._WARM_UP_SEED)
    assert warmed == [("http://a", workloads.warm_up(chats, int(4096 * cell.ratio)).requests)]


def test_experiments_take_all_the_time_there_is() -> None:
    for name in ("experiments", "experiments-bytes"):
        assert all(step.enough_s == float("inf") for step in gpu_plans.PLANS[name])


def test_a_plan_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_plan.main(["first"])
    assert "no GPU: none here" in capsys.readouterr().err
    assert gpu_plan.main(["--list"]) == 0
    assert "kvheavy-page64: none kernel direct auto null" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_stress.main(["bytes-kvheavy-page_first-page1"])
    assert "no GPU: none here" in capsys.readouterr().err


def test_stress_of_a_planned_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the server and `hicache-io stress` are told."""
    asked: list[list[str]] = []
    ended: list[object] = []

    class Server:
        url, start_s = "http://127.0.0.1:1", 1.0

        def __init__(self, args: list[str], **_: Any) -> None:
            asked.append(args)

        def __enter__(self) -> Server:
            return self

        def __exit__(self, *_: object) -> None: ...

    class Stress:
        def __init__(self, command: list[str]) -> None:
            asked.append(command[command.index("stress") :])

        def wait(self) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            return 1

        def terminate(self) -> None:
            ended.append(self)

    monkeypatch.setattr(cell_server, "gpu_missing", lambda: None)
    monkeypatch.setattr(cell_server, "make_room", lambda *_: None)
    monkeypatch.setattr(cell_server, "ServerProcess", Server)
    monkeypatch.setattr(gpu_stress.subprocess, "Popen", Stress)
    config = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    served = ServedModel("kvheavy", str(tmp_path), 512)
    monkeypatch.setattr(models, "make", lambda *_: served)
    for name, exact in (("bytes-kvheavy-page_first-page1", True), ("dsaheavy", False)):
        asked.clear()
        assert gpu_stress.main([name, "--duration", "7m", "--out", str(tmp_path)]) == 1
        server, stress = asked
        assert server[server.index("--hicache-io-backend") + 1] == "auto"
        assert ("--enable-deterministic-inference" in server) is exact
        assert stress[1:4] == [Server.url, "--duration", "7m"]
        assert (stress[-2:] == ["--tie", "0"]) is exact
    assert len(ended) == 2, "SIGTERM ends the load, which saves what it has"


def test_a_plan_whose_time_is_up_says_what_was_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["first", "--rehearse", "--budget", "6", "--out", str(tmp_path), "--work", str(tmp_path / "w")]
    assert gpu_plan.main(words) == 1
    assert capsys.readouterr().out.count("not run, no time left") == 2
    assert result.load(tmp_path / "first.json").cells == []


def test_of_plans_with_one_lock_one_server_is_loaded_at_a_time(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    order: list[str] = []

    def other_plan() -> None:
        with run._alone(lock):
            order.append("other")

    other = threading.Thread(target=other_plan)
    with run._alone(lock):
        other.start()
        other.join(0.2)
        order.append("first")
    other.join(10)
    assert order == ["first", "other"]
    # Without one nobody waits.
    with run._alone(None), run._alone(None):
        pass
