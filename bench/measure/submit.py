"""What one write costs the scheduler's thread: planning, the device seam, and the wait for device indices.

On a GPU the driver is real. Without one, a driver that does nothing takes its place, in a process of its own
(:mod:`~.submit_idle`): Python, numpy, cuda-python, ctypes and Triton's Python side are real there, and not in
the figures are the driver's own work, torch's streams and events, and Triton's launcher in C.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .cases import Case
from .contenders import Submit, Task, contenders, reason_of
from .one_write import Setting, row_of
from .results import Row
from .stand_ins import StandIn, launches, stand_ins
from .timing import interleaved, spreads

HOST_VALUES = "host_values"
"""Not a contender: what ``copy_engine`` does before it can plan, alone."""

IN_FLIGHT_MS = 20.0
"""Forwards in flight while device indices are asked for: a wait that is as long waited for them."""


class Metered:
    """A device that adds up the time spent inside it while :attr:`on`; everything else is the device's own.

    While on, it adds about 0.2 us a call to what it measures (a CPython call and two clock readings); while
    off, nothing.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._names: list[str] = []
        self._on = False
        self.inside_ns = 0

    @property
    def on(self) -> bool:
        """Whether calls are timed."""
        return self._on

    @on.setter
    def on(self, on: bool) -> None:
        self._on = on
        for name in self._names:
            self._offer(name)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._device, name)
        if not callable(value):
            return value
        self._names.append(name)
        return self._offer(name)

    def _offer(self, name: str) -> Any:
        """Let ``name`` be found by normal lookup from now on."""
        value = getattr(self._device, name)
        offered = self._timed(value) if self._on else value
        setattr(self, name, offered)
        return offered

    def _timed(self, value: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(value)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter_ns()
            try:
                return value(*args, **kwargs)
            finally:
                self.inside_ns += time.perf_counter_ns() - began

        return timed


def submit(setting: Setting, case: Case) -> list[Row]:
    """Every contender's submission on idle streams, and the wait for device indices alone."""
    task = setting.task(case, setting.memory(case))
    rows = submissions(setting, task)
    return rows + _index_waits(setting, task)


def submissions(setting: Setting, task: Task) -> list[Row]:
    """Submissions of one case by every contender."""
    metered = Metered(task.device)
    inside = replace(task, device=metered)
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[[], Mapping[str, float]]] = {}
    for contender in contenders(inside, setting.wanted):
        row = rows[contender.name] = row_of("submit", task, contender)
        if contender.submit is not None:
            runs[contender.name] = functools.partial(
                _one, task, contender.submit, metered if contender.ours else None, row
            )
    found, failed = interleaved(runs, setting.repeats)
    for name, repeats in found.items():
        rows[name].metrics = spreads(repeats)
    for name, reason in failed.items():
        rows[name].reason = reason
    return list(rows.values())


def _one(task: Task, submit: Submit, metered: Metered | None, row: Row) -> Mapping[str, float]:
    submitted, later, row.copies = _submission(task, submit)
    numbers = {"submit_us": submitted / 1e3, "later_us": later / 1e3}
    if metered is not None:
        # Once more with the meter on, for the device's share alone: it makes what it measures longer.
        metered.on, metered.inside_ns = True, 0
        inside: list[int] = []
        total, _, _ = _submission(task, submit, lambda: inside.append(metered.inside_ns))
        metered.on = False
        device = numbers["submit_us"] * inside[0] / total
        numbers |= {"plan_us": numbers["submit_us"] - device, "device_us": device}
    return numbers


def _submission(
    task: Task, submit: Submit, told: Callable[[], None] = lambda: None
) -> tuple[int, int, int | None]:
    """ns of the thread until ``submit`` returned, after which ``told`` is called, and for the gaps behind it;
    and how many copies."""
    device = task.device
    device.synchronize()
    with device.use_stream(task.stream):
        began = time.perf_counter_ns()
        done = submit(lambda event: None)
        submitted = time.perf_counter_ns() - began
        told()
        later, gaps = 0, done.more is not None
        while gaps and done.more is not None:
            # In a later gap all memory is drained: one call enqueues as much as the ring takes.
            device.synchronize()
            began = time.perf_counter_ns()
            gaps = not done.more()
            later += time.perf_counter_ns() - began
    device.synchronize()
    return submitted, later, done.copies


def _index_waits(setting: Setting, task: Task) -> list[Row]:
    """``device.host_values`` with the GPU idle, and with forwards in flight on another stream."""
    device, stream = task.device, task.device.forward_stream()
    rows = [index_row(task, None)]
    runs: dict[str, Callable[[], Mapping[str, float]]] = {"idle": functools.partial(index_wait, task)}
    missing: dict[str, str] = {}
    for stand_in in stand_ins(device):
        if not stand_in.full or stand_in.ids:
            continue
        rows.append(index_row(task, stand_in.name))
        try:
            times = launches(device, stand_in, stream, IN_FLIGHT_MS)
        except Exception as error:  # a stand-in that this GPU or torch does not have
            missing[stand_in.name] = reason_of(error)
        else:
            runs[stand_in.name] = functools.partial(_beside, task, stand_in, stream, times)
    found, failed = interleaved(runs, setting.repeats)
    for row in rows:
        name = row.forward or "idle"
        row.metrics, row.reason = spreads(found.get(name, {})), missing.get(name) or failed.get(name)
    return rows


def _beside(task: Task, stand_in: StandIn, stream: Any, times: int) -> Mapping[str, float]:
    with task.device.use_stream(stream):
        for _ in range(times):
            stand_in.run()
    numbers = index_wait(task)
    task.device.synchronize()
    return numbers


def index_wait(task: Task) -> Mapping[str, float]:
    """One wait for the device indices of the case."""
    device = task.device
    ready = device.record(device.current_stream())
    began = time.perf_counter_ns()
    device.host_values(task.device_slots, ready)
    return {"values_us": (time.perf_counter_ns() - began) / 1e3}


def index_row(task: Task, forward: str | None) -> Row:
    """A row of :data:`HOST_VALUES` without figures."""
    return Row("submit", task.case, HOST_VALUES, forward=forward, backend="copy_engine")
