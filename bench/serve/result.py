"""What `hicache-io bench serve` found, as it is saved: cells, their servers and turns, and where they ran."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...io_backends.sglang.unsafe import NULL
from .. import damaged, saved
from ..measure.results import Spread
from ..stress.server import ServerFacts
from .account import ArmRound, ArmSummary, arm_summaries
from .arms import DEFAULT, NONE, Cell

SCHEMA = 1
KIND = "hicache-io bench serve"
CPU_WATERMARK = "served by SGLang's CPU engine: shows that it runs, says nothing about the speed of a GPU"


@dataclass
class ArmFacts:
    """A server of an arm.

    Attributes:
        args: its options.
        start_s: seconds until it was up; None if it was not.
        server: its own account, after the load.
        problem: why it did not start, or what it did not survive.
    """

    args: list[str] = field(default_factory=list)
    start_s: float | None = None
    server: dict[str, Any] | None = None
    problem: str | None = None

    def about(self, info: Mapping[str, Any], plugin: Mapping[str, Any] | None) -> None:
        """Keep what ``/server_info`` says, and this plug-in in it."""
        try:
            self.server = ServerFacts.of(info).to_dict()
        except ValueError as error:
            self.problem = self.problem or str(error)
            return
        self.server["plugin"] = None if plugin is None else dict(plugin)


@dataclass
class CellResult:
    """A cell.

    Attributes:
        cell: see `Cell`, in plain JSON types.
        workloads: the shape of each, by name.
        arms: by name.
        turns: in the order in which they were run.
        skipped: what was not run, and why.
    """

    cell: dict[str, Any]
    workloads: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, ArmFacts] = field(default_factory=dict)
    turns: list[ArmRound] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, cell: Cell) -> CellResult:
        about = asdict(cell)
        about["model"]["path"] = Path(cell.model.path).name
        return cls({**about, "exact": cell.exact()})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CellResult:
        return cls(
            dict(data["cell"]),
            dict(data["workloads"]),
            {name: ArmFacts(**arm) for name, arm in data["arms"].items()},
            [ArmRound.from_dict(turn) for turn in data["turns"]],
            list(data["skipped"]),
        )

    @property
    def name(self) -> str:
        return str(self.cell["name"])

    def sums(self) -> list[ArmSummary]:
        return arm_summaries(self.turns)

    def problems(self) -> list[str]:
        """What must not be: servers that did not start, errors, and outputs that differ or do not differ."""
        found = [f"{name}: {_in_one_line(arm.problem)}" for name, arm in self.arms.items() if arm.problem]
        sums = self.sums()
        rounding = {each.workload for each in sums if each.arm == DEFAULT and each.same != each.compared}
        for each in sums:
            where = f"{each.arm}, {each.workload}"
            if each.errors:
                first = next((t.first_error for t in self.turns if t.arm == each.arm and t.first_error), None)
                found.append(f"{where}: {each.errors} requests failed, the first: {first}")
            if not each.rounds:
                found.append(f"{where}: no round was finished")
            found += [f"{where}: {why}" for why in _wrong_outputs(each, each.workload in rounding)]
        return found


_EXCEPTION = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|Timeout|Failed)\b(?:: .*)?")
"""The line that ends a traceback; or what names an exception in a line of a log."""


def _in_one_line(problem: str) -> str:
    """What failed, and of the server's last lines the one that says why: an exception's, else the last."""
    what, *log = (line.strip() for line in problem.splitlines())
    why = next((line for line in reversed(log) if _EXCEPTION.match(line)), None)
    why = why or next((line for line in reversed(log) if _EXCEPTION.search(line)), log[-1] if log else None)
    return what if why is None else f"{what}: {why}"


def _wrong_outputs(each: ArmSummary, rounding: bool) -> list[str]:
    """Where outputs are compared with those of a server without HiCache.

    Args:
        each: an arm.
        rounding: SGLang's own write-back differs from that server too: then it is the one to agree with.
    """
    if each.compared is None or each.arm == NONE or (rounding and each.arm == DEFAULT):
        return []
    same = each.same == each.compared or (rounding and each.as_default is not None and not _apart(each))
    if each.hit_share is None:  # a workload that asks for nothing again
        return [] if same else _differing(each, rounding)
    if not each.host_tokens:
        return ["no token came back from the host, so its outputs say nothing about the write-back"]
    if each.arm in (damaged.NAME, NULL):
        return ["a damaged write-back went unnoticed"] if same else []
    return [] if same else _differing(each, rounding)


def _apart(each: ArmSummary) -> int:
    """Answers that are not those of SGLang's own write-back."""
    return (each.default_compared or each.compared or 0) - (each.as_default or 0)


