"""`hicache-io stress` against servers that answer anything at all, or never stop."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

pytest.importorskip("aiohttp")

from sglang_hicache.bench.cli import app
from sglang_hicache.bench.stress import command
from sglang_hicache.bench.stress.answers import NotUnderstoodError
from sglang_hicache.bench.stress.client import Client, ConnectionLost, Reply, RequestFailed
from sglang_hicache.bench.stress.server import ServerFacts

SMALL = ("--conversations", "2", "--turns", "2", "--prompt-tokens", "30", "--output-tokens", "6")
MARKUP = "no such file [/opt/models] [red]x[/red] :boom: \x1b[2J \x07"

EVENT = {
    "output_ids": [1, 2, 3],
    "meta_info": {
        "completion_tokens": 3,
        "finish_reason": {"type": "length"},
        "cached_tokens_details": {"device": 1, "host": 2},
        "input_token_logprobs": [[None, 1, None], [-0.5, 2, None]],
        "input_top_logprobs": [None, [[-0.5, 2, None], [-0.7, 3, None]]],
        "output_top_logprobs": [[[-0.5, 2, None], [-0.7, 3, None]]],
    },
}
INFO = {
    "version": "0.5.23",
    "max_total_num_tokens": 1024,
    "context_length": 4096,
    "device": "cuda",
    "mem_fraction_static": 0.4,
    "internal_states": [
        {"hicache_io": {"backend": "hybrid", "unsafe_fences": None, "counters": {"writes": 1}}}
    ],
}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -1, 2**31, 2**63])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(st.characters(codec=None), max_size=8)
    | st.sampled_from([MARKUP, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def with_another(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return other
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_another(value[path[0]], path[1:], other)
    return copy


def damaged(whole: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Almost what SGLang answers: something else at one place, or cut off somewhere."""
    text = st.builds(with_another, st.just(whole), st.sampled_from([*places(whole)]), json_values).map(
        lambda value: json.dumps(value).encode()
    )
    return text | st.builds(lambda each, at: each[:at], text, st.integers(0, 200)) | st.binary(max_size=64)


@pytest.fixture(scope="module")
def one_server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


def ask(url: str, what: Callable[[Client], Any]) -> Any:
    async def within() -> Any:
        async with Client(url) as client:
            return await what(client)

    return asyncio.run(within())


ANY_SHAPE = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@ANY_SHAPE
@given(bodies=st.lists(damaged(EVENT), min_size=1, max_size=3), framed=st.booleans())
def test_an_answer_of_any_shape_is_an_answer_or_a_failed_request(
    one_server: FakeServer, bodies: list[bytes], framed: bool
) -> None:
    body = b"".join(b"data: " + each + b"\n\n" for each in bodies) if framed else b"\n".join(bodies)
    one_server.fail = lambda number: body
    try:
        reply = ask(one_server.url, lambda client: client.generate([1, 2], 3, lambda: None))
    except (RequestFailed, ConnectionLost):
        pass
    else:
        assert isinstance(reply, Reply)
        assert len(reply.output_ids) == 3
        assert all(type(each) is int for each in (*reply.output_ids, reply.device_tokens, reply.host_tokens))


@ANY_SHAPE
@given(damaged(EVENT))
def test_a_recomputation_of_any_shape_is_one_or_a_failed_request(one_server: FakeServer, body: bytes) -> None:
    one_server.raw_computed = body
    try:
        part = ask(one_server.url, lambda client: client.compute([1, 2], 3, key="k"))
    except (RequestFailed, ConnectionLost):
        pass
    else:
        json.dumps(part.model_dump(), allow_nan=False)


@ANY_SHAPE
@given(damaged(INFO))
def test_server_info_of_any_shape_gives_facts_that_can_be_saved_or_one_error(
    one_server: FakeServer, body: bytes
) -> None:
    one_server.info = body
    try:
        facts = ServerFacts.of(ask(one_server.url, lambda client: client.info()))
    except (RequestFailed, ConnectionLost, NotUnderstoodError):
        pass
    else:
        assert 0 < facts.pool_tokens <= 2**26
        json.dumps(facts.settings, allow_nan=False)
        assert facts.tie_nats() in (0.0, 0.25)
        assert isinstance(facts.hicache, bool)


