"""What one write costs the scheduler's thread: plan and submit, on a CPU, against a driver that does nothing.

    python -m sglang_hicache.bench.submit_cost [--json] [--repeats 30] [--tokens 64 1024 8192]

Real: the plan, the backends, :class:`~sglang_hicache.io_backends.device.cuda.CudaDevice`, cuda-python, ctypes
and what Triton does in Python for a launch. Replaced, and so not in the figures: the driver (a library that
returns success), torch's streams and events, Triton's launcher in C, SGLang's own kernel. **No figure here is
GPU speed.** A driver that works adds about 0.6 us an entry; the column ``model us`` adds that: a model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from sglang_hicache.bench import idle_gpu
from sglang_hicache.bench.d2h import QWEN3_8B, Case, Model, slots_of
from sglang_hicache.bench.submit_table import DRIVER_US_PER_ENTRY, LOOP_REPEATS, Row, show
from sglang_hicache.io_backends import Component, PoolGeometry, Transfer, get_backend, host_strides

LAYOUTS = ("page_first", "layer_first", "page_first_direct")
PAGE_SIZES = (1, 16, 64)
CONTENDERS = (("hybrid", False), ("hybrid", True), ("copy_engine", False), ("fenced_kernel", False))
NEW_SIZES = 8
"""Writes, each of a page more than the one before."""


def pool_of(model: Model, layout: str, page_size: int, slots: int) -> PoolGeometry:
    """The model's pool at addresses that nobody reads."""
    parts = []
    for index, row in enumerate(model.components):
        base = (1 << 44) + sum(model.components[:index]) * model.layers * slots
        strides = host_strides(
            layout,
            base=base,
            layers=model.layers,
            page_size=page_size,
            slots=slots,
            row_bytes=row,
            heads=model.heads,
        )
        rows = tuple((base << 1) + layer * slots * row for layer in range(model.layers))
        parts.append(Component("kv"[index], row, rows, row, strides))
    return PoolGeometry(
        label="kv",
        kv_kind=model.kv_kind,
        layout=layout,
        dtype="bfloat16",
        heads=model.heads,
        layers=model.layers,
        page_size=page_size,
        host_slots=slots,
        device_slots=slots,
        components=tuple(parts),
    )


def cases(tokens: Sequence[int]) -> Iterator[Case]:
    """The grid. Layouts with pages of one token are the same as others."""
    for layout in LAYOUTS:
        for page_size in PAGE_SIZES:
            for count in tokens:
                for fragmented in (False, True):
                    if layout != "page_first_direct" or page_size > 1:
                        yield Case(QWEN3_8B.name, layout, page_size, count, fragmented)


def measure(case: Case, name: str, forwards_wait: bool, loop_us: float, repeats: int) -> Row | None:
    """Medians over ``repeats`` writes after three to warm up; None where the backend does not serve."""
    import torch

    slots = 2 * case.tokens + (NEW_SIZES + 1) * case.page_size
    geometry = pool_of(QWEN3_8B, case.layout, case.page_size, slots)
    device = idle_gpu.make_device()
    backend: Any = get_backend(name)(device, {})
    if backend.supports(geometry) is not None:
        return None
    device.prepare_copies(geometry)
    backend.prepare(geometry)
    stream = device.new_stream()

    def write(case: Case) -> tuple[float, float, int]:
        """us until submit returned, us in later gaps, entries."""
        host, rows = slots_of(case, slots)
        device_slots = torch.from_numpy(rows)
        ready = device.record(device.current_stream())
        device.launches = 0
        began = time.perf_counter_ns()
        transfer = Transfer(geometry, host, device_slots, (ready,), ready, forwards_wait, lambda: None)
        done = backend.submit(transfer, stream)
        submitted = time.perf_counter_ns()
        # In later gaps all memory is drained: one call enqueues as much as the ring takes.
        rest = 0
        while done.pending is not None and not done.pending.enqueued():
            device.finish_all()
            gap = time.perf_counter_ns()
            backend.advance((ready,))
            rest += time.perf_counter_ns() - gap
        device.finish_all()
        return (submitted - began) / 1e3, rest / 1e3, done.copies

    warmed = [write(case) for _ in range(repeats + 3)][3:]
    launches = device.launches
    first = [
        write(replace(case, tokens=case.tokens + more * case.page_size))[0]
        for more in range(1, NEW_SIZES + 1)
    ]
    submits, rests, entries = [w[0] for w in warmed], [w[1] for w in warmed], warmed[0][2]
    submit, rest_us = statistics.median(submits), statistics.median(rests)
    model = submit + rest_us + DRIVER_US_PER_ENTRY * entries
    return Row(
        case,
        f"{name}, fenced" if forwards_wait else name,
        submit,
        min(submits),
        statistics.quantiles(submits, n=10)[-1],
        statistics.median(first),
        rest_us,
        entries,
        launches,
        model,
        (submit + rest_us) / model,
        loop_us,
        repeats,
    )


def loop_cost(tokens: int) -> float:
    """us of a plain loop: one cuMemcpyDtoHAsync per token, layer and component, addresses at hand."""
    from cuda.bindings import driver as cuda

    count = tokens * QWEN3_8B.layers * len(QWEN3_8B.components)
    addresses = [(1 << 44) + 2048 * n for n in range(count)]
    copy: Callable[..., Any] = cuda.cuMemcpyDtoHAsync
    times = []
    for _ in range(LOOP_REPEATS):
        began = time.perf_counter_ns()
        for address in addresses:
            copy(address, address, 2048, 2)
        times.append((time.perf_counter_ns() - began) / 1e3)
    return statistics.median(times)


def environment() -> dict[str, Any]:
    """What the figures were measured on, and what was not there."""
    import cuda.bindings
    import torch
    import triton

    model = platform.processor() or "unknown"
    described = Path("/proc/cpuinfo")
    if described.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in described.read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    return {
        "ran_on": "CPU; driver, torch's streams and events, and Triton's launcher do nothing",
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda_bindings": cuda.bindings.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def run(tokens: Sequence[int], repeats: int, layouts: Sequence[str] = LAYOUTS) -> list[Row]:
    """Every case and contender; garbage collection is off while it measures, as timeit does it."""
    found: list[Row] = []
    gc.disable()
    try:
        loops = {count: loop_cost(count) for count in tokens}
        for case in cases(tokens):
            if case.layout not in layouts:
                continue
            for name, forwards_wait in CONTENDERS:
                row = measure(case, name, forwards_wait, loops[case.tokens], repeats)
                if row is not None:
                    found.append(row)
            gc.collect()
    finally:
        gc.enable()
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Scheduler-thread cost of one write, without a GPU.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 1024, 8192])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        idle_gpu.install(Path(folder))
        found = run(asked.tokens, asked.repeats, asked.layouts)
        where = environment()
    if asked.json:
        print(json.dumps({"environment": where, "rows": [asdict(row) for row in found]}, indent=1))
    else:
        show(found, where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
