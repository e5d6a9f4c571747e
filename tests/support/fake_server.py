"""A server that answers like SGLang's, as far as ``hicache-io stress`` asks, and fails as it is told to."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from aiohttp import web

from sglang_hicache.bench import serving

VOCAB = 512

# Told the prompt and how often it was asked before: the tokens of the answer.
Model = Callable[[list[int], int, int], list[int]]


def right(prompt: list[int], count: int, asked_before: int) -> list[int]:
    """A function of the prompt alone."""
    digest = hashlib.sha256(json.dumps(prompt).encode()).digest()
    return [(digest[i % 32] + i) % VOCAB for i in range(count)]


class FakeServer:
    """Runs in a thread of its own, as a context manager.

    Attributes:
        model: what it answers.
        fail: told the number of a request from 0; "error", "abort", "cut", "hang", "more" (tokens than asked
            for), "on and on" (after the last token) or "slow" instead of an answer, or the bytes of one.
        gap: nats by which any other token than ``right``'s is less likely.
        rounding: nats by which that differs between two computations, at most.
        recomputed: what it answers to a request with a key of its own.
        raw_computed: the same as bytes.
        keeps_keys_apart: whether prefixes are found only under the request's ``extra_key``.
        tells: whether it gives log probabilities.
        info: of ``/server_info``; bytes are sent as they are.
        requests, computed: how many requests came without a key of their own, and with one.
        most_at_once: requests that were in flight together, at most.
        prompts: what was asked, in the order of arrival.
        metrics: text of ``/metrics/``.
        flushed: how often ``/flush_cache`` was asked for, which answers with ``flush_status``.
        frozen: how often ``/freeze_gc`` was.
    """

    def __init__(self, model: Model = right, **info: Any) -> None:
        self.model = model
        self.fail: Callable[[int], str | bytes | None] = lambda number: None
        self.gap = 5.0
        self.rounding = 0.0
        self.recomputed: Model = right
        self.keeps_keys_apart = self.tells = True
        self.raw_computed: bytes | None = None
        self.computed = 0
        self.incremental = False
        self.error = "out of memory"
        self.most_at_once = 0
        self.requests = 0
        self.prompts: list[list[int]] = []
        self.host_tokens, self.device_tokens = 5, 3
        self.flushed = 0
        self.frozen = 0
        self.flush_status = 200
        self.metrics: Callable[[], str] = lambda: ""
        self.info: dict[str, Any] | bytes = {
            "version": "0.5.23",
            "max_total_num_tokens": 1024,
            "device": "cuda",
            "enable_deterministic_inference": True,
            "enable_hierarchical_cache": True,
            "internal_states": [{}],
            **info,
        }
        self.url = f"http://127.0.0.1:{serving.free_port()}"
        self._asked: Counter[tuple[int, ...]] = Counter()
        self._cached: dict[str, int] = {}
        self._random = random.Random(0)
        self._at_once = 0
        self._hanging = False
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def close(self) -> None:
        """Refuse connections from now on, and cut those that there are."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            asyncio.run_coroutine_threadsafe(runner.cleanup(), self._loop).result(10)

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/health", self._health)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/flush_cache", self._flush_cache)
        app.router.add_post("/freeze_gc", self._freeze_gc)
        app.router.add_get("/metrics/", self._metrics)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", int(self.url.rpartition(":")[2])).start()

    async def _server_info(self, request: web.Request) -> web.Response:
        if isinstance(self.info, bytes):
            return web.Response(body=self.info, content_type="application/json")
        return web.json_response(self.info)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self._hanging else 200)

    async def _flush_cache(self, request: web.Request) -> web.Response:
        self.flushed += 1
        return web.Response(status=self.flush_status, text="requests are running")

    async def _freeze_gc(self, request: web.Request) -> web.Response:
        self.frozen += 1
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics())

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return await self._answer(request, await request.json())
        finally:
            self._at_once -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        prompt, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        assert all(0 <= token < VOCAB for token in prompt)
        if "extra_key" in body:
            if self.raw_computed is not None:
                return web.Response(body=self.raw_computed, content_type="application/json")
            return web.json_response(self._compute(prompt, count, body))
        self.prompts.append(prompt)
        failure = self.fail(self.requests)
        self.requests += 1
        if failure == "error":
            return web.Response(status=500, text=self.error)
        if isinstance(failure, bytes):
            return web.Response(body=failure, content_type="text/event-stream")
        if failure == "hang":
            self._hanging = True
            await asyncio.sleep(3600)
        if failure == "more":
            count *= 1000
        tokens = self.model(prompt, count, self._asked[tuple(prompt)])
        self._asked[tuple(prompt)] += 1
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for done in range(1, count + 1):
            if failure == "cut" and done == 2:
                assert request.transport is not None
                request.transport.abort()
                return stream
            reason = {"type": "abort" if failure == "abort" else "length"} if done == count else None
            event = {
                "output_ids": tokens[done - 1 : done] if self.incremental else tokens[:done],
                "meta_info": {
                    "completion_tokens": done,
                    "finish_reason": reason,
                    "cached_tokens_details": {"device": self.device_tokens, "host": self.host_tokens},
                },
            }
            await stream.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(
                0.2 if failure in ("slow", "more") else 0
            )  # others may be answered in between
        while failure == "on and on":
            await stream.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(0.05)
        await stream.write(b"data: [DONE]\n\n")
        return stream

    def _compute(self, prompt: list[int], count: int, body: dict[str, Any]) -> dict[str, Any]:
        """An answer under a key of its own."""
        asked_before, self.computed = self.computed, self.computed + 1
        cached = self._cached.get(body["extra_key"], 0) if self.keeps_keys_apart else 5
        self._cached[body["extra_key"]] = len(prompt)
        tokens = self.recomputed(prompt, count, asked_before)
        meta: dict[str, Any] = {
            "completion_tokens": count,
            "finish_reason": {"type": "length"},
            "cached_tokens": cached,
            "cached_tokens_details": {"device": cached, "host": 0} if cached else None,
        }
        start = body.get("logprob_start_len", -1) + 1
        if self.tells and body.get("return_logprob"):
            meta["output_top_logprobs"] = [top for _, top in self._log_probs(prompt, tokens)]
        if self.tells and start > 0:
            said = self._log_probs(prompt[:start], prompt[start:])
            meta["input_token_logprobs"] = [[None, prompt[start - 1], None], *(chosen for chosen, _ in said)]
            meta["input_top_logprobs"] = [None, *(top for _, top in said)]
        return {"output_ids": tokens, "meta_info": meta}

    def _log_probs(self, prompt: list[int], output: Sequence[int]) -> list[tuple[list[Any], list[list[Any]]]]:
        """Of each token of an answer, and of the two likeliest ones there."""
        found = []
        for best, given in zip(right(prompt, len(output), 0), output, strict=True):
            gap = self.gap + self._random.uniform(-self.rounding, self.rounding)
            second = given if given != best else best ^ 1
            top = [[-0.5, best, None], [-0.5 - gap, second, None]]
            found.append((top[given != best], sorted(top, reverse=True)))
        return found
