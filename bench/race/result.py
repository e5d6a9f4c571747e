"""What the seeds of `hicache-io race` gave together: races, wrong rows, as data and as text."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from ...io_backends.virtual.races import Race, Side
from ...policy.terminal import styled
from ..layout import table
from .simulation.experiment import Run


@dataclass(slots=True)
class Found:
    """One race between two places in the program: as first seen, in which mode and seeds, how often."""

    race: Race
    mode: str = "overlap"
    seeds: list[int] = field(default_factory=list)
    count: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**self.race.to_dict(), "mode": self.mode, "count": self.count, "seeds": self.seeds}


@dataclass(slots=True)
class RaceResult:
    """All seeds of one experiment, in one mode or several.

    Attributes:
        runs: as they came, in each mode.
        seconds: of wall time, SGLang's import left out.
    """

    runs: dict[str, list[Run]] = field(default_factory=dict)
    seconds: float = 0.0
    _found: dict[tuple[str, ...], Found] = field(default_factory=dict)

    def add(self, run: Run, mode: str = "overlap") -> None:
        self.runs.setdefault(mode, []).append(run)
        for race in run.races:
            key = (mode, race.kind, *_place(race.first), *_place(race.second))
            found = self._found.setdefault(key, Found(race, mode))
            found.seeds.append(run.seed)
            found.count += race.count

    @property
    def seeds(self) -> int:
        """Of each mode."""
        return max(map(len, self.runs.values()))

    @property
    def writes(self) -> int:
        return sum(run.writes for runs in self.runs.values() for run in runs)

    @property
    def served_writes(self) -> int:
        return sum(run.served_writes for runs in self.runs.values() for run in runs)

    @property
    def loads(self) -> int:
        return sum(run.loads for runs in self.runs.values() for run in runs)

    @property
    def races(self) -> list[Found]:
        """Most frequent first."""
        return sorted(self._found.values(), key=lambda found: -len(found.seeds))

    @property
    def kinds(self) -> list[str]:
        return sorted({found.race.kind for found in self._found.values()})

    @property
    def corrupted(self) -> list[dict[str, Any]]:
        """Seeds in which rows were wrong."""
        return [
            {
                "mode": mode,
                "seed": run.seed,
                "host_rows": run.wrong_rows,
                "rows_read_by_forwards": run.wrong_reads,
            }
            for mode, runs in self.runs.items()
            for run in runs
            if run.wrong_rows or run.wrong_reads
        ]

    @property
    def good(self) -> bool:
        return not self._found and not self.corrupted

    def to_dict(self) -> dict[str, Any]:
        return {
            "races": [found.to_dict() for found in self.races],
            "kinds": self.kinds,
            "corrupted": self.corrupted,
            "seeds": self.seeds,
            "writes": self.writes,
            "loads": self.loads,
            "seconds": round(self.seconds, 1),
        }


def _place(side: Side) -> tuple[str, str]:
    return side.stream, side.issued


def show_races(out: Console, result: RaceResult) -> None:
    """Print one row a race."""
    titles = ("race", "asked for first", "not ordered before", "the fence that is missing", "seeds")
    rows = []
    several = len(result.runs) > 1
    for found in result.races:
        race = found.race
        rows.append(
            (
                styled((f"{race.kind}\n{found.mode}" if several else race.kind, "bold red")),
                _side(race.first),
                _side(race.second),
                race.fence,
                f"{len(found.seeds)} of {result.seeds}\nfirst: {found.seeds[0]}",
            )
        )
    out.print(table(out, titles, rows))


def _side(side: Side) -> str:
    where = side.issued.rpartition("sglang/")[2]
    return f"{side.operation}\n{side.mode} on {side.stream}\n{where}"


def verdict(result: RaceResult, what: str) -> Text:
    """One line, and how to look closer at one seed."""
    first = next(iter(result.runs.values()))[0]
    seeds = f"{result.seeds} seeds" if result.seeds != 1 else f"seed {first.seed}"
    scope = f"{seeds}, {result.writes:,} writes, {result.loads:,} loads, {result.seconds:.0f} s"
    if result.good:
        return styled(("Good", "green"), f": {what}: no race, and every row right ({scope}).")
    kinds = ", ".join(result.kinds) or "no race"
    wrong = result.corrupted
    rows = sum(each["host_rows"] + each["rows_read_by_forwards"] for each in wrong)
    bytes_ = (
        f"; {rows:,} rows wrong in {len(wrong)} seeds"
        if wrong
        else "; every row came out right in these orders"
    )
    return styled(("Races", "bold red"), f": {what}: {kinds}{bytes_} ({scope}).")


def first_bad(result: RaceResult) -> tuple[str, int] | None:
    """The mode and seed to replay: one with wrong rows if there is one."""
    if result.corrupted:
        return result.corrupted[0]["mode"], result.corrupted[0]["seed"]
    return min(((found.mode, found.seeds[0]) for found in result.races), key=lambda bad: bad[1], default=None)


def as_json(result: RaceResult, about: Mapping[str, Any], replay: Sequence[str] | None) -> dict[str, Any]:
    return {**result.to_dict(), **about, "replay": None if replay is None else shlex.join(replay)}
