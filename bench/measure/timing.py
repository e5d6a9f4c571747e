"""Repeats of one write, interleaved over the contenders, and the ceilings that rates are held to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from .contenders import Submit, Task, reason_of
from .devices import Bench, no_collection
from .results import Spread

ENOUGH_S = 3.0
"""A contender that took this long in all is not repeated any further, once it has two repeats."""

Repeat = Mapping[str, float]
"""One repeat: metrics by name."""


def interleaved(
    runs: Mapping[str, Callable[[], Repeat]],
    repeats: int,
    *,
    enough_s: float = ENOUGH_S,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Repeat every run, one after the other in turns, so that drift of the machine touches all alike.

    The first turn warms up and is not counted. Nobody follows the same other one in most turns
    (:func:`turn_order`): who comes after a run that kept the CPU busy for a second finds nothing of its own
    in the caches, which slows a short write by several per cent.

    Returns:
        For each run that never failed the repeats of each metric; for the others the reason.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    failed: dict[str, str] = {}
    spent = dict.fromkeys(runs, 0.0)
    counted = dict.fromkeys(runs, 0)
    order = list(runs)
    with no_collection():
        for turn in range(repeats + 1):
            for name in (order[nth] for nth in turn_order(len(order), turn)):
                if name in failed or (counted[name] > 1 and spent[name] > enough_s):
                    continue
                began = clock()
                try:
                    numbers = runs[name]()
                except Exception as error:  # a contender that fails is a row with a reason
                    failed[name] = reason_of(error)
                    continue
                spent[name] += clock() - began
                if turn:
                    counted[name] += 1
                    for metric, value in numbers.items():
                        found[name].setdefault(metric, []).append(value)
    return {name: each for name, each in found.items() if name not in failed}, failed


def turn_order(count: int, turn: int) -> list[int]:
    """Who runs when in a turn: a row of a Williams square (E. J. Williams, 1949), every other one mirrored.

    From five contenders on, nobody follows the same other one in more than two of five turns.
    """
    first = [nth // 2 if nth % 2 == 0 else count - 1 - nth // 2 for nth in range(count)]
    row = [(each - turn) % count for each in first]
    return row[::-1] if turn % 2 else row


def spreads(repeats: Mapping[str, list[float]]) -> dict[str, Spread]:
    """Median and spread of each metric."""
    return {name: Spread.of(values) for name, values in repeats.items()}


def one_write(
    task: Task, submit: Submit, *, fence_stream: Any = None, poll: bool = False
) -> tuple[Repeat, Any]:
    """One write on idle streams, and what it took.

    Args:
        task: the case.
        submit: the contender's.
        fence_stream: the stream of forwards that wait for SM work; without it none does, and no stall is
            measured.
        poll: wait for completion as a scheduler does, by asking again and again, which gives ``ack_us``.

    Returns:
        The metrics, and the number of copies where it is known.
    """
    device, stream = task.device, task.stream
    waits: list[tuple[Any, Any]] = []

    def fence(event: Any) -> None:
        if fence_stream is not None:
            reached = device.record(fence_stream)
            device.wait(fence_stream, event)
            waits.append((reached, device.record(fence_stream)))

    device.flush()
    device.synchronize()
    with device.use_stream(stream):
        start = device.record(stream)
        began = time.perf_counter_ns()
        done = submit(fence)
        submitted = time.perf_counter_ns()
        while done.more is not None and not done.more():
            pass
        end = device.record(stream)
    if poll:
        while not device.query(end):
            pass
    else:
        end.synchronize()
    finished = time.perf_counter_ns()
    device.synchronize()
    ms = max(start.elapsed_time(end), 1e-6)
    numbers = {
        "ms": ms,
        "gb_per_s": len(task.host) * task.geometry.bytes_per_token / ms / 1e6,
        "submit_us": (submitted - began) / 1e3,
    }
    if poll:
        numbers["ack_us"] = (finished - began) / 1e3
    if fence_stream is not None:
        stalls = [reached.elapsed_time(released) for reached, released in waits] or [0.0]
        numbers["stall_ms"] = max(stalls)
        numbers["stall_total_ms"] = sum(stalls)
        numbers["held_ms"] = start.elapsed_time(waits[0][1]) if waits else 0.0
    return numbers, done.copies


def link_ceiling(device: Bench, nbytes: int, repeats: int = 5) -> Spread:
    """GB/s of one large copy to (pinned) host memory."""
    import torch

    source = torch.empty(nbytes, dtype=torch.uint8, device=device.where).random_(0, 256)
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.where == "cuda")
    return _rate(device, lambda: target.copy_(source, non_blocking=True), nbytes, repeats)


def memory_ceiling(device: Bench, nbytes: int, repeats: int = 5) -> Spread:
    """GB/s of a large copy within device memory, bytes read plus bytes written."""
    import torch

    source = torch.empty(nbytes, dtype=torch.uint8, device=device.where).random_(0, 256)
    target = torch.empty_like(source)
    return _rate(device, lambda: target.copy_(source), 2 * nbytes, repeats)


def _rate(device: Bench, run: Callable[[], Any], nbytes: int, repeats: int) -> Spread:
    rates = []
    stream = device.current_stream()
    for _ in range(repeats + 1):
        start = device.record(stream)
        run()
        end = device.record(stream)
        end.synchronize()
        rates.append(nbytes / max(start.elapsed_time(end), 1e-6) / 1e6)
    return Spread.of(rates[1:])
