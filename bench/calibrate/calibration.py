"""From measured times to numbers for rules: break-even points and best options. Pure.

A sweep was measured in several rounds, one after the other. Each round answers on its own; where the answers
are not the same, within one step of the sweep, there is no number, and the refusal quotes the rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

TOLERANCE = 0.03
"""Two times closer than this are one: a choice, above the spread of most repeats in
bench/results/2026-11-23-h200 (0 to 2 % of the median). The tie goes to what takes less of the GPU."""

LEAST_SM_WORK_FIRST = ("copy_engine", "hybrid", "fenced_kernel")
"""Nothing on the SMs, a gather within the GPU's memory, the whole transfer."""

Sweep = Mapping[int, Sequence[float]]
"""ms of each round, by what was varied: bytes an entry, or an option's value."""


class InconclusiveError(ValueError):
    """The measurements do not give one number; the message says which rounds, or what is missing."""


@dataclass(frozen=True)
class Segment:
    """From ``at_least`` bytes an entry on, up to the next segment, ``backend`` is best.

    Attributes:
        low, high: least and greatest ``at_least`` of the rounds.
    """

    backend: str
    at_least: int
    low: int
    high: int


@dataclass(frozen=True)
class Choice:
    """The best value of an option, and the least and greatest of the rounds."""

    value: int
    low: int
    high: int


def segments(times: Mapping[str, Sweep]) -> tuple[Segment, ...]:
    """Which backend is best from how many bytes an entry on, the first segment from the smallest measured.

    A boundary is the smallest size at which the upper backend won: nothing is said of sizes in between by
    interpolation.

    Args:
        times: by backend. All must have the same sizes, and the same number of rounds, at least two.

    Raises:
        RefusedError: something is missing, a round has no single order of backends, or rounds disagree.
    """
    if len(times) < 2:
        raise InconclusiveError(
            f"only {', '.join(times) or 'nothing'} was measured: there is nothing to compare"
        )
    sizes, rounds = _complete(times)
    answers = [_one_round(times, sizes, n) for n in range(rounds)]
    orders = [tuple(backend for backend, _ in answer) for answer in answers]
    if len(set(orders)) > 1:
        raise InconclusiveError(f"the rounds disagree: {_in_words(answers, sizes)}")
    found = []
    for position, backend in enumerate(orders[0]):
        steps = [answer[position][1] for answer in answers]
        if max(steps) - min(steps) > 1:
            raise InconclusiveError(f"the rounds disagree about {backend}: {_in_words(answers, sizes)}")
        middle = sorted(steps)[len(steps) // 2]
        found.append(Segment(backend, sizes[middle], sizes[min(steps)], sizes[max(steps)]))
    if any(later.at_least <= earlier.at_least for earlier, later in pairwise(found)):
        raise InconclusiveError(f"the rounds disagree: {_in_words(answers, sizes)}")
    return tuple(found)


def best_value(times: Sweep) -> Choice:
    """The smallest value of an option with which a write is as fast as with any other.

    Raises:
        RefusedError: less than two values or rounds, or rounds that are more than one step apart.
    """
    if len(times) < 2:
        raise InconclusiveError(f"measured with {len(times)} value: there is nothing to compare")
    values, rounds = _complete({"it": times})
    steps = []
    for n in range(rounds):
        fastest = min(times[value][n] for value in values)
        as_fast = (times[value][n] <= fastest * (1 + TOLERANCE) for value in values)
        steps.append(next(step for step, fast in enumerate(as_fast) if fast))
    if max(steps) - min(steps) > 1:
        said = ", ".join(f"round {n + 1} says {values[step]}" for n, step in enumerate(steps))
        raise InconclusiveError(f"the rounds disagree: {said}")
    return Choice(values[sorted(steps)[rounds // 2]], values[min(steps)], values[max(steps)])


def _complete(times: Mapping[str, Sweep]) -> tuple[list[int], int]:
    """The sizes in order and the number of rounds, which all have in common."""
    sizes = sorted({size for sweep in times.values() for size in sweep})
    counts = {len(sweep.get(size, ())) for sweep in times.values() for size in sizes}
    for name, sweep in times.items():
        missing = [size for size in sizes if not sweep.get(size)]
        if missing:
            raise InconclusiveError(f"{name} has no times at {', '.join(map(str, missing))}")
    if len(counts) != 1:
        raise InconclusiveError(f"the number of rounds differs: {sorted(counts)}")
    rounds = counts.pop()
    if rounds < 2:
        raise InconclusiveError("one round has no other to agree with")
    if any(ms <= 0 for sweep in times.values() for each in sweep.values() for ms in each):
        raise InconclusiveError("a time is not above 0")
    return sizes, rounds


def _one_round(times: Mapping[str, Sweep], sizes: Sequence[int], n: int) -> list[tuple[str, int]]:
    """(backend, index of its first size) in ascending order of sizes."""
    answer: list[tuple[str, int]] = []
    for step, size in enumerate(sizes):
        best = _winner({name: sweep[size][n] for name, sweep in times.items()})
        if not answer or answer[-1][0] != best:
            answer.append((best, step))
    names = [name for name, _ in answer]
    if len(set(names)) < len(names):
        raise InconclusiveError(
            f"round {n + 1} has no one point where it changes: {_in_words([answer], sizes, first=n)}"
        )
    return answer


def _winner(times: Mapping[str, float]) -> str:
    fastest = min(times.values())
    as_fast = [name for name, ms in times.items() if ms <= fastest * (1 + TOLERANCE)]
    # A backend that is not this project's comes last, in the order of names.
    rank = {name: n for n, name in enumerate(LEAST_SM_WORK_FIRST)}
    return min(as_fast, key=lambda name: (rank.get(name, len(rank)), name))


def _in_words(answers: Sequence[Sequence[tuple[str, int]]], sizes: Sequence[int], first: int = 0) -> str:
    return "; ".join(
        f"round {first + n + 1}: "
        + ", ".join(f"{backend} from {sizes[step]:,} bytes an entry" for backend, step in answer)
        for n, answer in enumerate(answers)
    )
