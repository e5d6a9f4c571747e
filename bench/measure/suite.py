"""Which cases are measured, in which order, within a time budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...io_backends.policy_files import policy_in_force
from . import sglang_pools, submit_idle
from .cases import LAYOUTS, MODELS, Case, grid
from .contenders import reason_of
from .devices import open_bench
from .environment import describe_environment
from .interference import interference
from .judge import judge
from .one_write import MEASURED, Setting
from .results import Results, Row
from .submit import submit
from .sustained import SECONDS, chosen, sustained
from .timing import link_ceiling, memory_ceiling

SuiteProgress = Callable[[str, float, float], None]
"""Told what was found: a line, how much is done, and of how much."""


@dataclass(frozen=True)
class Grid:
    """Cases of a measurement; every combination is one."""

    models: Sequence[str] = ("Qwen3-8B",)
    layouts: Sequence[str] = ("page_first",)
    page_sizes: Sequence[int] = (16,)
    tokens: Sequence[int] = (4096,)
    fragmented: Sequence[bool] = (True,)
    attention: Sequence[str] = ("triton",)

    def cases(self) -> list[Case]:
        return list(
            grid(self.models, self.layouts, self.page_sizes, self.tokens, self.fragmented, self.attention)
        )


GRIDS = {
    "bandwidth": Grid(
        models=("Qwen3-8B", "DeepSeek-V3"),
        layouts=LAYOUTS,
        page_sizes=(1, 16, 64),
        tokens=(4096, 512, 32768),
        fragmented=(False, True),
    ),
    # fa3: the attention backend whose forwards wait by a report.
    "fence": Grid(page_sizes=(8,), tokens=(8, 64, 512, 4096, 28672), attention=("fa3",)),
    # Pages of 64: in layer_first copies are long enough for copy_engine to move bytes at the link's rate.
    "interference": Grid(
        layouts=("page_first", "layer_first"), page_sizes=(64,), tokens=(8192,), attention=("fa3",)
    ),
    "submit": Grid(layouts=("page_first", "layer_first"), page_sizes=(1, 16, 64), tokens=(64, 4096)),
    "latency": Grid(page_sizes=(1, 16, 64), tokens=(64,), attention=("triton", "fa3")),
    # Tokens are those of its patterns of forwards.
    "sustained": Grid(models=("Qwen3-8B", "DeepSeek-V3"), page_sizes=(1, 64), attention=("fa3",)),
}
"""What is measured on a GPU when nothing is said."""

WEIGHTS = {
    "bandwidth": 5.0,
    "interference": 3.0,
    "fence": 1.5,
    "submit": 1.0,
    "latency": 0.5,
    "sustained": 6.0,
}
"""Shares of the time budget."""

_CPU_TOKENS = {"bandwidth": (256,), "fence": (8, 64, 512), "interference": (256,), "latency": (64,)}


@dataclass(frozen=True)
class MeasureOptions:
    """What to measure.

    Attributes:
        measurements: names in :data:`GRIDS`.
        cpu: measure on the CPU, to exercise the code.
        only: fields of :class:`Grid` that replace a measurement's own.
        wanted: names of contenders; None for all.
        options: of this project's backends, by backend.
        policy: path of a policy file, or None for the one in force.
        repeats: of every contender in every case, after one to warm up.
        budget_s: seconds for all measurements together.
        quick: one case or two of each measurement.
        stand_ins: the forwards of ``interference`` and ``sustained``, by first word; None for all.
        seconds: of a loop of ``sustained``.
    """

    measurements: Sequence[str]
    cpu: bool
    only: Mapping[str, Any] = field(default_factory=dict)
    wanted: Collection[str] | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    policy: str | None = None
    repeats: int = 5
    budget_s: float = 300.0
    quick: bool = False
    stand_ins: tuple[str, ...] | None = None
    seconds: float = SECONDS

    def cases(self, measurement: str) -> list[Case]:
        """The cases of one measurement."""
        wanted = GRIDS[measurement]
        if self.cpu:
            wanted = replace(wanted, tokens=_CPU_TOKENS.get(measurement, wanted.tokens))
        if self.quick:
            wanted = replace(
                wanted,
                models=wanted.models[:1],
                layouts=wanted.layouts[:1],
                page_sizes=(16,) if 16 in wanted.page_sizes else wanted.page_sizes[:1],
                tokens=wanted.tokens[:1] if measurement != "fence" else wanted.tokens[1:3],
                fragmented=(True,),
                attention=wanted.attention[:1],
            )
        return replace(wanted, **{name: tuple(values) for name, values in self.only.items()}).cases()


def measure(
    ask: MeasureOptions, say: SuiteProgress, save: Callable[[Results], None] = lambda run: None
) -> Results:
    """Everything that was asked for; ``save`` is called after each part of it (a case, of ``sustained`` a
    pattern of it), so that who is killed loses no more than the part that ran.

    Each measurement has its share of the time budget, and what others left of theirs. A part is not begun
    where the one before it took longer than what is left; it is a row that says so.

    Raises:
        DeviceUnavailableError: there is no GPU and ``cpu`` is not set.
        PolicyError: the policy cannot be used.
    """
    device = open_bench(ask.cpu)
    run = Results(describe_environment(cpu=ask.cpu))
    setting = Setting(device, policy_in_force(ask.policy), ask.repeats, ask.wanted, ask.options)
    run.environment["policy"] = setting.policy.source
    link_bytes, memory_bytes = (2**24, 2**24) if ask.cpu else (2**30, 2**31)
    run.ceilings["link"] = setting.link = link_ceiling(device, link_bytes)
    run.ceilings["hbm"] = memory_ceiling(device, memory_bytes)
    if not ask.cpu:
        rows = {row for model in MODELS.values() for row in model.components}
        run.environment |= sglang_pools.prepare(rows)
    say(
        f"one large copy to the host {setting.link.median:.1f} GB/s, within device memory "
        f"{run.ceilings['hbm'].median:.0f} GB/s",
        0,
        1,
    )
    deadline = time.monotonic() + ask.budget_s
    for index, name in enumerate(ask.measurements):
        left = sum(WEIGHTS[each] for each in ask.measurements[index:])
        until = time.monotonic() + max(0.0, deadline - time.monotonic()) * WEIGHTS[name] / left
        for found in _measurement(ask, setting, name, until, say):
            judge(found)
            run.rows += found
            save(run)
    return run


def _measurement(
    ask: MeasureOptions, setting: Setting, name: str, until: float, say: SuiteProgress
) -> Iterator[list[Row]]:
    """The rows of each part, as soon as it is measured."""
    cases = ask.cases(name)
    if name == "submit" and ask.cpu:
        yield _submit_idle(ask, cases, say)
        return
    parts = [(case, forward) for case in cases for forward in _forwards(ask, name)]
    took = 0.0
    for index, (case, forward) in enumerate(parts):
        began = time.monotonic()
        if began + took > until:
            yield [Row(name, case, "all", forward=forward, reason="the time budget was spent")]
            continue
        try:
            found = _part(ask, setting, name, case, forward)
        except Exception as error:  # a case that cannot be set up is a row with a reason
            found = [Row(name, case, "all", forward=forward, reason=reason_of(error))]
        took = time.monotonic() - began
        yield found
        say(_line(name, case, found), index + 1, len(parts))


def _forwards(ask: MeasureOptions, name: str) -> Sequence[str | None]:
    """The forwards of which each is a part of its own: those of ``sustained`` take a minute or two."""
    return chosen(ask.stand_ins) if name == "sustained" else [None]


def _part(ask: MeasureOptions, setting: Setting, name: str, case: Case, forward: str | None) -> list[Row]:
    if name == "interference":
        return interference(setting, case, ask.stand_ins)
    if forward is not None:
        return sustained(setting, case, forward, ask.seconds)
    if name == "submit":
        return submit(setting, case)
    return MEASURED[name](setting, case)


def _submit_idle(ask: MeasureOptions, cases: list[Case], say: SuiteProgress) -> list[Row]:
    try:
        rows = submit_idle.measure(
            cases, repeats=ask.repeats, policy=ask.policy, wanted=ask.wanted, options=ask.options
        )
    except RuntimeError as error:
        rows = [Row("submit", case, "all", reason=str(error)) for case in cases]
    say(f"submit: {len(cases)} cases against a driver that does nothing", len(cases), len(cases))
    return rows


SHOWN = {
    "bandwidth": ("gb_per_s", "{:.1f} GB/s"),
    "fence": ("stall_ms", "{:.2f} ms"),
    "interference": ("slow_down", "{:.2f}x"),
    "submit": ("submit_us", "{:.0f} us"),
    "latency": ("ack_us", "{:.0f} us"),
    "sustained": ("kept_gb_per_s", "{:.2f} GB/s"),
}
"""By measurement, the metric that is shown first, and how."""


def _line(name: str, case: Case, rows: Sequence[Row]) -> str:
    metric, shape = SHOWN[name]
    parts = []
    for row in rows:
        who = row.contender if row.forward is None else f"{row.contender} beside {row.forward}"
        if metric in row.metrics:
            parts.append(f"{who} {shape.format(row.metrics[metric].median)}")
    why = rows[0].reason if rows else "nothing was asked for"
    return f"{name}: {case}: {', '.join(parts) or why}"
