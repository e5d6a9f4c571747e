"""What was measured: rows with medians and spreads, saved as JSON and CSV with where they come from."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import saved
from .cases import Case

SCHEMA = 2

CPU_WATERMARK = "measured on a CPU: shows that the code runs, says nothing about the speed of a GPU"


@dataclass(frozen=True, slots=True)
class Metric:
    """What a number is: its unit, whether more of it is better, and what it says."""

    unit: str
    more_is_better: bool
    says: str


METRICS = {
    "gb_per_s": Metric("GB/s", True, "bytes of the write by ms"),
    "link_share": Metric("", True, "gb_per_s by the rate of one large pinned copy in the same run"),
    "ms": Metric("ms", False, "from before the submission, on idle streams, to the transfer's completion"),
    "submit_us": Metric("us", False, "time of the scheduler's thread until submit returns"),
    "plan_us": Metric("us", False, "the part of submit_us outside the device seam: planning"),
    "device_us": Metric(
        "us",
        False,
        "the part of submit_us inside it: driver, torch, Triton; by its share of a metered repeat",
    ),
    "stall_ms": Metric("ms", False, "longest time that one forward waits: fence reached to fence released"),
    "stall_total_ms": Metric("ms", False, "the same, over all forwards that wait for this write"),
    "held_ms": Metric("ms", False, "from before the submission to the first fence released"),
    "ack_us": Metric("us", False, "from before the submission until the host sees the transfer complete"),
    "slow_down": Metric("x", False, "time of a forward beside write-back by its time alone"),
    "forward_ms": Metric("ms", False, "time of the forward beside write-back"),
    "kept_gb_per_s": Metric(
        "GB/s",
        True,
        "bytes of writes done, by time, in a loop of forwards after its start",
    ),
    "asked_gb_per_s": Metric("GB/s", True, "bytes that the forwards of the loop leave, without write-back"),
    "cycle_ms": Metric("ms", False, "once through the pattern of forwards"),
    "done_p50_ms": Metric("ms", False, "from a write's submission to its end, median of the loop's writes"),
    "done_p99_ms": Metric("ms", False, "the same, 99th percentile"),
    "after_forward_p50_ms": Metric(
        "ms", False, "from the end of the forward that a write waits for to the write's end, median"
    ),
    "after_forward_p99_ms": Metric("ms", False, "the same, 99th percentile"),
    "fence_ms": Metric("ms", False, "how long a forward of the loop waits for write-back, mean"),
    "fence_max_ms": Metric("ms", False, "the same, longest"),
    "held_mb": Metric("MB", False, "rows that were submitted and not done, most at any time"),
    "waiting_mb": Metric("MB", False, "of these, rows not even enqueued, most at any launch of a forward"),
    "later_us": Metric("us", False, "time of the scheduler's thread for what submit left for later gaps"),
    "values_us": Metric("us", False, "the host's wait for device indices (device.host_values)"),
    "model_us": Metric(
        "us", False, "a model, not measured: submit_us and later_us without a driver, and 0.6 us an entry"
    ),
}


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeats of one number: their median, least and greatest."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value.

        Raises:
            ValueError: there is none.
        """
        if not values:
            raise ValueError("no repeats")
        return cls(statistics.median(values), min(values), max(values), len(values))

    def overlaps(self, other: Spread) -> bool:
        """Whether some value lies between least and greatest of both."""
        return self.low <= other.high and other.low <= self.high


@dataclass
class Row:
    """One contender in one case.

    Attributes:
        measurement: ``bandwidth``, ``submit``, ``interference``, ``fence``, ``latency`` or
            ``sustained``.
        forward: what ran beside it, where something did.
        metrics: by name in :data:`METRICS`; empty where it could not be measured, with the ``reason``.
        backend: who moved the bytes: the contender itself, or what ``auto`` chose.
        safe: whether the forwards that the policy lists for the case's attention backend wait for its SM
            work, or it has none.
        fenced: whether the policy lists any.
        copies: entries given to the copy engine, where known.
        entry_bytes: bytes of the write by the copies that drain it from staging.
        checked: whether every byte arrived and no other was changed.
        fastest_safe: of ``auto``: the fastest of the safe contenders.
        auto_right: of ``auto``: whether it chose that one, or was as fast within the spread.
        missed_by: of ``auto``: how much longer it took than that one, 0.1 for 10 %.
        series: of ``sustained``: [ms since the loop began, MB not enqueued] before each forward, of the last
            repeat.
    """

    measurement: str
    case: Case
    contender: str
    forward: str | None = None
    metrics: dict[str, Spread] = field(default_factory=dict)
    backend: str | None = None
    safe: bool | None = None
    fenced: bool | None = None
    copies: int | None = None
    entry_bytes: int | None = None
    checked: bool = False
    fastest_safe: str | None = None
    auto_right: bool | None = None
    missed_by: float | None = None
    reason: str | None = None
    series: list[list[float]] | None = None

    @property
    def key(self) -> tuple[str, Case, str | None, str]:
        """What makes it the same row in another run."""
        return self.measurement, self.case, self.forward, self.contender


