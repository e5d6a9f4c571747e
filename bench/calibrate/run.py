"""Measures for a machine's policy layer: backends by bytes an entry, and the options of ``hybrid``."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...io_backends.policy_files import default_policy
from ..measure import sglang_pools
from ..measure.cases import MODELS, Case, entry_bytes
from ..measure.contenders import Submit, Task, ours
from ..measure.devices import open_bench
from ..measure.environment import describe_environment
from ..measure.one_write import Setting, bandwidth, check
from ..measure.results import CPU_WATERMARK, Row
from ..measure.suite import SuiteProgress
from ..measure.timing import interleaved, one_write
from . import machine_policy
from .calibration import (
    LEAST_SM_WORK_FIRST,
    Choice,
    InconclusiveError,
    Segment,
    best_value,
    segments,
)

LAYOUTS = ("layer_first", "page_first")
"""``page_first_direct`` has no SM kernel in SGLang, and ``page_head`` only ``hybrid``: there is no choice."""

OPTIONS = {"gather_ctas": (4, 8, 16, 32, 64, 128), "staging_mb": (32, 64, 128, 256, 512)}
"""Values tried, of ``hybrid``."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        model: rows of which model.
        tokens: of every write.
        page_sizes: each gives another number of bytes an entry; fragmented. One contiguous write is added.
        rounds: whole sweeps, one after the other; they must agree.
        repeats: of each write in a round, after one to warm up.
    """

    model: str = "Qwen3-8B"
    tokens: int = 4096
    page_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128)
    options: Mapping[str, Sequence[int]] = field(default_factory=lambda: OPTIONS)
    rounds: int = 3
    repeats: int = 3

    def cases(self, layout: str) -> list[Case]:
        cases = [Case(self.model, layout, page, self.tokens, True) for page in self.page_sizes]
        return [*cases, Case(self.model, layout, 16, self.tokens, False)]


ON_CPU = Plan(tokens=64, page_sizes=(1, 8, 32), options={"gather_ctas": (8, 32), "staging_mb": (64, 128)})
"""Enough to exercise the code."""


@dataclass
class Calibration:
    """What was found, what was refused and why, and all the times.

    Attributes:
        times: ms of each round by layout, backend and bytes an entry; of options under their names.
        segments: by layout.
        options: of ``hybrid``.
        refused: why there is no number, by layout or option.
    """

    environment: dict[str, Any]
    plan: Plan
    times: dict[str, dict[str, dict[int, list[float]]]] = field(default_factory=dict)
    segments: dict[str, tuple[Segment, ...]] = field(default_factory=dict)
    options: dict[str, Choice] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def text(self) -> str | None:
        """The policy file, checked; None where no layout has a number.

        Raises:
            PolicyError: what was found makes no valid machine file.
        """
        if not self.segments:
            return None
        kind = MODELS[self.plan.model].kv_kind
        made = machine_policy.rules(self.segments, self.options, self.environment, kind)
        text = machine_policy.to_yaml(made, self.environment)
        machine_policy.check(text)
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        cpu = self.environment["ran_on"] == "CPU"
        return {
            "ran_on": self.environment["ran_on"],
            "watermark": CPU_WATERMARK if cpu else None,
            "environment": self.environment,
            "plan": asdict(self.plan),
            "times_ms": self.times,
            "segments": {name: [asdict(each) for each in parts] for name, parts in self.segments.items()},
            "options": {name: asdict(each) for name, each in self.options.items()},
            "refused": self.refused,
        }


def calibrate(plan: Plan, *, cpu: bool, say: SuiteProgress) -> Calibration:
    """Measure, and conclude what can be concluded.

    Raises:
        DeviceUnavailableError: there is no GPU and ``cpu`` is not set.
    """
    device = open_bench(cpu)
    found = Calibration(describe_environment(cpu=cpu), plan)
    if not cpu:
        found.environment |= sglang_pools.prepare(MODELS[plan.model].components)
    setting = Setting(device, default_policy(), plan.repeats, LEAST_SM_WORK_FIRST)
    jobs: list[tuple[str, Callable[[], None]]] = []
    for layout in LAYOUTS:
        jobs += [(str(case), _sweep(found, setting, case)) for case in plan.cases(layout)]
    case = Case(plan.model, "page_first", 16, plan.tokens, True)
    for name, values in plan.options.items():
        jobs.append(
            (f"hybrid with {name} {', '.join(map(str, values))}", _option(found, setting, case, name))
        )
    for turn in range(plan.rounds):
        for index, (what, job) in enumerate(jobs):
            job()
            say(f"round {turn + 1}: {what}", turn * len(jobs) + index + 1, plan.rounds * len(jobs))
    conclude(found)
    return found


def conclude(found: Calibration) -> None:
    """Fill in ``segments``, ``options`` and ``refused`` from ``times``."""
    for name, times in found.times.items():
        try:
            if name in OPTIONS:
                found.options[name] = best_value(times["hybrid"])
            elif name not in found.refused:
                found.segments[name] = segments(times)
        except InconclusiveError as error:
            found.refused[name] = str(error)


def _sweep(found: Calibration, setting: Setting, case: Case) -> Callable[[], None]:
    # Of one page: where a few shuffled pages meet by chance, the average is a little more.
    size = entry_bytes(replace(case, tokens=case.page_size) if case.fragmented else case)

    def job() -> None:
        rows = bandwidth(setting, case)
        times = found.times.setdefault(case.layout, {})
        for row in rows:
            if "ms" in row.metrics:
                times.setdefault(row.contender, {}).setdefault(size, []).append(row.metrics["ms"].median)
            elif case.layout not in found.refused:
                # A rule would stand before shipped ones, which may have chosen just this backend.
                found.refused[case.layout] = f"{row.contender} was not measured: {_why(row)}"

    return job


def _why(row: Row) -> str:
    return f"{row.case}: {row.reason}"


def _option(found: Calibration, setting: Setting, case: Case, name: str) -> Callable[[], None]:
    def job() -> None:
        memory = setting.memory(case)
        memory.refill()
        task = setting.task(case, memory, forwards_wait=False)
        runs: dict[str, Callable[[], Mapping[str, float]]] = {}
        for value in found.plan.options[name]:
            contender = ours("hybrid", task, {name: value})
            submit = contender.submit
            reason = contender.reason if submit is None else check(memory, task, submit)
            if submit is None or reason is not None:
                found.refused.setdefault(name, f"{value}: {reason}")
            else:
                runs[str(value)] = functools.partial(_numbers, task, submit)
        repeats, failed = interleaved(runs, setting.repeats)
        for text, why in failed.items():
            found.refused.setdefault(name, f"{text}: {why}")
        times = found.times.setdefault(name, {}).setdefault("hybrid", {})
        for text, numbers in repeats.items():
            times.setdefault(int(text), []).append(statistics.median(numbers["ms"]))

    return job


def _numbers(task: Task, submit: Submit) -> Mapping[str, float]:
    return one_write(task, submit)[0]


def quicker(plan: Plan) -> Plan:
    """Fewer sizes and repeats, the same rounds."""
    return replace(plan, page_sizes=tuple(plan.page_sizes)[::2], repeats=2)