def _differing(each: ArmSummary, rounding: bool) -> list[str]:
    if rounding and each.as_default is not None:
        of = each.default_compared if each.default_compared else each.compared
        return [f"{_apart(each)} of {of} outputs differ from {DEFAULT}'s, which differ from none's too"]
    return [f"{(each.compared or 0) - (each.same or 0)} of {each.compared} outputs differ"]


@dataclass
class ServeResult:
    """All cells of one command.

    Attributes:
        environment: see `measure.environment.describe_environment`; ``ran_on`` is ``GPU`` or ``CPU``.
    """

    environment: dict[str, Any]
    cells: list[CellResult] = field(default_factory=list)

    @property
    def watermark(self) -> str | None:
        """What must stand wherever these figures are shown."""
        return None if self.environment.get("ran_on") == "GPU" else CPU_WATERMARK

    def put(self, cell: CellResult) -> None:
        """Add a cell, or replace the one of that name."""
        for place, known in enumerate(self.cells):
            if known.name == cell.name:
                self.cells[place] = cell
                return
        self.cells.append(cell)

    def problems(self) -> list[str]:
        return [f"{cell.name}: {problem}" for cell in self.cells for problem in cell.problems()]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; durations in seconds."""
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "ran_on": self.environment.get("ran_on"),
            "watermark": self.watermark,
            "environment": self.environment,
            "problems": self.problems(),
            "cells": [asdict(cell) for cell in self.cells],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ServeResult:
        """The inverse of `to_dict`.

        Raises:
            ValueError: it is something else.
        """
        if data.get("kind") != KIND or data.get("schema") != SCHEMA:
            raise ValueError(f"no result of {KIND} of schema {SCHEMA}")
        return cls(dict(data["environment"]), [CellResult.from_dict(cell) for cell in data["cells"]])


def is_one(path: Path) -> bool:
    """Whether a file says that it is a result of this kind."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("kind") == KIND


def load(path: Path) -> ServeResult:
    """A saved result.

    Raises:
        ValueError: the file is not there, or holds something else; the message says which.
    """
    return saved.read_json(path, ServeResult.from_dict, f"a saved result of {KIND}")


_SPREADS = ("requests_per_s", "ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s", "itl_max_s")
_COUNTS = (
    *("rounds", "requests", "errors", "prompt_tokens", "host_tokens", "device_tokens", "hit_share"),
    *("write_mean_s", "write_p99_s", "rows_locked", "written_bytes", "dropped_tokens", "same", "compared"),
    "as_default",
    "default_compared",
    "client_share",
)
CSV_COLUMNS = (
    *("ran_on", "cell", "model", "page_size", "mem_layout", "pool_tokens", "tp", "workload", "arm"),
    *(f"{name}{part}" for name in _SPREADS for part in ("", "_low", "_high")),
    *_COUNTS,
)


def to_csv(result: ServeResult) -> str:
    """One line for each cell, workload and arm, below lines with ``#`` that say what was measured on."""
    return saved.csv_text(CSV_COLUMNS, _csv_lines(result), result.environment, result.watermark, {})


def _csv_lines(result: ServeResult) -> Iterator[dict[str, Any]]:
    for cell in result.cells:
        about = {name: cell.cell[name] for name in ("page_size", "mem_layout", "pool_tokens", "tp")}
        about |= {
            "ran_on": result.environment.get("ran_on"),
            "cell": cell.name,
            "model": cell.cell["model"]["name"],
        }
        for each in cell.sums():
            line: dict[str, Any] = {**about, "workload": each.workload, "arm": each.arm}
            for name in _SPREADS:
                spread: Spread | None = getattr(each, name)
                if spread is not None:
                    line |= {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}
            line |= {name: getattr(each, name) for name in _COUNTS}
            yield line


def save(result: ServeResult, folder: Path, stem: str = "serve") -> Path:
    """``stem.json`` in ``folder``; replaced as a whole, so that a reader never finds half of one."""
    return saved.write_json(folder / f"{stem}.json", result.to_dict())


def merged(results: Sequence[ServeResult]) -> ServeResult:
    """Results of one machine as one; a cell run again replaces the earlier one.

    Raises:
        ValueError: they ran on different hardware or versions.
    """
    saved.check_one_machine(
        [each.environment for each in results], ("ran_on", "gpu", "driver", "torch", "sglang")
    )
    whole = ServeResult(dict(results[0].environment))
    for result in results:
        for cell in result.cells:
            whole.put(cell)
    return whole
