"""Asking a server a workload: who asks what when, and what comes of errors and of time that is up."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("aiohttp")

from fake_server import FakeServer, right

from sglang_hicache.bench import serving
from sglang_hicache.bench.serve import run, scrape, workloads
from sglang_hicache.bench.serve.load import Loaded, ask
from sglang_hicache.bench.serve.workloads import Lane, Turn, Workload


def load(server: FakeServer, workload: Workload, limit_s: float = 30) -> Loaded:
    return asyncio.run(ask(server.url, workload, limit_s=limit_s))


def small() -> Workload:
    chats = [[Turn([n, 1, 2], 3), Turn([n, 7], 2)] for n in range(5)]
    beside = [[Turn([100 + n] * 4, 1, seen_tokens=1)] for n in range(6)]
    return Workload("small", "", (Lane("chat", chats, 2), Lane("beside", beside, 1)))


def test_a_turn_carries_all_that_was_said_and_answered_before() -> None:
    with FakeServer() as server:
        loaded = load(server, small())
    assert not loaded.cut
    assert len(loaded.asked) == small().requests == 16
    chats = [prompt for prompt in server.prompts if prompt[0] < 100]
    for number in range(5):
        first, second = (prompt for prompt in chats if prompt[0] == number)
        assert first == [number, 1, 2]
        assert second == [*first, *right(first, 3, 0), number, 7]
    # Every first turn is sent before any second one.
    assert [len(prompt) for prompt in chats] == [3] * 5 + [8] * 5
    assert server.most_at_once <= 3
    for one in loaded.asked:
        assert one.error is None
        assert one.output_tokens == len(one.gaps_s) + 1
        assert (one.device_tokens, one.host_tokens) == (3, 5)
        if one.lane == "chat":
            assert one.seen_tokens == (0 if one.turn == 0 else 6)
        else:
            assert one.seen_tokens == 1


def test_the_same_prompt_gives_the_same_digest_and_another_answer_another() -> None:
    def wrong(prompt: list[int], count: int, asked_before: int) -> list[int]:
        return [*right(prompt, count, 0)[:-1], 511]

    found = []
    for model in (right, right, wrong):
        with FakeServer(model) as server:
            found.append({one.place: one.answer for one in load(server, small()).asked})
    assert found[0] == found[1]
    assert all(found[0][place] != found[2][place] for place in found[0])


def test_a_conversation_whose_turn_failed_is_not_continued() -> None:
    with FakeServer() as server:
        server.fail = lambda number: "error" if number == 0 else None
        loaded = load(server, Workload("x", "", (small().lanes[0],)))
    failed = [one for one in loaded.asked if one.error is not None]
    assert [one.place for one in failed] == [("chat", 0, 0)]
    assert "out of memory" in str(failed[0].error)
    assert len(loaded.asked) == 9  # no second turn of that one


def test_time_that_is_up_cuts_and_keeps_what_was_answered() -> None:
    with FakeServer() as server:
        server.fail = lambda number: "hang" if number >= 4 else None
        loaded = load(server, Workload("x", "", (small().lanes[0],)), limit_s=1)
    assert loaded.cut
    assert len(loaded.asked) == 4


def test_a_server_that_will_not_flush_says_why(tmp_path: Any) -> None:
    with FakeServer() as fake:
        server = serving.ServerProcess([], log=tmp_path / "log")
        server.url = fake.url
        (tmp_path / "log").write_text("")
        run.flush(server)
        assert fake.flushed == 1
        fake.flush_status = 400
        with pytest.raises(serving.ServerError, match="requests are running"):
            run.flush(server)


def test_a_server_that_cannot_freeze_its_collector_says_why(tmp_path: Any) -> None:
    (tmp_path / "log").write_text("")
    server = serving.ServerProcess([], log=tmp_path / "log")
    with FakeServer() as fake:
        server.url = fake.url
        run.freeze_gc(server)
        assert fake.frozen == 1
    with pytest.raises(serving.ServerError, match="POST /freeze_gc"):
        run.freeze_gc(server)  # it is gone


def test_a_paused_server_stops_with_all_of_its_processes(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    server = serving.ServerProcess([], log=tmp_path / "log")
    server.pause()  # not there yet
    server._process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)

    def states() -> set[str]:
        group = [psutil.Process(server._process.pid)]
        return {each.status() for each in (*group, *group[0].children())}

    def eventually(wanted: Callable[[], bool]) -> bool:
        until = time.monotonic() + 10
        while not wanted() and time.monotonic() < until:
            time.sleep(0.01)
        return wanted()

    try:
        assert eventually(lambda: len(psutil.Process(server._process.pid).children()) == 1)
        server.pause()
        assert eventually(lambda: states() == {psutil.STATUS_STOPPED})
        server.resume()
        assert eventually(lambda: psutil.STATUS_STOPPED not in states())
        server.pause()
    finally:
        server.close()  # ends it, paused as it is
    assert server._process is None
    server.resume()


def test_metrics_are_read_over_http() -> None:
    with FakeServer() as server:
        server.metrics = lambda: (
            'sglang:evicted_tokens_total{rank="0"} 3\nsglang:evicted_tokens_total{rank="1"} 4\n'
        )
        assert scrape.look(server.url) == {"sglang_evicted_tokens_total": 7.0}


def test_rounds_go_there_and_back_behind_the_reference() -> None:
    arms = ["none", "kernel", "auto"]
    assert run.order(arms, 0) == arms
    assert run.order(arms, 1) == arms[::-1]
    assert run.order(arms, 1, first=("none", "kernel")) == ["none", "kernel", "auto"]
    assert run.order(["kernel"], 0, first=("none",)) == ["kernel"]
    assert list(run.groups(arms, 2)) == [["none", "kernel"], ["auto"]]


def test_every_named_workload_is_taken_by_a_server() -> None:
    for name in workloads.NAMES:
        with FakeServer() as server:
            made = workloads.warm_up(workloads.maker(name)(1024, 512, 0))
            loaded = load(server, made)
        assert len(loaded.asked) == made.requests
        assert not [one for one in loaded.asked if one.error]
