"""A whole stress test: one server or two, waves until the time is up."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from .account import Book
from .client import Client, ConnectionLost, RequestFailed
from .load import Load, sized_for
from .loaded_server import LoadedServer, is_usable
from .server import ServerFacts

_REFERENCE_SILENT_S = 600
"""The reference server is no suspect; this is only so that the test ends."""


_FIRST_S = 60
"""A server that has just started may compile kernels for its first request."""


class UnusableError(Exception):
    """A server that was named cannot be used: the message says which and why, in one line."""


@dataclass(frozen=True)
class Limits:
    """When to stop, and when a server counts as hung.

    Attributes:
        duration_s: seconds of load on each server, the reference server included; None for no limit.
        waves: how many; None for no limit.
        silent_s: see `LoadedServer`.
        tie_nats: see `LoadedServer`; None leaves it to what the server says of itself.
    """

    duration_s: float | None
    waves: int | None
    silent_s: float
    tie_nats: float | None = None


@dataclass
class Outcome:
    """What came out.

    Attributes:
        load: what was asked.
        sides: one for each server, the one under test first.
        ends: each server's account after the load; None where it gave none any more.
        interrupted: by Ctrl-C.
        reference: the reference server's account, if there was one.
        reference_problem: why the test had to stop for want of references, or None.
        finished: False while there is more to ask, and for ever if the process was ended then.
    """

    load: Load
    sides: Sequence[LoadedServer]
    ends: list[ServerFacts | None] = field(default_factory=list)
    interrupted: bool = False
    reference: ServerFacts | None = None
    reference_problem: str | None = None
    finished: bool = False


LoadProgress = Callable[[Sequence[LoadedServer]], None]


async def stress(
    urls: Sequence[str],
    reference: str | None,
    limits: Limits,
    sizes: dict[str, Any],
    progress: LoadProgress,
    keep: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Run it.

    Args:
        urls: the server under test, and perhaps another one: they take turns, wave by wave, so that neither
            is measured while the other works.
        reference: URL of a server whose answers are the references, or None: then each server's first ones.
        limits: when to stop.
        sizes: arguments of `sized_for`, except the server's own.
        progress: called about four times a second.
        keep: called after each wave with what there is so far. Whoever ends this process may not wait.

    Raises:
        UnusableError: a server is not there, is none of SGLang's, or cannot take the load.
    """
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(url)) for url in urls]
        facts = [await _facts(client) for client in clients]
        oracle = await stack.enter_async_context(Client(reference)) if reference else None
        oracle_facts = await _facts(oracle) if oracle else None
        load = _load([*facts, *([oracle_facts] if oracle_facts else [])], facts[0].pool_tokens, sizes)
        for client in [*clients, *([oracle] if oracle else [])]:
            problem = await is_usable(client, load, max(limits.silent_s, _FIRST_S))
            if problem is not None:
                raise UnusableError(f"{client.url} cannot take this load: {problem}")
        shared = Book()
        sides = [
            LoadedServer(
                client,
                about,
                load,
                shared if oracle else Book(),
                silent_s=limits.silent_s,
                tie_nats=about.tie_nats() if limits.tie_nats is None else limits.tie_nats,
                own_references=oracle is None,
            )
            for client, about in zip(clients, facts, strict=True)
        ]
        asked = None
        if oracle is not None and oracle_facts is not None:
            asked = LoadedServer(oracle, oracle_facts, load, shared, silent_s=_REFERENCE_SILENT_S, tie_nats=0)
        outcome = Outcome(load, sides, reference=oracle_facts)
        stop = _on_interrupt(outcome)
        painter = asyncio.create_task(_paint(lambda: progress(sides)))
        try:
            await _waves(outcome, asked, limits, stop, keep)
        finally:
            painter.cancel()
            await asyncio.gather(painter, return_exceptions=True)
        progress(sides)
        outcome.ends = [await _facts_if_there(side) for side in sides]
        outcome.finished = True
        return outcome


async def _waves(
    outcome: Outcome,
    asked: LoadedServer | None,
    limits: Limits,
    stop: Callable[[], bool],
    keep: Callable[[Outcome], None],
) -> None:
    load, sides = outcome.load, outcome.sides
    number = 0
    while limits.waves is None or number < limits.waves:
        if asked is not None:
            await asked.ask(load.new(number), number, _stop_for(asked, limits, stop))
            if asked.tally.first_problem is not None:
                outcome.reference_problem = f"the reference server failed: {asked.tally.first_problem}"
                return
            if stop() or _time_is_up(asked, limits):
                return  # it may not have given all references of this wave
        # Now one first and now the other: whatever drifts meanwhile hits both alike.
        for side in sides if number % 2 == 0 else reversed(sides):
            if side.end is None and not stop() and not _time_is_up(side, limits):
                await side.ask(load.wave(number), number, _stop_for(side, limits, stop))
        for side in sides:
            side.book.forget_before(number)
        if stop() or all(side.end is not None or _time_is_up(side, limits) for side in sides):
            return
        outcome.ends = [await _facts_if_there(side) for side in sides]
        keep(outcome)
        number += 1


def _stop_for(side: LoadedServer, limits: Limits, stop: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: stop() or _time_is_up(side, limits)


def _time_is_up(side: LoadedServer, limits: Limits) -> bool:
    return limits.duration_s is not None and side.loaded_s() >= limits.duration_s


def _load(facts: Sequence[ServerFacts], pool_tokens: int, sizes: dict[str, Any]) -> Load:
    contexts = [each.context_tokens for each in facts if each.context_tokens]
    pools = [each.pool_tokens for each in facts]
    try:
        return sized_for(pool_tokens, context_tokens=min([*contexts, *pools]), **sizes)
    except ValueError as error:
        raise UnusableError(str(error)) from None


async def _facts(client: Client) -> ServerFacts:
    try:
        return ServerFacts.of(await client.info())
    except ConnectionLost as error:
        raise UnusableError(f"no server answers at {client.url}: {error}") from None
    except (RequestFailed, ValueError) as error:
        raise UnusableError(f"{client.url} is no SGLang server that can be used: {error}") from None


async def _facts_if_there(side: LoadedServer) -> ServerFacts | None:
    if side.end is not None:
        return None  # it would be waited for in vain
    try:
        return await _facts(side.client)
    except UnusableError:
        return None


def _on_interrupt(outcome: Outcome) -> Callable[[], bool]:
    """Ctrl-C ends the load and keeps what was measured."""

    def interrupt() -> None:
        outcome.interrupted = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    return lambda: outcome.interrupted


async def _paint(show: Callable[[], None]) -> None:
    while True:
        show()
        await asyncio.sleep(0.25)