@dataclass
class Results:
    """Rows, and what they were measured on.

    Attributes:
        environment: hardware, versions, git state, command line, date; ``ran_on`` is ``GPU`` or ``CPU``.
        ceilings: rate of the link and of the GPU's memory, GB/s.
    """

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    ceilings: dict[str, Spread] = field(default_factory=dict)

    @property
    def watermark(self) -> str | None:
        """What must stand wherever these figures are shown."""
        return None if self.environment.get("ran_on") == "GPU" else CPU_WATERMARK

    def of(self, measurement: str) -> list[Row]:
        return [row for row in self.rows if row.measurement == measurement]

    def wrong(self) -> list[Row]:
        """Rows whose bytes were looked at and not right."""
        return [row for row in self.rows if row.reason is not None and row.reason.startswith(WRONG)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "schema": SCHEMA,
            "ran_on": self.environment.get("ran_on"),
            "watermark": self.watermark,
            "environment": self.environment,
            "ceilings_gb_per_s": {name: asdict(each) for name, each in self.ceilings.items()},
            "metrics": {name: asdict(metric) for name, metric in METRICS.items()},
            "rows": [asdict(row) for row in self.rows],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Results:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: it is something else.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"no result of hicache-io bench (schema {data.get('schema')!r}, not {SCHEMA})")
        rows = [
            Row(
                **{
                    **row,
                    "case": Case(**row["case"]),
                    "metrics": {name: Spread(**each) for name, each in row["metrics"].items()},
                }
            )
            for row in data["rows"]
        ]
        ceilings = {name: Spread(**each) for name, each in data["ceilings_gb_per_s"].items()}
        return cls(dict(data["environment"]), rows, ceilings)


WRONG = "WRONG BYTES"
"""How the reason of a row begins that was measured and did not move the right bytes."""


def load(path: Path) -> Results:
    """A saved run.

    Raises:
        ValueError: the file is not there, or holds something else; the message says which.
    """
    return saved.read_json(path, Results.from_dict, "a saved run of hicache-io bench")


def merged(runs: Iterable[Results]) -> Results:
    """Runs of one machine as one; a row measured again replaces the earlier one.

    Raises:
        ValueError: they ran on different hardware or versions.
    """
    runs = list(runs)
    saved.check_one_machine([run.environment for run in runs], ("ran_on", "gpu", "driver", "torch"))
    rows = {row.key: row for run in runs for row in run.rows}
    ceilings = {name: each for run in runs for name, each in run.ceilings.items()}
    commands = list(dict.fromkeys(str(run.environment.get("command")) for run in runs))
    environment = {**runs[0].environment, "command": "; ".join(commands)}
    return Results(environment, list(rows.values()), ceilings)


CSV_COLUMNS = (
    "ran_on",
    "measurement",
    *(each.name for each in fields(Case)),
    "forward",
    "contender",
    "backend",
    "safe",
    "fenced",
    "entry_bytes",
    "copies",
    "repeats",
    *(f"{name}{part}" for name in METRICS for part in ("", "_low", "_high")),
    "checked",
    "fastest_safe",
    "auto_right",
    "missed_by",
    "reason",
)


def to_csv(run: Results) -> str:
    """One line a row, below lines with ``#`` that say where the figures come from."""
    notes = {
        name: f"{rate.median:.2f} GB/s ({rate.low:.2f} to {rate.high:.2f})"
        for name, rate in run.ceilings.items()
    }
    lines = (_csv_row(run, row) for row in run.rows)
    return saved.csv_text(CSV_COLUMNS, lines, run.environment, run.watermark, notes)


def _csv_row(run: Results, row: Row) -> dict[str, Any]:
    cells: dict[str, Any] = {"ran_on": run.environment.get("ran_on"), **asdict(row.case)}
    for name in CSV_COLUMNS:
        if name not in cells and name in Row.__dataclass_fields__:
            cells[name] = getattr(row, name)
    for name, each in row.metrics.items():
        cells |= {name: each.median, f"{name}_low": each.low, f"{name}_high": each.high}
        cells["repeats"] = each.n
    return cells


def save(run: Results, folder: Path, stem: str = "bench") -> list[Path]:
    """``stem.json`` and ``stem.csv`` in ``folder``; returns their paths.

    Each is replaced as a whole: who is killed in the middle leaves the earlier one.
    """
    return [
        saved.write_json(folder / f"{stem}.json", run.to_dict()),
        saved.write_whole(folder / f"{stem}.csv", to_csv(run)),
    ]
