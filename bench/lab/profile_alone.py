"""The parts of one write, each measured alone (:mod:`~.profile`)."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...io_backends.device.gather import Gather
from ...io_backends.plan.chunks import Chunk, staged
from ...io_backends.plan.copies import CopyBatch, run_starts
from ...io_backends.plan.staged_write import drain_runs
from ..measure import sglang_pools
from ..measure.cases import MODELS, Case
from ..measure.devices import Bench, no_collection
from ..measure.memory import KvBuffers
from ..measure.one_write import Setting
from ..measure.results import Spread

CTAS = (8, 16, 32, 64, 132, 192, 264)

GATHERED = (2**23, 2**27, 2**30)
"""Bytes of the chunks that are gathered."""

SHAPES = tuple(itertools.product((4, 8, 16), (4, 8, 16), (132, 192, 264, 528)))
"""Warps a thread block, accesses a thread, thread blocks."""


@dataclass(frozen=True)
class Size:
    """How much is moved: by the drains, the slots they are scattered over, the writes end to end and beside
    forwards."""

    tokens: int
    slots: int
    writes: tuple[Case, ...]
    beside: Case
    long: tuple[Case, ...]
    """Writes that small copies are made beside."""
    turns: tuple[int, ...]
    """Bytes of a turn."""
    ordered: tuple[tuple[str, int, int, int], ...]
    """(model, page size, tokens, slots of both pools)"""
    repeats: int


@dataclass(frozen=True)
class ProfiledPart:
    """One part.

    Attributes:
        part: ``gather``, ``shape``, ``sm_store``, ``order``, ``drain``, ``write``, ``small_copy``,
            ``turns`` or ``beside``.
        what: what was varied, in words.
        metrics: ``ms``, ``gb_per_s`` (of bytes written), ``thread_us`` where it was asked for; of ``write``
            those of ``profile._trace``; of ``small_copy`` and ``turns`` ``ms``, ``gb_per_s`` and
            ``thread_us`` of the write without small copies, and of these ``alone_us``, ``first_us`` right
            after the submission, ``median_us`` and ``most_us``; of ``beside``, and of ``turns`` beside decode
            steps, ``slow_down`` and ``gb_per_s``.
    """

    part: str
    what: str
    metrics: dict[str, Spread]


def gathers(device: Bench, memory: KvBuffers, size: Size) -> Iterator[ProfiledPart]:
    """``gather`` and ``sm_store``; and ``shape``, the longest gather by the shape of its thread blocks."""
    geometry = memory.geometry("page_first", 1)
    device.prepare_gather(geometry)
    stream = device.new_stream()
    slots = np.random.default_rng(0).permutation(size.slots)
    rows = device.indices(slots.astype(np.int64))
    staging = device.allocate_staging(GATHERED[-1] + 2**20)

    def timed(what: Gather | Bench, nbytes: int, base: int, ctas: int) -> dict[str, Spread]:
        tokens = min(nbytes // geometry.bytes_per_token, size.slots)
        place, chunk = staged(geometry, tokens), Chunk(0, tokens)
        if isinstance(what, Gather):  # takes as many blocks as it is told to, unlike the device

            def run() -> None:
                what.launch(place, base, rows, chunk, ctas, stream)

        else:

            def run() -> None:
                what.gather(place, base, rows, chunk, stream, ctas)

        run()  # compiles
        return _timed(device, stream, run, tokens * geometry.bytes_per_token, size.repeats)

    def megabytes(nbytes: int) -> str:
        tokens = min(nbytes // geometry.bytes_per_token, size.slots)
        return f"{tokens * geometry.bytes_per_token / 1e6:.1f} MB"

    on_gpu = device.where != "cpu"
    for nbytes in GATHERED:
        for name, base in (("gather", staging.address), ("sm_store", memory.pinned.data_ptr())):
            for ctas in CTAS:
                done = timed(Gather() if on_gpu else device, nbytes, base, ctas)
                yield ProfiledPart(name, f"{megabytes(nbytes)}, {ctas} blocks", done)
    if on_gpu:
        for warps, units, ctas in SHAPES:
            done = timed(Gather(warps=warps, units_per_thread=units), GATHERED[-1], staging.address, ctas)
            what = f"{megabytes(GATHERED[-1])}, {warps} warps, {units} accesses a thread, {ctas} blocks"
            yield ProfiledPart("shape", what, done)


def drains(device: Bench, memory: KvBuffers, size: Size) -> Iterator[ProfiledPart]:
    """``drain``."""
    stream, second = device.new_stream(), device.new_stream()
    rng = np.random.default_rng(1)
    shapes = [("layer_first", 16), ("layer_first", 64), *(("page_first", page) for page in (1, 4, 16, 64))]
    for layout, page in shapes:
        geometry = memory.geometry(layout, page)
        nbytes = size.tokens * geometry.bytes_per_token
        staging = device.allocate_staging(nbytes + 2**20)
        pages = rng.permutation(size.slots // page)[: size.tokens // page]
        host = (pages[:, None] * page + np.arange(page)).reshape(-1)
        starts = run_starts(host, None, None)
        batch = drain_runs(staged(geometry, len(host)), starts, host[starts], staging.address)
        batch = _in_order(batch, batch.dst.argsort())
        mixed = _in_order(batch, rng.permutation(len(batch)))
        halves = batch.split(-(-len(batch) // 2))

        def on_two(halves: Sequence[CopyBatch] = halves) -> None:
            device.wait(second, device.record(stream))
            for half, each in zip(halves, (stream, second), strict=True):
                device.copy(half, each)
            device.wait(stream, device.record(second))

        ways: dict[str, Callable[[], None]] = {
            "by host address": functools.partial(device.copy, batch, stream),
            "in random order": functools.partial(device.copy, mixed, stream),
            "by host address, halves on two streams": on_two,
        }
        for way, run in ways.items():
            done = _timed(device, stream, run, nbytes, size.repeats)
            what = f"{len(batch):,} copies of {nbytes // len(batch):,} bytes on average, {layout}, {way}"
            yield ProfiledPart("drain", what, done)


def orders(setting: Setting, size: Size) -> Iterator[ProfiledPart]:
    """``order``; nothing where SGLang's kernel cannot run."""
    device = setting.device
    rng = np.random.default_rng(2)
    for name, group in itertools.groupby(size.ordered, lambda each: each[0]):
        cases = list(group)
        memory = KvBuffers(MODELS[name], max(slots for _, _, _, slots in cases), device)
        for _, page, tokens, slots in cases:
            case = Case(name, "layer_first", page, tokens, True)
            task = setting.task(case, memory.part(slots), forwards_wait=False)
            host, rows = (
                (rng.permutation(slots // page)[: tokens // page, None] * page + np.arange(page)).reshape(-1)
                for _ in range(2)
            )
            task = replace(task, host=host, rows=rows, device_slots=device.indices(rows))
            for way, by_host in (("in random order", False), ("by host slot", True)):
                copy = sglang_pools.submission(task, "sglang_kernel", by_host=by_host)
                if isinstance(copy, str):
                    return

                def run(copy: Callable[[], None] = copy, stream: Any = task.stream) -> None:
                    with device.use_stream(stream):
                        copy()

                done = _timed(device, task.stream, run, case.nbytes, size.repeats)
                run_bytes, pool = page * MODELS[name].components[0], slots * MODELS[name].bytes_per_token
                what = f"{name}, {tokens:,} tokens in runs of {run_bytes:,} bytes over {pool / 2**30:.1f} GiB"
                yield ProfiledPart("order", f"{what}, {way}", done)


def _in_order(batch: CopyBatch, order: Any) -> CopyBatch:
    return CopyBatch(batch.dst[order], batch.src[order], batch.nbytes[order])


def _timed(
    device: Bench, stream: Any, run: Callable[[], None], nbytes: int, repeats: int
) -> dict[str, Spread]:
    found: list[tuple[float, float]] = []
    with no_collection():
        for turn in range(repeats + 1):
            device.flush()
            device.synchronize()
            start = device.record(stream)
            began = time.perf_counter_ns()
            run()
            asked = time.perf_counter_ns() - began
            end = device.record(stream)
            device.synchronize()
            if turn:
                found.append((max(start.elapsed_time(end), 1e-6), asked / 1e3))
    return {
        "ms": Spread.of([ms for ms, _ in found]),
        "gb_per_s": Spread.of([nbytes / ms / 1e6 for ms, _ in found]),
        "thread_us": Spread.of([us for _, us in found]),
    }
