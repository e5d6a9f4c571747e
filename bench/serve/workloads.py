"""What the servers are asked. Pure: a workload is drawn from a seed and sized by the device pool.

Every arm gets the same prompts in the same order. What a workload needs of the device pool is more than it
has, so that prefixes are written back, evicted and read again; the sizes below are those of a pool of 65,536
tokens and grow and shrink with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...policy.names import check_name


@dataclass(frozen=True)
class Turn:
    """A request: what is said now, after all that was said and answered before.

    Attributes:
        new_ids: token ids added to the conversation.
        output_tokens: tokens of the answer.
        seen_tokens: tokens at the start of ``new_ids`` that another conversation has sent before.
    """

    new_ids: Sequence[int]
    output_tokens: int
    seen_tokens: int = 0


@dataclass(frozen=True)
class Lane:
    """Conversations that share a number of clients.

    Attributes:
        name: of the lane.
        conversations: their turns.
        clients: requests in flight at once; a conversation has one at a time.
    """

    name: str
    conversations: Sequence[Sequence[Turn]]
    clients: int

    def order(self) -> Iterator[tuple[int, int]]:
        """Conversation and turn of each request, in the order of sending.

        The same turn of all before the next turn of any, so that each has time to be evicted.
        """
        turns = max(map(len, self.conversations), default=0)
        for turn in range(turns):
            for number, each in enumerate(self.conversations):
                if turn < len(each):
                    yield number, turn

    @property
    def requests(self) -> int:
        return sum(map(len, self.conversations))


@dataclass(frozen=True)
class Workload:
    """Lanes that run beside each other."""

    name: str
    says: str
    lanes: Sequence[Lane]

    @property
    def requests(self) -> int:
        return sum(lane.requests for lane in self.lanes)

    def distinct_tokens(self) -> int:
        """Tokens of prompts and answers, what conversations share counted once."""
        turns = [turn for lane in self.lanes for each in lane.conversations for turn in each]
        return sum(len(turn.new_ids) - turn.seen_tokens + turn.output_tokens for turn in turns)

    def longest(self) -> int:
        """Tokens of the longest conversation, answers included."""
        return max(
            sum(len(turn.new_ids) + turn.output_tokens for turn in each)
            for lane in self.lanes
            for each in lane.conversations
        )

    def shape(self) -> dict[str, Any]:
        """What it is, in plain JSON types."""
        lanes = {
            lane.name: {
                "conversations": len(lane.conversations),
                "turns": max(map(len, lane.conversations), default=0),
                "clients": lane.clients,
                "first_prompt_tokens": len(lane.conversations[0][0].new_ids),
                "later_prompt_tokens": len(lane.conversations[0][-1].new_ids),
                "output_tokens": lane.conversations[0][0].output_tokens,
            }
            for lane in self.lanes
        }
        return {
            "says": self.says,
            "requests": self.requests,
            "distinct_tokens": self.distinct_tokens(),
            "lanes": lanes,
        }


Make = Callable[[int, int, int], Workload]
"""Of the capacity of the device pool in tokens, the vocabulary, and a seed."""


class _Draw:
    """Token ids below ``vocab_size``, and lengths that are no multiple of a page."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._vocab_size = vocab_size

    def ids(self, count: int) -> list[int]:
        drawn: list[int] = self._random.integers(0, self._vocab_size, count).tolist()
        return drawn

    def near(self, tokens: int) -> int:
        """Within 2 % of ``tokens``, and odd."""
        spread = max(1, tokens // 50)
        return 1 | int(self._random.integers(tokens - spread, tokens + spread))


def _chat(pool_tokens: int, vocab_size: int, seed: int) -> Workload:
    """48 conversations of 4 turns, 1,024 new tokens and 64 answered in each, 16 at once."""
    draw = _Draw(vocab_size, seed)
    turns, new = 4, min(1024, pool_tokens // 16)
    answered = max(4, new // 16)
    longest = turns * (new + answered)
    count = max(4, int(3.2 * pool_tokens / longest))
    made = [[Turn(draw.ids(draw.near(new)), answered) for _ in range(turns)] for _ in range(count)]
    clients = max(2, min(16, int(1.1 * pool_tokens / longest)))
    says = f"chats of {turns} turns, {new:,} new tokens and {answered} answered in each"
    return Workload("chat", says, (Lane("chat", made, clients),))


def _prefill(pool_tokens: int, vocab_size: int, seed: int) -> Workload:
    """240 prompts of 8,192 tokens, none like another, one token answered, 4 at once.

    An H100 that has nothing to write takes 50 of them a second of a small model, and a turn should last
    seconds; 48 where the pool is small.
    """
    draw = _Draw(vocab_size, seed)
    length = min(8192, pool_tokens // 8)
    pools = 30 if pool_tokens >= 32_768 else 6
    made = [[Turn(draw.ids(draw.near(length)), 1)] for _ in range(max(4, pools * pool_tokens // length))]
    says = f"new prompts of {length:,} tokens, one token answered"
    return Workload("prefill", says, (Lane("prefill", made, 4),))


def _shared(pool_tokens: int, vocab_size: int, seed: int) -> Workload:
    """24 system prompts of 4,096 tokens, each with 4 questions of 256, 128 tokens answered, 16 at once."""
    draw = _Draw(vocab_size, seed)
    system = min(4096, pool_tokens // 16)
    question, answered = max(8, system // 16), max(4, system // 32)
    groups = max(4, int(1.5 * pool_tokens / system))
    prefixes = [draw.ids(draw.near(system)) for _ in range(groups)]
    # One question to each system prompt, then the next one: by then it has been evicted.
    made = [
        [Turn(prefix + draw.ids(draw.near(question)), answered, seen_tokens=len(prefix) if number else 0)]
        for number in range(4)
        for prefix in prefixes
    ]
    clients = max(2, min(16, pool_tokens // system))
    says = f"{groups} system prompts of {system:,} tokens, 4 questions to each, {answered} tokens answered"
    return Workload("shared", says, (Lane("shared", made, clients),))


def _decode(pool_tokens: int, vocab_size: int, seed: int) -> Workload:
    """48 answers of 512 tokens, 16 at once, beside 96 new prompts of 4,096 tokens, 2 at once."""
    draw = _Draw(vocab_size, seed)
    answered = max(16, min(512, pool_tokens // 128))
    prompt, written = max(8, answered // 4), min(4096, pool_tokens // 16)
    decoders = [
        [Turn(draw.ids(draw.near(prompt)), answered)] for _ in range(48 if pool_tokens >= 32_768 else 12)
    ]
    writers = [[Turn(draw.ids(draw.near(written)), 1)] for _ in range(2 * len(decoders))]
    says = f"answers of {answered} tokens beside new prompts of {written:,}, which are written back"
    clients = 16 if pool_tokens >= 32_768 else 4
    return Workload("decode", says, (Lane("decode", decoders, clients), Lane("written", writers, 2)))


_MADE: dict[str, Make] = {"chat": _chat, "prefill": _prefill, "shared": _shared, "decode": _decode}

NAMES = tuple(_MADE)


def maker(name: str) -> Make:
    """Makes the workload of that name.

    Raises:
        NameProblem: there is none.
    """
    check_name("workload", name, NAMES)
    return partial(_MADE[name])


def warm_up(workload: Workload, tokens: int = 0, conversations: int = 4, turns: int = 2) -> Workload:
    """The beginning of a workload: what each server is asked before anything is measured.

    Args:
        workload: all of it.
        tokens: distinct tokens that are wanted of it, as far as it has them: with those of the host pool
            every row of both tiers is used once, under load of the kind that is measured. 0: only enough that
            all has been compiled.
        conversations, turns: of each lane where ``tokens`` is 0.
    """
    if not tokens:
        lanes = [
            Lane(lane.name, [each[:turns] for each in lane.conversations[:conversations]], lane.clients)
            for lane in workload.lanes
        ]
        return Workload(workload.name, workload.says, lanes)
    share = min(1.0, tokens / workload.distinct_tokens())
    lanes = [
        Lane(lane.name, lane.conversations[: math.ceil(share * len(lane.conversations))], lane.clients)
        for lane in workload.lanes
    ]
    return Workload(workload.name, workload.says, lanes)
