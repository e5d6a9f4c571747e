"""Asks a workload of one server, and keeps what came of each request."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .workloads import Lane, Workload

if TYPE_CHECKING:
    from ..stress.client import Client


@dataclass(frozen=True)
class RequestResult:
    """One request.

    Attributes:
        lane, conversation, turn: which one.
        prompt_tokens: of the prompt.
        seen_tokens: of these, what the server had been sent or had answered before.
        output_tokens: of the answer; 0 after an error.
        device_tokens, host_tokens: prompt tokens found in the device pool, and brought back from the host.
        first_token_s, seconds: from sending to the first token, and to the last.
        gaps_s: between one token and the next.
        answer: a digest of the answer's token ids; empty after an error.
        error: what went wrong, or None.
    """

    lane: str
    conversation: int
    turn: int
    prompt_tokens: int
    seen_tokens: int
    output_tokens: int = 0
    device_tokens: int = 0
    host_tokens: int = 0
    first_token_s: float = 0.0
    seconds: float = 0.0
    gaps_s: tuple[float, ...] = ()
    answer: str = ""
    error: str | None = None

    @property
    def place(self) -> tuple[str, int, int]:
        return self.lane, self.conversation, self.turn


@dataclass(frozen=True)
class Loaded:
    """A workload, asked.

    Attributes:
        asked: every request, in the order of the answers.
        seconds: from the first request to the last answer.
        client_share: of this time the client's process was computing: near 1 the client is what was measured.
        cut: whether time was up before all had been asked.
    """

    asked: tuple[RequestResult, ...]
    seconds: float
    client_share: float
    cut: bool = False


async def ask(
    url: str, workload: Workload, *, limit_s: float, progress: Callable[[int], None] = lambda done: None
) -> Loaded:
    """Ask a server all of a workload.

    Args:
        url: of the server.
        workload: what.
        limit_s: seconds after which no answer is waited for.
        progress: called after each answer with their number so far.
    """
    # aiohttp is an extra, and saved results can be read without it.
    from ..stress.client import Client

    asked: list[RequestResult] = []

    def keep(one: RequestResult) -> None:
        asked.append(one)
        progress(len(asked))

    async with Client(url) as client:
        began, computing = time.perf_counter(), time.process_time()
        lanes = [asyncio.create_task(_lane(client, lane, keep)) for lane in workload.lanes]
        done, late = await asyncio.wait(lanes, timeout=limit_s)
        seconds = time.perf_counter() - began
        share = (time.process_time() - computing) / seconds if seconds else 0.0
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            task.result()  # an error here is ours, not the server's
    return Loaded(tuple(asked), seconds, share, cut=bool(late))


async def _lane(client: Client, lane: Lane, keep: Callable[[RequestResult], None]) -> None:
    from ..stress.client import ConnectionLost, RequestFailed

    said: list[list[int]] = [[] for _ in lane.conversations]
    free = [asyncio.Lock() for _ in lane.conversations]
    broken: set[int] = set()
    order = lane.order()

    async def worker() -> None:
        for number, turn in order:
            # A lock lets those who wait for it in by their order: turns stay in theirs.
            async with free[number]:
                if number not in broken:
                    await one(number, turn)

    async def one(number: int, turn: int) -> None:
        now = lane.conversations[number][turn]
        seen = len(said[number]) + now.seen_tokens
        said[number] += now.new_ids
        about = (lane.name, number, turn, len(said[number]), seen)
        try:
            reply = await client.generate(said[number], now.output_tokens, lambda: None)
        except (RequestFailed, ConnectionLost) as error:
            broken.add(number)  # what it would say next depends on the answer
            keep(RequestResult(*about, error=str(error)))
            return
        said[number] += reply.output_ids
        keep(
            RequestResult(
                *about,
                output_tokens=len(reply.output_ids),
                device_tokens=reply.device_tokens,
                host_tokens=reply.host_tokens,
                first_token_s=reply.first_token_s,
                seconds=reply.seconds,
                gaps_s=reply.token_gaps_s,
                answer=hashlib.blake2b(repr(reply.output_ids).encode(), digest_size=8).hexdigest(),
            )
        )

    await asyncio.gather(*(worker() for _ in range(lane.clients)))
