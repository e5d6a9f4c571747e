"""Starts the servers of a cell, gives each its turn at each workload, and stops them all."""

from __future__ import annotations

import asyncio
import fcntl
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

from .. import serving, tiny_model
from ..demo.identity import plugin_state
from . import models, public, scrape, workloads
from .account import Answers, ArmRound, arm_round
from .arms import DEFAULT, NONE, Cell, server_args, server_env
from .load import Loaded, ask
from .result import ArmFacts, CellResult
from .workloads import Workload

Say = Callable[[str], None]
_WARM_UP_SEED = 1_000_000
_SETTLE_S = 0.5
"""After the last answer, for the scheduler to see its last writes done and count them."""
_TELL_EVERY_S = 30
_STOP_S = 5
"""Kept back from the budget, to stop servers and save."""


@dataclass(frozen=True)
class ServeOptions:
    """What is run in every cell.

    Attributes:
        arms: in the order of starting; the first of those compared is ``none`` where outputs are.
        workloads: names.
        rounds: turns of each arm at each workload.
        at_once: servers that are up together.
        logs: folder for the servers' logs.
        start_timeout_s: of one server.
        turn_timeout_s: of one turn.
        code: where other checkouts of this project are importable, by name: see `arms.OTHER_CODE`.
        enough_s: of all turns of an arm at a workload; after them it gets no further one.
        turns_lock: a file that is locked while a server is loaded, so that of several cells on one machine,
            each on a GPU of its own, one is loaded at a time; None: this is the only one.
    """

    arms: Sequence[str]
    workloads: Sequence[str]
    rounds: int = 2
    at_once: int = 8
    logs: Path = Path("logs")
    start_timeout_s: float = 400
    turn_timeout_s: float = 300
    turns_lock: Path | None = None
    enough_s: float = float("inf")
    code: Mapping[str, Path] = field(default_factory=dict)


class Budget:
    """Seconds that are left of a budget."""

    def __init__(self, budget_s: float | None) -> None:
        self._until = None if budget_s is None else time.monotonic() + budget_s - _STOP_S

    def left_s(self) -> float:
        return float("inf") if self._until is None else self._until - time.monotonic()


@dataclass
class _Up:
    """A server that is up."""

    arm: str
    server: serving.ServerProcess
    turns: list[ArmRound] = field(default_factory=list)


def groups(arms: Sequence[str], at_once: int) -> Iterator[list[str]]:
    """Arms whose servers are up together."""
    for first in range(0, len(arms), at_once):
        yield list(arms[first : first + at_once])


def order(arms: Sequence[str], number: int, first: Sequence[str] = ()) -> list[str]:
    """Whose turn comes when in round ``number``: there and back, so that what drifts hits all alike.

    Args:
        arms: all.
        number: of the round.
        first: arms that others are compared with, which come before them in every round.
    """
    others = [arm for arm in arms if arm not in first]
    turned = others if number % 2 == 0 else others[::-1]
    return [*(arm for arm in first if arm in arms), *turned]


def run_cell(
    cell: Cell, given: ServeOptions, budget: Budget, say: Say, save: Callable[[CellResult], None]
) -> CellResult:
    """Run a cell as far as the time allows; what went wrong stands in the result.

    Args:
        cell: what all its servers have in common.
        given: what to run.
        budget: the time that is left.
        say: told what happens.
        save: called after each turn, with what there is so far.
    """
    result = CellResult.of(cell)
    wanted = []
    for name in given.workloads:
        why = public.missing(cell.model.path, public.public(name).turns) if name in public.NAMES else None
        if why is None:
            wanted.append(name)
        else:
            result.skipped.append(f"{name}, all arms: SGLang's own benchmark cannot run: {why}")
            say(f"{cell.name}: {result.skipped[-1]}")
    given = replace(given, workloads=wanted)
    cell = replace(cell, tokenizer=any(name in public.NAMES for name in wanted))
    makers = {name: workloads.maker(name) for name in wanted if name not in public.NAMES}
    made = {
        (name, number): make(cell.pool_tokens, cell.model.vocab_size, number)
        for name, make in makers.items()
        for number in range(given.rounds)
    }
    for name in makers:
        result.workloads[name] = made[name, 0].shape()
    for name in wanted:
        if name in public.NAMES:
            what = public.public(name)
            result.workloads[name] = {"says": what.says, "args": what.args(cell.pool_tokens, 0)}
    references: dict[tuple[str, int, str], Answers] = {}
    for together in groups(given.arms, given.at_once):
        with ExitStack() as stack:
            up = _start(cell, together, given, budget, say, result, stack)
            save(result)
            if up:
                _load_group(cell, up, made, given, budget, say, save, result, references)
            for each in up:
                each.server.resume()
                _last_words(each, result)
            say(f"{cell.name}: stopping {', '.join(each.arm for each in up) or 'nothing'}")
        save(result)
    return result


