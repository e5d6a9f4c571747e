"""Judging an answer by the same server's own recomputation, where rounding alone may change a token.

Kernels round otherwise in another batch, or when a prefix comes from a cache instead of being computed with
the rest, so that two tokens that are about as likely may swap, and what follows with them. That happens
without HiCache too. So an answer that differs from its reference is *scored*: the server computes its prompt
and its tokens again from nothing, and says for each token how much less likely it was than the likeliest. A
token that was chosen by rounding was nearly as likely; one that was chosen from wrong KV rows was not.

How much rounding does on this server with this model is measured, not assumed: the same prompt is answered
again with its prefix in the device pool, under a key that nothing else uses, so that nothing comes from the
host; that answer is scored too, and the differences between the two computations are the server's rounding.
"""

from __future__ import annotations

import itertools
import math
import secrets
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..workload import Answer
from .answers import LogProb, StreamEvent
from .client import Client, RequestFailed

FACTOR = 3.0
"""Times the largest rounding that was seen, which a later one is allowed to be. Were differences
exponentially distributed, the largest of n would be about ln(n) means, and three times that would come up
once in n cubed."""

CONTROLS, FEW = 8, 64
"""Answers without the host, and differences in them, before anything is judged. One computation's differences
go together, so many of a few computations are not enough."""

ENOUGH = 1000
"""Differences from which no more are measured."""


class UnjudgedError(Exception):
    """The server does not let this be judged: the message says why, in one line."""


@dataclass(frozen=True)
class Position:
    """One token of an answer, as a recomputation sees it.

    Attributes:
        regret: nats by which it is less likely than the likeliest one.
        best: log probability of the likeliest token, nats.
        pair: the two likeliest tokens.
        gap: nats between them.
    """

    regret: float
    best: float
    pair: tuple[int, int]
    gap: float


