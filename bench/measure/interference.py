"""How much a forward slows down beside write-back that never stops.

Forwards are enqueued ahead, back to back; writes follow each other on the transfer stream until they end. No
forward waits for anything: this is the price of sharing the GPU, and :func:`~.one_write.fence` has that of
waiting.

Decode steps are launched as SGLang's overlap scheduler does: the ids of a step are copied to the host on a
stream of their own, and the thread, which also submits the writes, waits for them while the next step runs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

from .cases import Case
from .contenders import Submit, Task, contenders, reason_of
from .devices import Bench
from .one_write import Setting, check, row_of
from .results import Row, Spread
from .stand_ins import StandIn, launches, stand_ins
from .timing import interleaved, spreads

LONG_MS = 100.0
"""All forwards of one repeat on a GPU: several writes run beside them (604 MB take 11 ms at 55 GB/s)."""

ALONE = "alone"

Streams = tuple[Any, Any]

IDS = 128
"""Requests that decode at once: an id of each is copied."""


def interference(setting: Setting, case: Case, only: tuple[str, ...] | None = None) -> list[Row]:
    """Each stand-in beside each contender; ``only`` these stand-ins, by the first word of their names."""
    memory = setting.memory(case)
    memory.refill()
    task = setting.task(case, memory, forwards_wait=False)
    made: dict[str, Submit] = {}
    rows: list[Row] = []
    could_not: dict[str, str] = {}
    templates = {each.name: each for each in contenders(task, setting.wanted)}
    for name, contender in templates.items():
        if contender.submit is None:
            could_not[name] = str(contender.reason)
        elif (wrong := check(memory, task, contender.submit)) is not None:
            could_not[name] = wrong
        else:
            made[name] = contender.submit
    # The forwards', and the one that their token ids are copied on.
    streams = (setting.device.forward_stream(), setting.device.forward_stream())
    for stand_in in stand_ins(setting.device):
        if only is not None and stand_in.name.split()[0].rstrip(",") not in only:
            continue
        found, failed = _beside(setting, task, stand_in, made, streams)
        for name, contender in templates.items():
            row = row_of("interference", task, contender)
            row.forward, row.checked = stand_in.name, name in made
            row.safe = row.fenced = None  # fences are left out here on purpose
            row.metrics = found.get(name, {})
            row.reason = could_not.get(name) or failed.get(name) or failed.get(ALONE)
            rows.append(row)
    return rows


def _beside(
    setting: Setting, task: Task, stand_in: StandIn, submits: Mapping[str, Submit], streams: Streams
) -> tuple[dict[str, dict[str, Spread]], dict[str, str]]:
    """Metrics of each contender, and why some have none."""
    try:
        times = launches(task.device, stand_in, streams[0], LONG_MS)
    except Exception as error:  # a stand-in that this GPU or torch does not have
        return {}, {ALONE: f"stand-in {stand_in.name}: {reason_of(error)}"}
    runs: dict[str, Callable[[], Mapping[str, float]]] = {
        ALONE: functools.partial(_one, task, stand_in, None, streams, times)
    }
    runs |= {
        name: functools.partial(_one, task, stand_in, submit, streams, times)
        for name, submit in submits.items()
    }
    found, failed = interleaved(runs, setting.repeats)
    alone = found.pop(ALONE, None)
    if alone is None:
        return {}, failed
    base = Spread.of(alone["forward_ms"])
    metrics = {name: spreads(each) for name, each in found.items()}
    for each in metrics.values():
        beside = each["forward_ms"]
        # The spread of the quotient is that of both: slowest beside against fastest alone, and the reverse.
        each["slow_down"] = Spread(
            beside.median / base.median, beside.low / base.high, beside.high / base.low, beside.n
        )
    return metrics, failed


def _one(
    task: Task, stand_in: StandIn, submit: Submit | None, streams: Streams, times: int
) -> Mapping[str, float]:
    device = task.device
    device.synchronize()
    writes = _Writes(task, submit)
    run = _steps if stand_in.ids else _ahead
    begin, end = run(device, stand_in, streams, times, writes.keep_going)
    device.synchronize()
    return {"forward_ms": begin.elapsed_time(end) / times, **writes.rate()}


class _Writes:
    """Writes that follow each other."""

    def __init__(self, task: Task, submit: Submit | None) -> None:
        self._task, self._submit, self._sent = task, submit, 0
        self._first = self._last = task.device.record(task.stream)

    def keep_going(self) -> None:
        """Submit one if the last is complete."""
        device, stream = self._task.device, self._task.stream
        if self._submit is None or (self._sent and not device.query(self._last)):
            return
        with device.use_stream(stream):
            self._submit(lambda event: None)
            self._last = device.record(stream)
        self._sent += 1

    def rate(self) -> Mapping[str, float]:
        """``gb_per_s`` of all of them, which are complete."""
        if not self._sent:
            return {}
        nbytes = self._sent * len(self._task.host) * self._task.geometry.bytes_per_token
        return {"gb_per_s": nbytes / max(self._first.elapsed_time(self._last), 1e-6) / 1e6}


def _ahead(
    device: Bench, stand_in: StandIn, streams: Streams, times: int, meanwhile: Callable[[], None]
) -> tuple[Any, Any]:
    """Launch all, then wait. Events before the first and after the last."""
    stream, _ = streams
    with device.use_stream(stream):
        begin = device.record(stream)
        for _ in range(times):
            stand_in.run()
        end = device.record(stream)
    meanwhile()
    while not device.query(end):
        meanwhile()
        time.sleep(0)
    return begin, end


def _steps(
    device: Bench, stand_in: StandIn, streams: Streams, times: int, meanwhile: Callable[[], None]
) -> tuple[Any, Any]:
    """Launch one, wait for the ids of the one before, and so on. Events before the first, after the last."""
    import torch

    stream, copies = streams
    ids = torch.zeros((2, IDS), dtype=torch.int64, device=device.where)
    on_host = torch.empty((2, IDS), dtype=torch.int64, pin_memory=device.where == "cuda")
    device.synchronize()
    begin = end = device.record(stream)
    arrived = None
    for step in range(times):
        with device.use_stream(stream):
            stand_in.run()
            end = device.record(stream)
        device.wait(copies, end)
        with device.use_stream(copies):
            on_host[step % 2].copy_(ids[step % 2], non_blocking=True)
        before, arrived = arrived, device.record(copies)
        meanwhile()
        while before is not None and not device.query(before):
            meanwhile()
    return begin, end