def _start(
    cell: Cell,
    arms: Sequence[str],
    given: ServeOptions,
    budget: Budget,
    say: Say,
    result: CellResult,
    stack: ExitStack,
) -> list[_Up]:
    """Start the servers of these arms at the same time; those that did not come up are in the result."""
    where: dict[str, tuple[str, float]] = {}
    lock = threading.Lock()

    def start(arm: str) -> serving.ServerProcess:
        args = server_args(cell, arm)
        result.arms[arm] = ArmFacts(args=args)
        third_party = given.logs / "third-party" / arm
        env = {**_engine_env(cell, given.logs), **server_env(arm, third_party, given.code)}

        def progress(what: str, seconds: float) -> None:
            with lock:
                told = where.get(arm, ("", 0.0))
                news = told[0] != what or seconds - told[1] >= _TELL_EVERY_S
                if news:
                    where[arm] = what, seconds
            if news:
                say(f"{cell.name}: {arm}: {what}, {seconds:.0f} s")

        return serving.ServerProcess(
            args,
            log=given.logs / f"{cell.name}-{arm}.log",
            env=env,
            start_timeout_s=max(1.0, min(given.start_timeout_s, budget.left_s())),
            progress=progress,
        ).__enter__()

    up = []
    with ThreadPoolExecutor(max(1, len(arms))) as pool:
        starting = {arm: pool.submit(start, arm) for arm in arms}
        for arm, future in starting.items():
            try:
                server = future.result()
            except (serving.ServerError, OSError) as error:
                result.arms.setdefault(arm, ArmFacts()).problem = str(error)
                say(f"{cell.name}: {arm} did not start: {error}")
                continue
            stack.callback(server.close)
            result.arms[arm].start_s = round(server.start_s, 1)
            say(f"{cell.name}: {arm} is up after {server.start_s:.0f} s")
            up.append(_Up(arm, server))
    return up


def _engine_env(cell: Cell, logs: Path) -> dict[str, str]:
    if not cell.cpu_engine:
        return {}
    # Its variables leave out every other architecture.
    tiny = tiny_model.environment() if cell.model.name == models.TINY else {}
    return {**serving.cpu_engine_env(logs / "libcuda"), **tiny}


def _load_group(
    cell: Cell,
    up: Sequence[_Up],
    made: Mapping[tuple[str, int], Workload],
    given: ServeOptions,
    budget: Budget,
    say: Say,
    save: Callable[[CellResult], None],
    result: CellResult,
    references: dict[tuple[str, int, str], Answers],
) -> None:
    by_arm = {each.arm: each for each in up}
    servers = [each.server for each in up]
    for server in servers:
        server.pause()
    with _alone(given.turns_lock), _awake(*servers):
        say(f"{cell.name}: warming up")
        problems = asyncio.run(_warm_up(cell, up, given, budget))
        for each, problem in zip(up, problems, strict=True):
            if problem is not None:
                result.arms[each.arm].problem = f"warming up: {problem}"
                say(f"{cell.name}: {each.arm}: {result.arms[each.arm].problem}")
        for each in up:
            try:
                freeze_gc(each.server)
            except serving.ServerError as error:
                result.arms[each.arm].problem = result.arms[each.arm].problem or str(error)
                say(f"{cell.name}: {each.arm}: {error}")
    first = (NONE, DEFAULT) if cell.exact() else ()
    took: dict[tuple[str, str], float] = {}
    spent: dict[tuple[str, str], float] = {}
    for number in range(given.rounds):
        if budget.left_s() <= 0:
            result.skipped.append(f"all arms, from round {number} on: no time left")
            say(f"{cell.name}: {result.skipped[-1]}")
            break
        tried = False
        for name in given.workloads:
            for arm in order(list(by_arm), number, first):
                if spent.get((name, arm), 0.0) > given.enough_s:
                    continue
                left = budget.left_s()
                if left < 1.2 * took.get((name, arm), 1.0):
                    result.skipped.append(f"{name}, {arm}, round {number}: no time left")
                    say(f"{cell.name}: {result.skipped[-1]}")
                    continue
                server = by_arm[arm].server
                tried = True
                try:
                    limit = max(1.0, min(given.turn_timeout_s, left))
                    asking = _asking(cell, name, number, server, made, limit)
                    known = [references.get((name, number, of)) for of in (NONE, DEFAULT)]
                    with _alone(given.turns_lock), _awake(server):
                        turn, answers = _turn(name, arm, number, server, asking, *known)
                except (OSError, HTTPException, serving.ServerError) as error:
                    result.skipped.append(f"{name}, {arm}, round {number}: {error}")
                    say(f"{cell.name}: {result.skipped[-1]}")
                    continue
                took[name, arm] = turn.seconds + _SETTLE_S
                spent[name, arm] = spent.get((name, arm), 0.0) + turn.seconds
                if arm in first and name not in public.NAMES and not turn.errors and not turn.cut:
                    references[name, number, arm] = answers
                result.turns.append(turn)
                say(f"{cell.name}: {_line(turn)}")
                save(result)
        # Nor in a later round: each arm has had enough, or less time is left than a turn takes.
        if not tried:
            break


