"""What happens to a scheduler, as plain data: requests that share prefixes, aborts, resets of the cache."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

from .scheduler import VOCABULARY, Scheduler

CONVERSATIONS = 3


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request: a conversation's last turn, cut to ``keep`` of 8 parts, and new tokens.

    Attributes:
        conversation: which one.
        keep: how much of what was said is asked again, in eighths.
        fresh: new tokens.
        output: tokens to generate.
    """

    conversation: int
    keep: int
    fresh: int
    output: int


@dataclass(frozen=True, slots=True)
class RunRounds:
    """Rounds of the scheduler's loop."""

    rounds: int


@dataclass(frozen=True, slots=True)
class Abort:
    """The nth request that there is."""

    nth: int


@dataclass(frozen=True, slots=True)
class Flush:
    """Run until nothing is left to do, then reset the cache."""


Action = NewRequest | RunRounds | Abort | Flush

_NAMES: dict[str, type[Any]] = {"ask": NewRequest, "step": RunRounds, "abort": Abort, "flush": Flush}


def to_text(actions: Iterable[Action]) -> str:
    """As one types it: ``ask:0,0,20,3 step:2 abort:1 flush``, the numbers in the order of the attributes."""
    names = {kind: name for name, kind in _NAMES.items()}
    words = []
    for action in actions:
        numbers = ",".join(str(getattr(action, each.name)) for each in fields(action))
        words.append(names[type(action)] + (f":{numbers}" if numbers else ""))
    return " ".join(words)


def from_text(text: str) -> list[Action]:
    """The inverse of :func:`to_text`.

    Raises:
        ValueError: a word is not an action, or its numbers are not what it takes.
    """
    actions: list[Action] = []
    for word in text.split():
        name, _, given = word.partition(":")
        kind = _NAMES.get(name)
        numbers = given.split(",") if given else []
        if kind is None or len(numbers) != len(fields(kind)) or not all(each.isdigit() for each in numbers):
            takes = "; ".join(
                ":".join(filter(None, (known, ",".join(each.name for each in fields(kind)))))
                for known, kind in _NAMES.items()
            )
            raise ValueError(f"'{word}' is not an action of a program ({takes})")
        actions.append(kind(*map(int, numbers)))
    return actions


def program(seed: int, unit: int, actions: int = 12) -> list[Action]:
    """A random sequence of actions.

    Args:
        seed: of the sequence.
        unit: tokens that lengths are multiples of, more or less: a page, or 4.
    """
    rng = random.Random(seed)
    made: list[Action] = []
    for _ in range(actions):
        kind = rng.choices(("ask", "step", "abort", "flush"), (12, 12, 1, 0.5))[0]
        if kind == "ask":
            fresh = rng.randint(1, 5) * unit + rng.choice((0, 0, 1, -1))
            keep = rng.choice((0, 4, 7, 8, 8))
            made.append(NewRequest(rng.randrange(CONVERSATIONS), keep, fresh, rng.randint(1, unit + 2)))
        elif kind == "step":
            made.append(RunRounds(rng.choice((1, 1, 2, 8))))
        elif kind == "abort":
            made.append(Abort(rng.randrange(8)))
        else:
            made.append(Flush())
    return made


class Player:
    """Plays actions on a scheduler.

    Args:
        longest: tokens of the longest prompt with its output: it must fit the device pool.
    """

    def __init__(self, scheduler: Scheduler, longest: int, fresh_tokens: Iterator[int]) -> None:
        self._scheduler = scheduler
        self._longest = longest
        self._fresh = fresh_tokens
        self._numbers = count()
        self._last: dict[int, str] = {}

    def play(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, NewRequest):
                self._ask(action)
            elif isinstance(action, RunRounds):
                for _ in range(action.rounds):
                    self._scheduler.step()
            elif isinstance(action, Abort):
                self._scheduler.abort(action.nth)
            else:
                self.drain()
                self._scheduler.flush_cache()
        self.drain()

    def drain(self) -> None:
        """Rounds until every request is done."""
        for _ in range(10_000):
            if self._scheduler.idle:
                return
            self._scheduler.step()
        raise RuntimeError("the modelled scheduler makes no progress")

    def _ask(self, action: NewRequest) -> None:
        before = self._last.get(action.conversation)
        said = self._scheduler.tokens_of(before) if before is not None else []
        fresh = max(1, min(action.fresh, self._longest - action.output - 1))
        kept = min(len(said) * action.keep // 8, self._longest - fresh - action.output)
        name = f"request {next(self._numbers)}"
        tokens = [*said[: max(0, kept)], *(next(self._fresh) % VOCABULARY for _ in range(fresh))]
        self._scheduler.add(name, tokens, action.output)
        self._last[action.conversation] = name
