"""One SGLang server over HTTP: greedy answers token by token, its own account, and whether it is there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from sglang_hicache.bench.workload import Answer

_CONNECT_S = 10
_READ_BYTES = 2**20
"""Room for one line of a stream: without ``--incremental-streaming-output`` each repeats all so far."""

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
        # No total time-out: how long a server may be silent is judged over all requests together.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            read_bufsize=_READ_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open().close()

    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None, "used as a context manager"
        return self._session

    async def info(self) -> dict[str, Any]:
        """``/server_info``.

        Raises:
            ConnectionLost, RequestFailed
        """
        answer: dict[str, Any] = await self._get("/server_info", timeout_s=60)
        return answer

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
        except aiohttp.ClientError as error:
            return f"/health: {_words(error)}"

    async def generate(
        self, input_ids: Sequence[int], output_tokens: int, on_token: Callable[[], None]
    ) -> Reply:
        """Exactly ``output_tokens`` tokens, greedily.

        Args:
            input_ids: the prompt.
            output_tokens: how many.
            on_token: called whenever tokens arrive.

        Raises:
            ConnectionLost, RequestFailed
        """
        sampling = {"temperature": 0.0, "max_new_tokens": output_tokens, "ignore_eos": True}
        body = {"input_ids": list(input_ids), "sampling_params": sampling, "stream": True}
        tokens: list[int] = []
        gaps: list[float] = []
        meta: dict[str, Any] = {}
        began = latest = time.perf_counter()
        first = 0.0
        try:
            async with self._open().post(f"{self.url}/generate", json=body) as answer:
                await _check(answer)
                async for line in answer.content:
                    event = _event(line)
                    if event is None:
                        continue
                    now = time.perf_counter()
                    meta = event["meta_info"]
                    before = len(tokens)
                    tokens = _so_far(tokens, event["output_ids"], int(meta["completion_tokens"]))
                    new = len(tokens) - before
                    if new <= 0:
                        continue
                    on_token()
                    if before:
                        gaps += [(now - latest) / new] * new
                    else:
                        first = now - began
                    latest = now
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(_words(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise RequestFailed(f"an answer that is none of SGLang's: {_words(error)}") from error
        finish = meta.get("finish_reason") or {}
        if finish.get("type") != "length" or len(tokens) != output_tokens:
            raise RequestFailed(
                f"asked for {output_tokens} tokens and got {len(tokens)}: finish_reason "
                f"{json.dumps(finish) if finish else 'missing, the stream was cut off'}"
            )
        cached = meta.get("cached_tokens_details") or {}
        return Reply(
            output_ids=tuple(tokens),
            prompt_tokens=len(input_ids),
            device_tokens=int(cached.get("device", 0)),
            host_tokens=int(cached.get("host", 0)),
            first_token_s=first,
            seconds=time.perf_counter() - began,
            token_gaps_s=tuple(gaps),
        )

    async def two_best(self, input_ids: Sequence[int]) -> tuple[tuple[int, float], tuple[int, float]]:
        """The two likeliest next tokens, each with its log probability in nats, the likelier first.

        Raises:
            ConnectionLost, RequestFailed
        """
        body = {
            "input_ids": list(input_ids),
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True},
            "return_logprob": True,
            "top_logprobs_num": 2,
        }
        try:
            async with self._open().post(f"{self.url}/generate", json=body) as answer:
                await _check(answer)
                (best, second), *_ = (await answer.json())["meta_info"]["output_top_logprobs"]
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(_words(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise RequestFailed(f"no log probabilities: {_words(error)}") from error
        return (int(best[1]), float(best[0])), (int(second[1]), float(second[0]))

    async def _get(self, path: str, *, timeout_s: float) -> Any:
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            async with self._open().get(self.url + path, timeout=timeout) as answer:
                await _check(answer)
                return await answer.json()
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(_words(error)) from error
        except ValueError as error:
            raise RequestFailed(f"{path} is no JSON: {error}") from error


async def _check(answer: aiohttp.ClientResponse) -> None:
    if answer.status != 200:
        text = " ".join((await answer.text()).split())
        raise RequestFailed(f"HTTP {answer.status}: {text[:500]}")


def _event(line: bytes) -> dict[str, Any] | None:
    """What a line of a server-sent event stream carries; None for those between.

    Raises:
        RequestFailed: an error.
    """
    if not line.startswith(b"data:"):
        return None
    payload = line[5:].strip()
    if payload == b"[DONE]":
        return None
    event: dict[str, Any] = json.loads(payload)
    if "error" in event:
        raise RequestFailed(str(event["error"].get("message", event["error"])))
    return event


def _so_far(tokens: list[int], event_ids: list[int], completion_tokens: int) -> list[int]:
    """All tokens so far: an event repeats them, or with ``--incremental-streaming-output`` adds to them."""
    return list(event_ids) if len(event_ids) == completion_tokens else tokens + list(event_ids)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
