"""Write-back that must keep pace: forwards back to back, each of which leaves rows to write.

A stand-in forward (matrix products for a prefill, passes over memory for a decode step) of a given length
runs in the loop of :mod:`~.overlap`. Unlike in the other measurements SGLang's own copies are taken as
SGLang runs them, without a fence for forwards: ``safe`` says where that breaks the policy's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...io_backends.registry import AUTO
from . import sglang_pools
from .cases import Case
from .contenders import Task, reason_of
from .devices import Bench
from .one_write import Setting
from .overlap import WARM_CYCLES, ForwardStep, loop_metrics, run, series
from .patterns import LEAST_CYCLES, PATTERNS, whole_pages
from .results import WRONG, Row, Spread
from .timing import interleaved, spreads
from .writers import CannotError, OwnWriter, UpstreamWriter, writer

ALONE = "alone"
CONTENDERS = (AUTO, "hybrid", "fenced_kernel", *sglang_pools.CONTENDERS)
"""What takes part unless others are asked for: the rest would take seconds for one step's rows."""

SECONDS = 4.0
"""Of a loop on a GPU."""

_CPU_SHARE = 64
"""On a CPU a step leaves that part of its tokens."""


@dataclass
class Forwards:
    """Launches stand-ins; ``per_ms`` of a launch: by decode or not."""

    prefill: Callable[[], Any]
    decode: Callable[[], Any]
    launch_ms: Mapping[bool, float]

    def launch(self, step: ForwardStep) -> None:
        once = self.decode if step.decode else self.prefill
        for _ in range(max(1, round(step.ms / self.launch_ms[step.decode]))):
            once()


class _TorchIds:
    """128 ids of each of two steps in turn."""

    def __init__(self, device: Bench) -> None:
        import torch

        self._ids = torch.zeros((2, 128), dtype=torch.int64, device=device.where)
        self._host = torch.empty((2, 128), dtype=torch.int64, pin_memory=device.where == "cuda")

    def copy(self, step: int) -> None:
        self._host[step % 2].copy_(self._ids[step % 2], non_blocking=True)


def chosen(only: tuple[str, ...] | None = None) -> list[str]:
    """Names of the patterns, or of those whose first word is in ``only``."""
    return [name for name in PATTERNS if only is None or name.split()[0] in only]


def sustained(setting: Setting, case: Case, name: str, seconds: float = SECONDS) -> list[Row]:
    """A pattern beside every contender.

    Args:
        setting: of the run.
        case: its tokens are the pattern's.
        name: of the pattern.
        seconds: of a loop; on a CPU the fewest cycles.
    """
    on_cpu = setting.device.where == "cpu"
    pattern = PATTERNS[name]
    if on_cpu:
        pattern = tuple(replace(step, tokens=max(1, step.tokens // _CPU_SHARE)) for step in pattern)
    pattern = whole_pages(pattern, case.page_size)
    cycle_s = sum(step.ms for step in pattern) / 1e3
    cycles = LEAST_CYCLES if on_cpu else max(LEAST_CYCLES, math.ceil(seconds / cycle_s))
    largest = max(step.tokens for step in pattern)
    return _pattern(setting, replace(case, tokens=largest), name, pattern, cycles, _forwards(setting.device))


def _pattern(
    setting: Setting, case: Case, name: str, pattern: tuple[ForwardStep, ...], cycles: int, forwards: Forwards
) -> list[Row]:
    memory = setting.memory(case)
    memory.refill()
    device = setting.device
    task = setting.task(case, memory)
    tasks = {tokens: _first(task, tokens) for tokens in {step.tokens for step in pattern}}
    streams = (device.forward_stream(), device.forward_stream(), device.forward_stream())
    ids = _TorchIds(device)
    runs: dict[str, Callable[[], Mapping[str, float]]] = {}
    rows: dict[str, Row] = {}

    def loop(who: OwnWriter | UpstreamWriter | None, row: Row | None, times: int) -> Mapping[str, float]:
        trace = run(
            device, pattern * times, forwards.launch, ids, streams, who, task.geometry.bytes_per_token
        )
        if row is not None:
            row.series = [list(point) for point in series(trace)]
        return loop_metrics(trace, len(pattern))

    runs[ALONE] = functools.partial(loop, None, None, cycles)
    for contender in setting.wanted or CONTENDERS:
        row = rows[contender] = Row(
            "sustained", case, contender, forward=name, entry_bytes=task.facts.entry_bytes
        )
        row.fenced = task.forwards_wait
        try:
            made = writer(contender, tasks)
            memory.poison()
            loop(made, None, WARM_CYCLES + 1)
            wrong = memory.wrong_bytes(task.geometry, task.host, task.rows)
        except CannotError as error:
            row.reason = str(error)
            continue
        except Exception as error:  # a contender that fails is a row with a reason
            row.reason = reason_of(error)
            continue
        row.backend = made.backend
        row.safe = made.forwards_wait or not made.sm_work or not task.forwards_wait
        if wrong is not None:
            row.reason = f"{WRONG}: {wrong}"
            continue
        row.checked = True
        runs[contender] = functools.partial(loop, made, row, cycles)
    found, failed = interleaved(runs, setting.repeats)
    alone = found.pop(ALONE, None)
    for contender, repeats in found.items():
        rows[contender].metrics = spreads(repeats)
        if alone is not None:
            _beside(rows[contender].metrics, Spread.of(alone["cycle_ms"]), pattern, task)
    for contender, reason in failed.items():
        for row in [rows[contender]] if contender in rows else rows.values():
            row.reason = row.reason or reason
    return list(rows.values())


def _beside(metrics: dict[str, Spread], alone: Spread, pattern: tuple[ForwardStep, ...], task: Task) -> None:
    """What takes the loop without write-back to say."""
    beside = metrics["cycle_ms"]
    metrics["slow_down"] = Spread(
        beside.median / alone.median, beside.low / alone.high, beside.high / alone.low, beside.n
    )
    nbytes = sum(step.tokens for step in pattern) * task.geometry.bytes_per_token
    metrics["asked_gb_per_s"] = Spread(
        nbytes / alone.median / 1e6, nbytes / alone.high / 1e6, nbytes / alone.low / 1e6, alone.n
    )


def _first(task: Task, tokens: int) -> Task:
    """The same pool's write of the first ``tokens``."""
    rows = task.rows[:tokens]
    return replace(
        task,
        case=replace(task.case, tokens=tokens),
        host=task.host[:tokens],
        rows=rows,
        device_slots=task.device.indices(rows),
    )


def _forwards(device: Bench) -> Forwards:
    import torch

    on_cpu = device.where == "cpu"
    size, elements = (64, 2**12) if on_cpu else (8192, 2**28)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device.where) for _ in range(2))
    out = torch.empty_like(a)
    big = torch.ones(elements, dtype=torch.float32, device=device.where)
    made = Forwards(lambda: torch.matmul(a, b, out=out), lambda: big.mul_(1.0000001), {False: 1e9, True: 1e9})
    if not on_cpu:
        made.launch_ms = {False: _ms(device, made.prefill), True: _ms(device, made.decode)}
    return made


def _ms(device: Bench, once: Callable[[], Any]) -> float:
    """Of a launch, after half a second of them: a GPU that is warm is slower."""
    stream = device.forward_stream()
    took, times = 0.0, 10
    while took < 500:
        with device.use_stream(stream):
            begin = device.record(stream)
            for _ in range(times):
                once()
            end = device.record(stream)
        end.synchronize()
        took, times = begin.elapsed_time(end), 2 * times
    return took / (times / 2)