def run(*args: str) -> tuple[int, str, Any]:
    done = CliRunner().invoke(app, ["stress", *args, *SMALL, "--json"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    strict: Any = {"parse_constant": lambda word: pytest.fail(f"{word} is no JSON")}
    return done.exit_code, done.stderr, json.loads(done.stdout, **strict) if done.stdout else None


def test_what_a_server_says_is_text(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    names: dict[str, Any] = dict.fromkeys(("version", "hicache_io_backend", "model_path", "dtype"), MARKUP)
    plugin = {"backend": MARKUP, "unsafe_fences": MARKUP, "counters": {MARKUP: 1, "writes": 1}}
    with FakeServer(**names, internal_states=[{"hicache_io": plugin}]) as server:
        server.fail = lambda number: "error" if number == 3 else None
        server.error = MARKUP
        status, said, result = run(server.url, "--waves", "1", "--out", str(out))
    assert status == 1
    assert "[/opt/models] [red]x[/red] :boom:" in said
    assert "\\x1b[2J" in said, "shown, and not obeyed"
    assert "\x1b" not in said
    assert json.loads(out.read_text()) == result
    assert result["servers"][0]["server"]["sglang"] == MARKUP


def test_the_report_is_saved_before_anything_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_hicache.bench.stress import report

    def no_terminal(result: dict[str, Any]) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(report, "table", no_terminal)
    out = tmp_path / "out.json"
    with FakeServer() as server:
        CliRunner().invoke(app, ["stress", server.url, *SMALL, "--waves", "1", "--out", str(out)])
    assert json.loads(out.read_text())["judgement"] == "good"


def test_a_report_that_cannot_be_saved_is_still_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the folder goes away under the load; what cannot be written to begin with is refused."""
    folder = tmp_path / "out.json"
    folder.mkdir()
    monkeypatch.setattr(command, "check_file", lambda option, path: None)
    with FakeServer() as server:
        status, said, result = run(server.url, "--waves", "1", "--out", str(folder))
    assert (status, result["ok"]) == (0, True)
    assert "NOT saved" in said


@pytest.mark.parametrize(
    "body",
    [b"<html><body>502 Bad Gateway</body></html>", b"[" * 200_000, b'{"version": 1e999}', b"\xff\xfe", b""],
)
def test_server_info_that_is_none(body: bytes) -> None:
    with FakeServer() as server:
        server.info = body
        status, said, _ = run(server.url)
    assert status == 2
    assert "is no SGLang server that can be used" in said


@pytest.mark.parametrize(
    "change",
    [
        {"max_total_num_tokens": 10**30},
        {"max_total_num_tokens": True},
        {"max_total_num_tokens": "1024"},
        {"context_length": [4096]},
        {"internal_states": {"hicache_io": 1}},
        {"internal_states": [{"hicache_io": {"counters": [1]}}]},
    ],
)
def test_server_info_of_wrong_types(change: dict[str, Any]) -> None:
    with FakeServer(**change) as server:
        status, said, _ = run(server.url)
        assert server.requests == 0
    assert status == 2
    assert "is no SGLang server that can be used" in said


@pytest.mark.parametrize("failure", ["more", "on and on"])
def test_a_server_that_does_not_stop_is_not_listened_to(
    monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    monkeypatch.setattr("sglang_hicache.bench.stress.client._END_S", 0.5)
    with FakeServer() as server:
        server.fail = lambda number: failure if number == 3 else None
        began = time.monotonic()
        status, said, result = run(server.url, "--waves", "1")
    assert status == 1
    assert time.monotonic() - began < 15
    (side,) = result["servers"]
    assert (side["errors"], side["ended"]) == (1, "alive")
    assert {"more": "and got 7 so far", "on and on": "the stream had not ended"}[failure] in said


def test_requests_end_with_the_duration() -> None:
    """6 tokens, one every 0.2 s: no request would be done within the second."""
    with FakeServer() as server:
        server.fail = lambda number: "slow" if number else None
        _, said, result = run(server.url, "--duration", "1s", "--silent", "30")
    (side,) = result["servers"]
    assert side["loaded_s"] < 1.15
    assert side["unfinished"] > 0
    assert side["requests"] == 0
    assert "given up when the time was over" in said


def test_a_first_request_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_hicache.bench.stress.run._FIRST_S", 1)
    with FakeServer() as server:
        server.fail = lambda number: "hang"
        status, said, _ = run(server.url, "--silent", "1")
    assert status == 2
    assert "was not answered within 1 s" in said


def test_no_request_goes_down_a_connection_that_the_server_may_be_closing() -> None:
    """A server that stalls past its keep-alive time closes what it gets then: to a user a lost answer."""
    body = b"{}"
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n" + body

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        writer.write(answer)
        await writer.drain()
        await reader.read(1)  # the next request, or that the client has closed
        writer.close()

    async def ask_twice() -> None:
        server = await asyncio.start_server(once, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Client(f"http://127.0.0.1:{port}") as client:
            for _ in range(2):
                with pytest.raises(RequestFailed):  # an empty answer, and not a lost one
                    await client.compute([1, 2], 3, key="k")

    asyncio.run(ask_twice())


def test_a_client_that_is_held_up_loses_no_answer() -> None:
    """The whole machine may stall. A time-out of ours would go off beside a connection that is there."""

    async def timeout() -> Any:
        async with Client("http://127.0.0.1:1") as client:
            return client._open().timeout

    found = asyncio.run(timeout())
    assert found.total is found.connect is found.sock_connect is found.sock_read is None
