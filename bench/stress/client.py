"""One SGLang server over HTTP: greedy answers token by token, its own account, and whether it is there."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from ..workload import Answer
from .answers import NotUnderstoodError, StreamEvent, parsed, understood

_READ_BYTES = 2**20
"""Room for one line of a stream: without ``--incremental-streaming-output`` each repeats all so far."""
_BODY_BYTES = 2**26
"""More than this is no answer: a ``/server_info`` has some 50 KB, log probabilities of 256 tokens less."""
_ERROR_BYTES = 2**16
_END_S = 60
"""Seconds from the last token until a stream must have ended. Machines stall: 14 s were seen."""

REFUSED = "refuses connections"


class RequestFailed(Exception):
    """The server answered a request with an error, or with something that is no answer."""


class ConnectionLost(Exception):
    """The connection broke, or there was none."""


@dataclass(frozen=True)
class Reply(Answer):
    """An answer with its times.

    Attributes:
        first_token_s: seconds from the request to the first token.
        seconds: seconds from the request to the end of the answer.
        token_gaps_s: seconds between one token and the next; tokens that came together share a gap evenly.
    """

    first_token_s: float
    seconds: float
    token_gaps_s: tuple[float, ...]


class Client:
    """A server at a URL, as an asynchronous context manager.

    It takes and gives token ids, so that it does not matter whether the server has a tokenizer.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        # No time-out, nor for connecting: how long a server may be silent is judged over all requests
        # together, and where this process was held up, one would go off beside a connection that was made.
        self._session = aiohttp.ClientSession(
            # A connection for each request: a server that stalls past its keep-alive time (SGLang: 5 s)
            # closes one that a request is under way on, which would count as a lost answer.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=_READ_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open().close()

    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None, "used as a context manager"
        return self._session

    async def info(self) -> Any:
        """``/server_info``, as parsed.

        Raises:
            ConnectionLost, RequestFailed
        """
        with _failures():
            timeout = aiohttp.ClientTimeout(total=60)
            async with self._open().get(f"{self.url}/server_info", timeout=timeout) as answer:
                return await _json(answer)

    async def health(self, timeout_s: float) -> str | None:
        """What is wrong according to ``/health``, in a few words; None when it says that all is well."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._open().get(f"{self.url}/health", timeout=timeout) as answer:
                return None if answer.status == 200 else f"/health answers with HTTP {answer.status}"
        except aiohttp.ClientConnectorError:
            return REFUSED
        except TimeoutError:
            return f"/health does not answer within {timeout_s:.0f} s"
        except (aiohttp.ClientError, OSError) as error:
            return f"/health: {_words(error)}"

    async def generate(
        self, input_ids: Sequence[int], output_tokens: int, on_token: Callable[[], None]
    ) -> Reply:
        """Exactly ``output_tokens`` tokens, greedily. A server that sends more is not listened to.

        Args:
            input_ids: the prompt.
            output_tokens: how many.
            on_token: called whenever tokens arrive.

        Raises:
            ConnectionLost, RequestFailed
        """
        body = {**_greedy(input_ids, output_tokens), "stream": True}
        tokens: list[int] = []
        gaps: list[float] = []
        last: StreamEvent | None = None
        began = latest = time.perf_counter()
        first = 0.0
        with _failures():
            async with self._open().post(f"{self.url}/generate", json=body) as answer:
                await _check(answer)
                async for line in answer.content:
                    event = _event(line)
                    if event is None:
                        continue
                    last = event
                    before = len(tokens)
                    tokens = _so_far(tokens, event)
                    new = len(tokens) - before
                    if len(tokens) > output_tokens:
                        raise RequestFailed(f"asked for {output_tokens} tokens and got {len(tokens)} so far")
                    if new > 0:
                        now = time.perf_counter()
                        on_token()
                        if before:
                            gaps += [(now - latest) / new] * new
                        else:
                            first = now - began
                        latest = now
                    if event.meta_info.finish_reason is not None:
                        break
                await _end_of(answer)
        finish = last.meta_info.finish_reason if last else None
        if last is None or finish is None or finish.type != "length" or len(tokens) != output_tokens:
            why = json.dumps(finish.model_dump())[:500] if finish else "missing, the stream was cut off"
            raise RequestFailed(
                f"asked for {output_tokens} tokens and got {len(tokens)}: finish_reason {why}"
            )
        return Reply(
            output_ids=tuple(tokens),
            prompt_tokens=len(input_ids),
            device_tokens=last.meta_info.cached.device,
            host_tokens=last.meta_info.cached.host,
            first_token_s=first,
            seconds=time.perf_counter() - began,
            token_gaps_s=tuple(gaps),
        )

    async def compute(
        self, input_ids: Sequence[int], output_tokens: int, *, key: str, **more: object
    ) -> StreamEvent:
        """A greedy answer at once, from a cache of its own: prefixes are shared only under the same ``key``.

        SGLang keeps the prefixes of each ``extra_key`` apart (0.5.18 to 0.5.23).

        Args:
            input_ids: the prompt.
            output_tokens: how many tokens.
            key: names the cache.
            more: other fields of the request.

        Raises:
            ConnectionLost, RequestFailed
        """
        body = {**_greedy(input_ids, output_tokens), "extra_key": key, **more}
        with _failures():
            async with self._open().post(f"{self.url}/generate", json=body) as answer:
                return understood(StreamEvent, await _json(answer))


def _greedy(input_ids: Sequence[int], output_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_new_tokens": output_tokens, "ignore_eos": True}
    return {"input_ids": list(input_ids), "sampling_params": sampling}


@contextmanager
def _failures() -> Iterator[None]:
    """Everything that a server can do wrong, as one of the two."""
    try:
        yield
    except (aiohttp.ClientError, OSError) as error:
        raise ConnectionLost(_words(error)) from error
    except NotUnderstoodError as error:
        raise RequestFailed(f"an answer that is none of SGLang's: {error}") from error
    except ValueError as error:  # aiohttp's, for lines and chunks that are too long
        raise RequestFailed(f"an answer that cannot be read: {_words(error)}") from error


async def _check(answer: aiohttp.ClientResponse) -> None:
    if answer.status != 200:
        text = (await _read(answer, _ERROR_BYTES)).decode("utf-8", "replace")
        raise RequestFailed(f"HTTP {answer.status}: {' '.join(text.split())[:500]}")


async def _json(answer: aiohttp.ClientResponse) -> Any:
    await _check(answer)
    body = await _read(answer, _BODY_BYTES)
    if len(body) >= _BODY_BYTES:
        raise RequestFailed(f"an answer of more than {_BODY_BYTES:,} bytes")
    return parsed(body)


async def _read(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """The first ``most`` bytes."""
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) >= most:
            break
    return bytes(body[:most])


async def _end_of(answer: aiohttp.ClientResponse) -> None:
    """Read a stream whose last token has come to its end, so that its connection can be used again."""
    try:
        async with asyncio.timeout(_END_S):
            async for _ in answer.content.iter_any():
                pass
    except TimeoutError:
        raise RequestFailed(f"{_END_S} s after the last token the stream had not ended") from None


def _event(line: bytes) -> StreamEvent | None:
    """What a line of a server-sent event stream carries; None for those between.

    Raises:
        RequestFailed: an error.
        NotUnderstoodError: neither an error nor tokens.
    """
    if not line.startswith(b"data:"):
        return None
    payload = line[5:].strip()
    if payload == b"[DONE]":
        return None
    event = parsed(payload)
    if isinstance(event, dict) and "error" in event:
        error = event["error"]
        said = error.get("message", error) if isinstance(error, dict) else error
        raise RequestFailed(str(said)[:500])
    return understood(StreamEvent, event)


def _so_far(tokens: list[int], event: StreamEvent) -> list[int]:
    """All tokens so far: an event repeats them, or with ``--incremental-streaming-output`` adds to them."""
    repeats = len(event.output_ids) == event.meta_info.completion_tokens
    return event.output_ids if repeats else tokens + event.output_ids


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
