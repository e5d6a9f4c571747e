"""One server under load: asks a wave, judges each answer, and notices when the server hangs or is gone."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..workload import Answer
from .account import (
    DEAD,
    ERROR,
    HUNG,
    WRONG,
    Book,
    Problem,
    Tally,
    difference_in_words,
    first_difference,
    regret_in_words,
)
from .client import REFUSED, Client, ConnectionLost, Reply, RequestFailed
from .load import Conversation, Load
from .recompute import Judge, UnjudgedError
from .server import ServerFacts

_LOOK_S = 0.25
_PROBES = 3
"""Times that a server must refuse a connection, half a second apart, to count as dead."""
_HEALTH_S = 25
"""SGLang's own health check gives up after 20 s (0.5.18 to 0.5.23)."""


@dataclass(frozen=True)
class Wave:
    """What one wave gave.

    Attributes:
        number: of the wave.
        ended_s: second of load at which it ended.
        seconds: how long it took.
        request_p50_s: median time of its requests; None where none was answered.
        requests, problems, host_tokens: counts.
    """

    number: int
    ended_s: float
    seconds: float
    request_p50_s: float | None
    requests: int
    problems: int
    host_tokens: int


class LoadedServer:
    """A server, with what it was asked and what it answered.

    Args:
        client: open.
        facts: its own account before the load.
        load: what it is asked.
        book: the references.
        silent_s: seconds without a token, with requests in flight, after which it counts as hung.
        tie_nats: what rounding may make of two tokens at least; 0: every output must be the reference's.
        own_references: whether the references in ``book`` are this server's own answers.
        clock: seconds that have passed.

    Attributes:
        end: what ended the test early: the server hung or died. None while it lives.
    """

    def __init__(
        self,
        client: Client,
        facts: ServerFacts,
        load: Load,
        book: Book,
        *,
        silent_s: float,
        tie_nats: float,
        own_references: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.client = client
        self.facts = facts
        self.load = load
        self.book = book
        self.tally = Tally()
        self.waves: list[Wave] = []
        self.end: Problem | None = None
        self.tie_nats = tie_nats
        self.judge = (
            Judge(client, vocab_size=load.vocab_size, least_nats=tie_nats, on_answer=self._hear)
            if tie_nats
            else None
        )
        self._own_references = own_references
        self._silent_s = silent_s
        self._clock = clock
        self._loaded_s = 0.0
        self._wave_began: float | None = None
        self._wave_request_s: list[float] = []
        self._in_flight = 0
        self._heard = 0.0
        self._over = asyncio.Event()
        self._probing = asyncio.Lock()
        self._clients = asyncio.Semaphore(load.clients)

    def loaded_s(self) -> float:
        """Seconds under load so far."""
        since = 0.0 if self._wave_began is None else self._clock() - self._wave_began
        return self._loaded_s + since

    def silent_for_s(self) -> float:
        """Seconds since the last token, while requests are in flight."""
        return self._clock() - self._heard if self._in_flight else 0.0

    async def ask(
        self, conversations: list[Conversation], number: int, stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Ask one wave. Returns when it is answered, when ``stop`` says so, or with ``end`` set.

        Args:
            conversations: of the wave.
            number: of the wave.
            stop: whether the time is over; requests in flight are given up.
        """
        before = self._counts()
        loaded_before = self._loaded_s
        self._wave_began = self._heard = self._clock()
        self._wave_request_s.clear()
        work = asyncio.create_task(self._all_turns(conversations, stop))
        others = [asyncio.create_task(each) for each in (self._watch(), self._over.wait(), _until(stop))]
        try:
            await asyncio.wait({work, *others[1:]}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()  # an error here is ours, not the server's
            elif self.end is None:
                self.tally.unfinished += self._in_flight
        finally:
            for task in (work, *others):
                task.cancel()
            await asyncio.gather(work, *others, return_exceptions=True)
            self._loaded_s, self._wave_began = self.loaded_s(), None
        gained = [b - a for a, b in zip(before, self._counts(), strict=True)]
        median = round(statistics.median(self._wave_request_s), 6) if self._wave_request_s else None
        took = self._loaded_s - loaded_before
        self.waves.append(Wave(number, round(self._loaded_s, 3), round(took, 3), median, *gained))

    def _counts(self) -> tuple[int, int, int]:
        return self.tally.requests, self.tally.errors + self.tally.wrong, self.tally.host_tokens

    async def _all_turns(self, conversations: list[Conversation], stop: Callable[[], bool]) -> None:
        for turn in range(self.load.turns):
            await asyncio.gather(*(self._turn(each, turn, stop) for each in conversations))

    async def _turn(self, conversation: Conversation, turn: int, stop: Callable[[], bool]) -> None:
        earlier = self.book.answers(conversation.wave, conversation.number, turn)
        if earlier is None:
            return  # an earlier turn was never answered
        async with self._clients:
            if stop():
                return
            prompt = conversation.prompt(earlier)
            if not self._in_flight:
                self._heard = self._clock()
            self._in_flight += 1
            try:
                reply = await self.client.generate(prompt, self.load.output_tokens, self._hear)
                await self._judge((conversation.wave, conversation.number, turn), prompt, reply)
            except RequestFailed as error:
                self._problem(ERROR, str(error), (conversation.wave, conversation.number, turn))
            except ConnectionLost as error:
                self._problem(ERROR, str(error), (conversation.wave, conversation.number, turn))
                await self._look_whether_dead()
            finally:
                self._in_flight -= 1

    async def _judge(self, place: tuple[int, int, int], prompt: list[int], reply: Reply) -> None:
        reference = self.book.reference(place)
        self.tally.answered(reply, checked=reference is not None)
        self._wave_request_s.append(reply.seconds)
        if reference is None:
            self.book.keep(place, reply)
            self.tally.right()
            return
        position = first_difference(reply, reference)
        if position is None:
            self.tally.right()
        elif self.judge is None:
            self._problem(WRONG, difference_in_words(reply, reference, position), place)
        else:
            await self._recompute(self.judge, place, prompt, [reply, reference])

    async def _recompute(
        self, judge: Judge, place: tuple[int, int, int], prompt: list[int], differing: list[Answer]
    ) -> None:
        """Judge two answers that differ, as far as something of them was cached: that may come from the host.

        What was computed from nothing says how this server rounds, with HiCache or without.
        """
        own = differing if self._own_references else differing[:1]
        try:
            for answer in own:
                if not answer.device_tokens + answer.host_tokens:
                    continue
                regret, position = await judge.regret(prompt, answer)
                if regret > judge.allowed:
                    self._problem(WRONG, regret_in_words(answer, position, regret, judge.noise), place)
                    return
            self.tally.right(near_tie=True)
        except UnjudgedError as error:
            self.tally.unjudged(str(error))
        except ConnectionLost as error:
            self.tally.unjudged(f"the connection broke: {error}")
            await self._look_whether_dead()

    def _hear(self) -> None:
        self._heard = self._clock()

    def _problem(
        self, kind: str, what: str, place: tuple[int, int, int] | None = None, *, ago_s: float = 0.0
    ) -> Problem:
        found = Problem(kind, round(max(0.0, self.loaded_s() - ago_s), 3), what, place)
        self.tally.problem(found)
        return found

    def _ended(self, kind: str, what: str, *, ago_s: float = 0.0) -> None:
        if self.end is None:
            self.end = self._problem(kind, what, ago_s=ago_s)
            self._over.set()

    async def _look_whether_dead(self) -> None:
        async with self._probing:
            for attempt in range(_PROBES):
                if self.end is not None or await self.client.health(_HEALTH_S) != REFUSED:
                    return
                if attempt + 1 < _PROBES:
                    await asyncio.sleep(2 * _LOOK_S)
            self._ended(DEAD, f"{self.client.url} {REFUSED}")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            silent = self.silent_for_s()
            if silent < self._silent_s:
                continue
            wrong = await self.client.health(min(_HEALTH_S, self._silent_s))
            if self.silent_for_s() < self._silent_s:
                continue  # it spoke meanwhile
            state = wrong or "/health says that all is well"
            self._ended(
                HUNG,
                f"no token for {silent:.0f} s with {self._in_flight} requests in flight; {state}",
                ago_s=self.silent_for_s(),
            )


async def _until(stop: Callable[[], bool]) -> None:
    while not stop():
        await asyncio.sleep(_LOOK_S / 4)


async def is_usable(client: Client, load: Load, within_s: float) -> str | None:
    """Why a server cannot take this load at all, found with one request; None when it can."""
    conversation = load.new(0)[0]
    try:
        async with asyncio.timeout(within_s):
            await client.generate(conversation.texts[0][:8], 2, lambda: None)
    except RequestFailed as error:
        return str(error)
    except ConnectionLost:
        return f"{client.url} closed the connection of the first request"
    except TimeoutError:
        return f"the first request, of 8 tokens, was not answered within {within_s:.0f} s"
    return None