@contextmanager
def _alone(lock: Path | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


@contextmanager
def _awake(*servers: serving.ServerProcess) -> Iterator[None]:
    """Inside, of the servers that are up these alone run: others would take CPUs from them."""
    for server in servers:
        server.resume()
    try:
        yield
    finally:
        for server in servers:
            server.pause()


async def _warm_up(cell: Cell, up: Sequence[_Up], given: ServeOptions, budget: Budget) -> list[str | None]:
    """Of each server, what went wrong."""
    # Where only answers count, or code is exercised, a few requests are enough.
    tokens = 0 if cell.cpu_engine or cell.deterministic else int(cell.pool_tokens * cell.ratio)
    limit = min(given.turn_timeout_s, budget.left_s())

    async def one(each: _Up) -> str | None:
        # SGLang's own benchmark has no small form: chats fill the pools for it too.
        for name in [name for name in given.workloads if name not in public.NAMES] or ["chat"]:
            whole = workloads.maker(name)(cell.pool_tokens, cell.model.vocab_size, _WARM_UP_SEED)
            loaded = await ask(each.server.url, workloads.warm_up(whole, tokens), limit_s=limit)
            errors = [one.error for one in loaded.asked if one.error is not None]
            if errors or loaded.cut:
                return errors[0] if errors else f"no answer within {limit:.0f} s"
        return None

    return await asyncio.gather(*(one(each) for each in up))


def _asking(
    cell: Cell,
    name: str,
    number: int,
    server: serving.ServerProcess,
    made: Mapping[tuple[str, int], Workload],
    limit_s: float,
) -> Callable[[], Loaded]:
    """What asks one turn of a workload."""
    if name in public.NAMES:
        what = public.public(name)
        return lambda: public.run(server.url, cell.model.path, what, cell.pool_tokens, number, limit_s)
    return lambda: asyncio.run(ask(server.url, made[name, number], limit_s=limit_s))


def _turn(
    name: str,
    arm: str,
    number: int,
    server: serving.ServerProcess,
    asking: Callable[[], Loaded],
    reference: Answers | None,
    default: Answers | None,
) -> tuple[ArmRound, Answers]:
    flush(server)
    before = scrape.look(server.url)
    loaded = asking()
    time.sleep(_SETTLE_S)
    after = scrape.look(server.url)
    turn = arm_round(name, arm, number, loaded, scrape.between(before, after), reference, default)
    return turn, {one.place: one for one in loaded.asked if one.error is None}


def flush(server: serving.ServerProcess) -> None:
    """Empty both tiers: every turn begins alike.

    Raises:
        ServerError: the server would not.
        OSError, HTTPException: there is no answer.
    """
    _post(server, "/flush_cache?timeout=20")


def freeze_gc(server: serving.ServerProcess) -> None:
    """Have Python's collector leave alone all that is there after the warm-up.

    SGLang 0.5.23 asks this of itself when it is up, before its own port is sure to be open: on some starts
    it fails (``post-warmup freeze_gc failed`` in the log), and servers under the same load would differ.

    Raises:
        ServerError: the server would not, or there is no answer.
    """
    try:
        _post(server, "/freeze_gc")
    except (OSError, HTTPException) as error:
        raise server.error("POST /freeze_gc", str(error)) from error


def _post(server: serving.ServerProcess, path: str) -> None:
    try:
        with serving.open_url(server.url + path, method="POST", timeout_s=60) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")[:300]
        raise server.error(f"POST {path.partition('?')[0]}", f"HTTP {error.code}: {text}") from error


def _last_words(each: _Up, result: CellResult) -> None:
    facts = result.arms[each.arm]
    try:
        info: dict[str, Any] = each.server.info()
    except serving.ServerError as error:
        facts.problem = facts.problem or str(error)
        return
    facts.about(info, plugin_state(info))


def _line(turn: ArmRound) -> str:
    ttft, itl = turn.first_token_s.percent(50), turn.between_tokens_s.percent(99)
    words = [
        f"{turn.workload}, round {turn.round}, {turn.arm}: {turn.requests} requests in {turn.seconds:.1f} s",
        f"{turn.requests / turn.seconds:.1f} req/s" if turn.seconds else "",
        "" if ttft is None else f"TTFT p50 {ttft * 1e3:.0f} ms",
        "" if itl is None else f"ITL p99 {itl * 1e3:.1f} ms",
        f"{turn.host_tokens:,} tokens from host",
        f"{turn.errors} errors ({turn.first_error})" if turn.errors else "",
        "cut: time was up" if turn.cut else "",
        "" if turn.compared is None else f"{turn.same} of {turn.compared} as without HiCache",
        "" if turn.as_default is None else f"{turn.as_default} of {turn.default_compared} as {DEFAULT}",
    ]
    return ", ".join(word for word in words if word)
