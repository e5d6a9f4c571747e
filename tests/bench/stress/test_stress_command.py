"""`hicache-io stress` against a server that fails as it is told to."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, right
from typer.testing import CliRunner

pytest.importorskip("aiohttp")

from sglang_hicache.bench.cli import app

SMALL = ("--conversations", "4", "--turns", "2", "--prompt-tokens", "30", "--output-tokens", "6")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


def stress(*args: str, status: int = 0) -> dict[str, Any]:
    """Run it; the JSON that it prints, and what it says under "said"."""
    done = CliRunner().invoke(app, ["stress", *args, *SMALL, "--json"])
    assert done.exit_code == status, (done.stderr, done.exception)
    result: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
    return {**result, "said": done.stderr}


def of_one(result: dict[str, Any]) -> dict[str, Any]:
    (side,) = result["servers"]
    assert side["requests"] == sum(side[kind] for kind in ("ok", "errors", "wrong", "undecided"))
    return dict(side)


@pytest.mark.parametrize("incremental", [False, True])
def test_a_good_server(server: FakeServer, tmp_path: Path, incremental: bool) -> None:
    server.incremental = incremental
    out = tmp_path / "result.json"
    result = stress(server.url, "--waves", "3", "--clients", "3", "--out", str(out))
    side = of_one(result)
    # The first wave has 4 new conversations of 2 turns, each later one those of the wave before too.
    assert (side["requests"], side["ok"], side["errors"], side["wrong"]) == (40, 40, 0, 0)
    assert side["checked"] == side["checked_from_host"] == 16
    assert (side["host_tokens"], side["output_tokens"]) == (40 * 5, 40 * 6)
    assert server.requests == 40 + 1, "and one to see that it works"
    assert 1 < server.most_at_once <= 3
    assert side["ended"] == "alive"
    assert side["survived_s"] == side["loaded_s"] > 0
    assert 0 < side["request_s"]["p50"] <= side["request_s"]["p99"] <= side["request_s"]["max"]
    assert side["between_tokens_s"]["p50"] > 0
    assert result["ok"] is True
    saved = json.loads(out.read_text())
    assert {**saved, "said": ""} == {**result, "said": ""}


def test_what_there_is_is_saved_after_each_wave(tmp_path: Path) -> None:
    """Whoever ends the process, after hours, loses one wave."""
    out = tmp_path / "result.json"
    found: list[dict[str, Any]] = []

    def looking(prompt: list[int], count: int, before: int) -> list[int]:
        if out.exists():
            found.append(json.loads(out.read_text()))
        return right(prompt, count, before)

    with FakeServer(looking) as server:
        result = stress(server.url, "--waves", "3", "--out", str(out))
    assert [each["finished"] for each in found] == [False] * len(found)
    assert {of_one(each)["requests"] for each in found} == {8, 24}, "after the first wave, and the second"
    assert all(each["ok"] for each in found)
    saved = json.loads(out.read_text())
    assert saved["finished"] is result["finished"] is True
    assert of_one(saved)["requests"] == 40
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_pipe_gets_one_result(server: FakeServer, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    stress(server.url, "--waves", "2", "--out", str(pipe))
    reader.join(10)
    assert json.loads(read[0])["finished"] is True
    assert pipe.is_fifo()


def test_what_out_names_stays_what_it_is(server: FakeServer, tmp_path: Path) -> None:
    """Replaced as a whole is only what is a file by itself."""
    target, link, private = tmp_path / "target", tmp_path / "link", tmp_path / "private"
    target.touch()
    link.symlink_to(target)
    private.touch(mode=0o600)
    long = tmp_path / ("n" * 252)  # no room for another name beside it
    for out in (link, private, long):
        stress(server.url, "--waves", "2", "--out", str(out))
        assert json.loads(out.read_text())["finished"] is True
    assert link.is_symlink()
    assert json.loads(target.read_text())["finished"] is True
    assert private.stat().st_mode & 0o777 == 0o600
    with (tmp_path / "opened").open("w") as file:
        stress(server.url, "--waves", "2", "--out", f"/proc/self/fd/{file.fileno()}")
    assert json.loads((tmp_path / "opened").read_text())["finished"] is True


def test_the_prompts_are_the_same_whenever_and_whoever_is_asked() -> None:
    seen: list[set[tuple[int, ...]]] = []
    for _ in range(2):
        prompts: set[tuple[int, ...]] = set()

        def noting(prompt: list[int], count: int, before: int, seen: set[tuple[int, ...]] = prompts) -> Any:
            seen.add(tuple(prompt))
            return right(prompt, count, before)

        with FakeServer(noting) as server:
            stress(server.url, "--waves", "2")
        seen.append(prompts)
    assert seen[0] == seen[1]
    starts = {prompt[:10] for prompt in seen[0]}
    assert len(starts) < len(seen[0]) / 4, "conversations share a prefix, and turns go on"


def wrong_later(prompt: list[int], count: int, asked_before: int) -> list[int]:
    tokens = right(prompt, count, 0)
    return [token ^ (position == 3) for position, token in enumerate(tokens)] if asked_before else tokens


def test_a_wrong_output_is_found() -> None:
    with FakeServer(wrong_later) as server:
        result = stress(server.url, "--waves", "2", status=1)
    side = of_one(result)
    assert (side["wrong"], side["errors"]) == (8, 0)
    assert side["first_problem"]["kind"] == "wrong output"
    assert "token 4 of 6" in side["first_problem"]["what"]
    assert side["survived_s"] < side["loaded_s"]
    assert "wrong output" in result["said"]


def flips_now_and_then(prompt: list[int], count: int, asked_before: int) -> list[int]:
    return wrong_later(prompt, count, asked_before % 3 == 0)


@pytest.mark.parametrize(
    ("gap", "rounding", "status", "counted"),
    [
        (0.1, 0.0, 0, "near_ties"),  # what bfloat16 rounds by arithmetic
        (1.0, 0.5, 0, "near_ties"),  # as much as this server rounds without the host
        (4.0, 0.5, 1, "wrong"),
        (0.5, 0.01, 1, "wrong"),
        (9.0, 8.0, 2, "undecided"),  # nothing would stand out
    ],
)
def test_rounding_is_told_from_damage(gap: float, rounding: float, status: int, counted: str) -> None:
    with FakeServer(wrong_later, enable_deterministic_inference=False) as server:
        server.gap, server.rounding = gap, rounding
        result = stress(server.url, "--waves", "2", status=status)
    side = of_one(result)
    assert side[counted] == 8
    assert side["ok"] == side["requests"] - (0 if counted == "near_ties" else 8)
    assert result["judgement"] == {0: "good", 1: "bad", 2: "cannot tell"}[status]
    assert side["rounding"]["differences"] >= 64
    assert rounding / 2 <= side["rounding"]["noise_nats"] <= 2 * rounding
    assert side["rounding"]["requests"] == server.computed
    if counted == "wrong":
        assert "by the server's own recomputation" in side["first_problem"]["what"]
    if counted == "undecided":
        assert "--enable-deterministic-inference" in " ".join(result["notes"])
        assert "cannot tell" in result["said"]


def test_a_server_that_flips_tokens_without_the_host_too_is_not_called_wrong() -> None:
    """As often as it flips a token whose prefix came from the host, it flips one that was computed afresh."""
    with FakeServer(wrong_later, enable_deterministic_inference=False) as server:
        server.gap = 0.9
        server.recomputed = flips_now_and_then
        side = of_one(stress(server.url, "--waves", "2"))
    assert (side["wrong"], side["near_ties"]) == (0, 8)


def test_where_nothing_may_differ_nothing_is_recomputed() -> None:
    with FakeServer(wrong_later) as server:
        server.gap = 0.1
        side = of_one(stress(server.url, "--waves", "2", status=1))
    assert (side["wrong"], side["rounding"], server.computed) == (8, None, 0)


def test_what_was_computed_afresh_is_the_servers_own_rounding() -> None:
    with FakeServer(wrong_later, enable_deterministic_inference=False) as server:
        server.host_tokens = server.device_tokens = 0
        side = of_one(stress(server.url, "--waves", "2"))
    assert (side["near_ties"], server.computed) == (8, 0)


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("keeps_keys_apart", False, "although the request's extra_key is new"),
        ("tells", False, "no log probabilities"),
    ],
)
def test_a_server_that_does_not_let_itself_be_judged(attribute: str, value: Any, words: str) -> None:
    with FakeServer(wrong_later, enable_deterministic_inference=False) as server:
        setattr(server, attribute, value)
        result = stress(server.url, "--waves", "2", status=2)
    side = of_one(result)
    assert (side["wrong"], side["undecided"]) == (0, 8)
    assert words in side["cannot_tell"]
    assert result["ok"] is False


def test_a_reference_server_finds_what_is_always_wrong(server: FakeServer) -> None:
    def always_wrong(prompt: list[int], count: int, asked_before: int) -> list[int]:
        return wrong_later(prompt, count, 1)

    with FakeServer(always_wrong) as wrong:
        assert of_one(stress(wrong.url, "--waves", "2"))["wrong"] == 0, "consistent with itself"
        side = of_one(stress(wrong.url, "--waves", "2", "--reference", server.url, status=1))
    assert side["wrong"] == side["checked"] == side["requests"] == 24


@pytest.mark.parametrize(("failure", "words"), [("error", "HTTP 500: out of memory"), ("abort", "abort")])
def test_errors_are_counted_and_do_not_end_the_test(server: FakeServer, failure: str, words: str) -> None:
    server.fail = lambda number: failure if number == 3 else None
    side = of_one(stress(server.url, "--waves", "2", status=1))
    assert side["errors"] == 1
    assert words in side["first_problem"]["what"]
    assert side["ended"] == "alive"
    # A turn without an answer has no next turn, in this wave or the next.
    assert side["requests"] == 24 - 1


def test_a_broken_connection_is_an_error_while_the_server_lives(server: FakeServer) -> None:
    server.fail = lambda number: "cut" if number == 5 else None
    side = of_one(stress(server.url, "--waves", "1", status=1))
    assert (side["errors"], side["ended"]) == (1, "alive")


def test_a_server_that_dies(server: FakeServer) -> None:
    def dies(number: int) -> str | None:
        if number == 10:
            threading.Thread(target=server.close).start()
        return "hang" if number >= 10 else None

    server.fail = dies
    result = stress(server.url, "--duration", "1m", "--silent", "30", status=1)
    side = of_one(result)
    assert side["ended"] == "dead"
    assert 1 <= side["errors"] <= 8, "those in flight, and no more are sent"
    assert "dead" in result["said"]
    assert side["loaded_s"] < 20


def test_a_server_that_hangs(server: FakeServer) -> None:
    server.fail = lambda number: "hang" if number >= 10 else None
    result = stress(server.url, "--duration", "1m", "--silent", "1", status=1)
    side = of_one(result)
    assert side["ended"] == "hung"
    assert "no token for 1 s" in side["first_problem"]["what"]
    assert "HTTP 503" in side["first_problem"]["what"]
    assert side["loaded_s"] < 20
    assert side["survived_s"] <= side["loaded_s"] - 1, "until the last token, not until it was noticed"


def test_a_duration(server: FakeServer) -> None:
    side = of_one(stress(server.url, "--duration", "1s"))
    assert 1 <= side["loaded_s"] < 3
    assert len(side["waves"]) > 2


def test_two_servers_get_the_same_load() -> None:
    with FakeServer() as good, FakeServer(wrong_later) as bad:
        result = stress(good.url, "--compare", bad.url, "--waves", "2", status=1)
        assert good.requests == bad.requests
    assert [side["wrong"] for side in result["servers"]] == [0, 8]
    assert result["difference"]["wrong outputs"] == {"absolute": 8, "relative": None}
    assert result["difference"]["requests"]["relative"] == 0
    assert good.url in result["said"]
    assert bad.url in result["said"]


def test_an_unsafe_experiment_is_said() -> None:
    plugin = {"backend": "fenced_kernel", "unsafe_fences": "none", "counters": {"writes": 1}}
    with FakeServer(internal_states=[{"hicache_io": plugin}]) as server:
        result = stress(server.url, "--waves", "1")
    assert of_one(result)["unsafe_fences"] == "none"
    assert any("--hicache-io-unsafe-fences none" in note for note in result["notes"])
    assert "--hicache-io-unsafe-fences none" in result["said"].replace("\n", " ")


def test_a_load_that_shows_nothing_is_said(server: FakeServer) -> None:
    server.host_tokens = 0
    result = stress(server.url, "--waves", "1")
    assert any("No token came back from the host tier" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["127.0.0.1:30000"], "is no URL of a server"),
        (["http://[/opt/models]/"], "'http://[/opt/models]/' is no URL of a server"),
        (["http://127.0.0.1:99999"], "is no URL of a server"),
        (["http://127.0.0.1:9", "--duration", "soon"], "--duration 'soon'"),
        (["http://127.0.0.1:9", "--compare", "http://127.0.0.1:9/"], "names the same server"),
        (["http://127.0.0.1:9", "--out", "/nonexistent/result.json"], "there is no folder /nonexistent"),
    ],
)
def test_wrong_input_is_one_line(args: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["stress", *args])
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"max_total_num_tokens": None}, "no SGLang server that can be used"),
        ({"max_total_num_tokens": 40}, "has room for 40"),
        ({"context_length": 45}, "has room for 45"),
    ],
)
def test_a_server_that_cannot_take_the_load(info: dict[str, Any], words: str) -> None:
    with FakeServer(**info) as server:
        assert words in stress(server.url, status=2)["said"]
        assert server.requests == 0


def test_a_server_that_refuses_the_first_request(server: FakeServer) -> None:
    server.fail = lambda number: "error"
    assert "cannot take this load: HTTP 500" in stress(server.url, status=2)["said"]


def test_a_reference_server_that_fails(server: FakeServer) -> None:
    with FakeServer() as reference:
        reference.fail = lambda number: "error" if number == 5 else None
        result = stress(server.url, "--reference", reference.url, "--waves", "2", status=2)
    assert "the reference server failed" in result["said"]
