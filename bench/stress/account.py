"""Judging and counting: which answer is the reference, what differs, and how long things took. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..workload import Answer
from .client import Reply

ERROR, WRONG, HUNG, DEAD = "error", "wrong output", "hung", "dead"
"""Kinds of problem."""

Place = tuple[int, int, int]
"""Wave in which a conversation was new, its number there, and the turn: what makes two prompts the same."""


@dataclass(frozen=True)
class Problem:
    """Something that must not happen.

    Attributes:
        kind: one of the above.
        at_s: seconds of load until then.
        what: in a sentence.
        place: the request, if it was one.
    """

    kind: str
    at_s: float
    what: str
    place: Place | None = None

    def __str__(self) -> str:
        where = ""
        if self.place is not None:
            wave, number, turn = self.place
            where = f" (conversation {number} of wave {wave}, turn {turn})"
        return f"{self.kind} after {self.at_s:.1f} s{where}: {self.what}"


class Book:
    """The answer that every prompt must get: the first one, or a reference server's."""

    def __init__(self) -> None:
        self._answers: dict[Place, Answer] = {}

    def answers(self, wave: int, number: int, turns: int) -> list[tuple[int, ...]] | None:
        """The answers to the first ``turns`` turns of a conversation; None when one is missing."""
        found = [self._answers.get((wave, number, turn)) for turn in range(turns)]
        return [answer.output_ids for answer in found if answer] if None not in found else None

    def reference(self, place: Place) -> Answer | None:
        """What the prompt at ``place`` must get, if it is known."""
        return self._answers.get(place)

    def keep(self, place: Place, answer: Answer) -> None:
        """Make ``answer`` the reference."""
        self._answers[place] = Answer(
            answer.output_ids, answer.prompt_tokens, answer.device_tokens, answer.host_tokens
        )

    def forget_before(self, wave: int) -> None:
        """Conversations of earlier waves are asked no more."""
        for place in [place for place in self._answers if place[0] < wave]:
            del self._answers[place]


def first_difference(given: Answer, reference: Answer) -> int | None:
    """Position of the first token that differs; None where the outputs are the same."""
    pairs = zip(given.output_ids, reference.output_ids, strict=True)
    return next((position for position, (a, b) in enumerate(pairs) if a != b), None)


def difference_in_words(given: Answer, reference: Answer, position: int) -> str:
    """What differs, and where the two prompts' prefixes came from."""
    return (
        f"token {position + 1} of {len(given.output_ids)} is {given.output_ids[position]} instead of "
        f"{reference.output_ids[position]}; of {given.prompt_tokens} prompt tokens {given.host_tokens} came "
        f"from the host, {given.device_tokens} from the device pool (the reference: {reference.host_tokens} "
        f"and {reference.device_tokens})"
    )


def regret_in_words(given: Answer, position: int, regret: float, noise: float) -> str:
    """Which token a recomputation finds impossible, and where the prompt's prefix came from."""
    return (
        f"token {position + 1} of {len(given.output_ids)} is {given.output_ids[position]}, and by the "
        f"server's own recomputation another one is {regret:.2g} nats likelier; without the host "
        f"recomputations differ by at most {noise:.2g}; of {given.prompt_tokens} prompt tokens "
        f"{given.host_tokens} came from the host, {given.device_tokens} from the device pool"
    )


class Times:
    """Durations, as counts in buckets that are 2 % wide: a long run has too many to keep."""

    _FIRST_S = 1e-5
    _RATIO = 1.02

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.longest_s = 0.0

    def add(self, seconds: Iterable[float]) -> None:
        for each in seconds:
            bucket = max(0, math.ceil(math.log(max(each, self._FIRST_S) / self._FIRST_S, self._RATIO)))
            self._counts[bucket] = self._counts.get(bucket, 0) + 1
            self.count += 1
            self.longest_s = max(self.longest_s, each)

    def percentile(self, percent: float) -> float | None:
        """Seconds that ``percent`` % do not exceed, at most 2 % too long; None when there are none."""
        wanted, seen = math.ceil(self.count * percent / 100), 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= wanted:
                return min(self.longest_s, self._FIRST_S * self._RATIO**bucket)
        return None

    def to_dict(self) -> dict[str, float | None]:
        """Seconds."""
        found = {f"p{percent}": self.percentile(percent) for percent in (50, 90, 99)}
        found["max"] = self.longest_s if self.count else None
        return {name: None if value is None else round(value, 6) for name, value in found.items()}


@dataclass
class Tally:
    """What one server has done under load.

    Attributes:
        ok: answers that are right, first ones included.
        errors: requests without an answer.
        wrong: answers that differ from their reference.
        near_ties: answers that part from it by no more than the server rounds (see ``recompute``); counted
            in ``ok`` too.
        undecided: answers that part from it, and nobody can tell why.
        unfinished: requests that were given up when the time was over.
        checked: answers that were compared with an earlier one or with the reference server's.
        checked_from_host: those of them whose prompt came from the host tier, in part.
        first_from_host: references whose prompt came from the host tier, in part: were that always wrong in
            the same way, comparing with them would not show it.
        prompt_tokens, output_tokens, device_tokens, host_tokens: of all answers.
        cannot_tell: why the first of ``undecided`` could not be judged.
    """

    ok: int = 0
    errors: int = 0
    wrong: int = 0
    near_ties: int = 0
    undecided: int = 0
    unfinished: int = 0
    checked: int = 0
    checked_from_host: int = 0
    first_from_host: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    device_tokens: int = 0
    host_tokens: int = 0
    first_token_s: Times = field(default_factory=Times)
    request_s: Times = field(default_factory=Times)
    between_tokens_s: Times = field(default_factory=Times)
    first_problem: Problem | None = None
    cannot_tell: str | None = None

    @property
    def requests(self) -> int:
        return self.ok + self.errors + self.wrong + self.undecided

    def answered(self, reply: Reply, *, checked: bool) -> None:
        """An answer came, right or wrong."""
        self.prompt_tokens += reply.prompt_tokens
        self.output_tokens += len(reply.output_ids)
        self.device_tokens += reply.device_tokens
        self.host_tokens += reply.host_tokens
        self.first_token_s.add([reply.first_token_s])
        self.request_s.add([reply.seconds])
        self.between_tokens_s.add(reply.token_gaps_s)
        self.checked += checked
        self.checked_from_host += checked and reply.host_tokens > 0
        self.first_from_host += not checked and reply.host_tokens > 0

    def right(self, *, near_tie: bool = False) -> None:
        self.ok += 1
        self.near_ties += near_tie

    def unjudged(self, why: str) -> None:
        self.undecided += 1
        self.cannot_tell = self.cannot_tell or why

    def problem(self, found: Problem) -> None:
        self.errors += found.kind == ERROR
        self.wrong += found.kind == WRONG
        self.first_problem = self.first_problem or found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; durations in seconds."""
        counts = {
            name: getattr(self, name)
            for name in (
                *("ok", "errors", "wrong", "near_ties", "undecided", "unfinished"),
                *("checked", "checked_from_host", "first_from_host"),
                *("prompt_tokens", "output_tokens", "device_tokens", "host_tokens"),
            )
        }
        return {
            "requests": self.requests,
            **counts,
            "first_token_s": self.first_token_s.to_dict(),
            "request_s": self.request_s.to_dict(),
            "between_tokens_s": self.between_tokens_s.to_dict(),
            "cannot_tell": self.cannot_tell,
            "first_problem": None if self.first_problem is None else asdict(self.first_problem),
        }