class Judge:
    """Scores answers of one server, and knows how much that server rounds.

    Args:
        client: open.
        vocab_size: tokens that the model knows, at least.
        least_nats: what rounding is allowed at least, see `ServerFacts.tie_nats`.
        on_answer: called whenever the server has answered.

    Attributes:
        noise: the largest difference between two computations of the same thing without the host, nats.
        differences: how many were measured.
        controls: in how many answers.
        requests: sent for this, beyond the load.
    """

    def __init__(
        self, client: Client, *, vocab_size: int, least_nats: float, on_answer: Callable[[], None]
    ) -> None:
        self._client = client
        self._on_answer = on_answer
        self._vocab_size = vocab_size
        self._least = least_nats
        self._keys = (f"hicache-io-stress-{secrets.token_hex(8)}-{number}" for number in itertools.count())
        self._best: list[float] = []
        self.noise = 0.0
        self.differences = self.controls = 0
        self.requests = 0

    @property
    def allowed(self) -> float:
        """Regret that rounding may explain, nats."""
        return max(self._least, FACTOR * self.noise)

    def to_dict(self) -> dict[str, float | int]:
        """Plain JSON types."""
        return {
            "noise_nats": round(self.noise, 6),
            "allowed_nats": round(self.allowed, 6),
            "controls": self.controls,
            "differences": self.differences,
            "requests": self.requests,
        }

    async def regret(self, prompt: Sequence[int], answer: Answer) -> tuple[float, int]:
        """The largest regret of a token of ``answer``, nats, and that token's position from 0.

        Raises:
            UnjudgedError: the server does not tell, or its rounding leaves nothing to see.
            ConnectionLost
        """
        scored = await self._score(prompt, answer.output_ids)
        cached = min(answer.device_tokens + answer.host_tokens, len(prompt) - 1)
        for number in range(2 * CONTROLS):
            # With the prefix cached as it was, and all at once: the kernels differ.
            if (number == 0 and self.differences < ENOUGH) or not self._is_measured():
                await self._measure(prompt, len(answer.output_ids), cached if number % 2 == 0 else 0)
        if not self._is_measured():
            raise UnjudgedError(
                f"how much it rounds is not known: {self.controls} answers without the host gave "
                f"{self.differences} differences, and {CONTROLS} and {FEW} are needed"
            )
        # A token that was drawn blindly has a probability of one in the vocabulary, on average.
        blind = statistics.median(self._best) + math.log(self._vocab_size)
        if self.allowed >= blind:
            raise UnjudgedError(
                f"it rounds so much (up to {self.noise:.2g} nats between recomputations of the same tokens "
                "without the host) that tokens from wrong rows would not stand out"
            )
        position, worst = max(enumerate(scored), key=lambda each: each[1].regret)
        return worst.regret, position

    def _is_measured(self) -> bool:
        return self.controls >= CONTROLS and self.differences >= FEW

    async def _measure(self, prompt: Sequence[int], output_tokens: int, cached: int) -> None:
        """Answer again, the first ``cached`` tokens in the device pool, and take the differences."""
        key = next(self._keys)
        if cached > 0:
            await self._compute(prompt[:cached], 1, key=key)
        again = await self._compute(prompt, output_tokens, key=key, top=True)
        if again.meta_info.cached.host:
            return  # its prefix was evicted meanwhile, and came back from the host
        tops = again.meta_info.output_top_logprobs or []
        scored = await self._score(prompt, again.output_ids)
        self.controls += 1
        for position, top in zip(scored, tops, strict=False):
            self._take(position.regret)
            pair = _two(top)
            if (gap := _gap(pair, position.pair)) is not None:
                self._take(abs(gap - position.gap))

    def _take(self, difference: float) -> None:
        self.noise = max(self.noise, difference)
        self.differences += 1

    async def _score(self, prompt: Sequence[int], output_ids: Sequence[int]) -> list[Position]:
        whole = [*prompt, *output_ids]
        answer = await self._compute(whole, 1, key=next(self._keys), top=True, start=len(prompt) - 1)
        meta = answer.meta_info
        if meta.cached_tokens or meta.cached.device or meta.cached.host:
            raise UnjudgedError("it takes prefixes from its cache although the request's extra_key is new")
        count = len(output_ids)
        chosen = (meta.input_token_logprobs or [])[-count:]
        tops = (meta.input_top_logprobs or [])[-count:]
        if [each[1] for each in chosen] != list(output_ids) or len(tops) != count:
            raise UnjudgedError("it gives no log probabilities of a prompt's tokens")
        found = []
        for (log_prob, _, _), top in zip(chosen, tops, strict=True):
            (best, best_id), (second, second_id) = _two(top)
            if log_prob is None:
                raise UnjudgedError("it gives no log probability of a token of its own answer")
            found.append(Position(max(0.0, best - log_prob), best, (best_id, second_id), best - second))
        self._best += [each.best for each in found]
        del self._best[:-ENOUGH]
        return found

    async def _compute(
        self, input_ids: Sequence[int], output_tokens: int, *, key: str, top: bool = False, start: int = -1
    ) -> StreamEvent:
        self.requests += 1
        more = {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": start} if top else {}
        try:
            answer = await self._client.compute(input_ids, output_tokens, key=key, **more)
        except RequestFailed as error:
            raise UnjudgedError(str(error)) from error
        self._on_answer()
        if len(answer.output_ids) != output_tokens:
            raise UnjudgedError(f"asked for {output_tokens} tokens it gave {len(answer.output_ids)}")
        return answer


def _two(top: Sequence[LogProb] | None) -> tuple[tuple[float, int], tuple[float, int]]:
    """The two likeliest tokens, each with its log probability. Raises UnjudgedError."""
    if top is None or len(top) < 2:
        raise UnjudgedError("it does not give the two likeliest tokens")
    (first, first_id, _), (second, second_id, _) = sorted(top, key=lambda each: -each[0])[:2]
    return (first, first_id), (second, second_id)


def _gap(pair: tuple[tuple[float, int], tuple[float, int]], of: tuple[int, int]) -> float | None:
    """Nats from the second to the first token of ``of``; None where ``pair`` is of other tokens."""
    by_token = {token: log_prob for log_prob, token in pair}
    return by_token[of[0]] - by_token[of[1]] if by_token.keys() == set(of) else None
