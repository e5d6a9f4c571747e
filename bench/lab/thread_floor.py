"""What a write takes of the scheduler's thread, and how much of that is the driver's own.

    python -m sglang_hicache.bench.lab.thread_floor --out thread_floor.json [--cpu]

For writes of ``hybrid`` that forwards wait for, each on an idle GPU and with a ring that holds all of it:

thread_us    the submission, all of it
copies_us    asking for the copies that drain it, in turns (:mod:`~.copy_interleaving`), from Python
compiled_us  the same calls of the driver from compiled code, which nvcc makes here: no submission on this
             thread can take less, whatever it is written in
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...io_backends.device.host_memory import SHORT
from ...io_backends.plan.copies import CopyBatch
from ...io_backends.plan.staged_write import WritePlan
from ...io_backends.policy_files import default_policy
from ..measure.cases import Case
from ..measure.contenders import contenders
from ..measure.devices import Bench, no_collection, open_bench
from ..measure.one_write import Setting
from ..measure.results import Spread
from ..measure.tables import markdown_row
from ..measure.timing import one_write
from .trial import SavedRows, parsed, parser_of

_SOURCE = """
#include <cuda.h>
extern "C" int turns(size_t n, const CUdeviceptr* dst, const CUdeviceptr* src, const size_t* bytes,
                     const size_t* first, size_t turns, int batched, CUstream* streams, CUevent* events) {
    CUmemcpyAttributes how = {};
    how.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    how.flags = CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE;
    size_t begin = 0;
    for (size_t turn = 0; turn < turns; ++turn) {
        CUstream now = streams[turn % 2];
        size_t at = first[turn], count = (turn + 1 < turns ? first[turn + 1] : n) - at;
        if (turn && (cuEventRecord(events[(turn - 1) % 2], streams[(turn - 1) % 2])
                     || cuStreamWaitEvent(now, events[(turn - 1) % 2], 0))) return 1;
        if (!batched) {
            for (size_t i = at; i < at + count; ++i)
                if (cuMemcpyAsync(dst[i], src[i], bytes[i], now)) return 2;
        } else if (cuMemcpyBatchAsync((CUdeviceptr*)dst + at, (CUdeviceptr*)src + at, (size_t*)bytes + at,
                                      count, &how, &begin, 1,
#if CUDA_VERSION < 13000
                                      nullptr,
#endif
                                      now)) return 3;
    }
    return 0;
}
"""


def in_turns(batch: CopyBatch, quantum: int) -> tuple[CopyBatch, npt.NDArray[np.uint64]]:
    """``batch`` cut where turns of ``quantum`` bytes end, and the first copy of each turn.

    Args:
        batch: at least one copy, none of them empty.
        quantum: bytes, at least 1.
    """
    ends = np.cumsum(batch.nbytes.view(np.int64))
    total = int(ends[-1])
    edges = np.union1d(np.concatenate(([0], ends)), np.arange(0, total, quantum))
    begins = edges[:-1]
    of = ends.searchsorted(begins, side="right")
    inside = (begins - ends[of] + batch.nbytes.view(np.int64)[of]).view(np.uint64)
    cut = CopyBatch(batch.dst[of] + inside, batch.src[of] + inside, np.diff(edges).view(np.uint64))
    first = begins.searchsorted(np.arange(0, total, quantum)).astype(np.uint64)
    return cut, first


def _compiled(work: Path) -> Callable[..., int]:
    """The function of the source above."""
    source, library = work / "turns.cu", work / "turns.so"
    source.write_text(_SOURCE, encoding="utf-8")
    subprocess.run(
        ["nvcc", "-O2", "-shared", "-Xcompiler", "-fPIC", str(source), "-o", str(library)], check=True
    )
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)  # where its symbols are
    call = ctypes.CDLL(str(library)).turns
    pointer = ctypes.c_void_p
    call.argtypes = [ctypes.c_size_t, *[pointer] * 4, ctypes.c_size_t, ctypes.c_int, pointer, pointer]
    return call


def _by_compiled(
    call: Callable[..., int], device: Bench, batch: CopyBatch, quantum: int
) -> Callable[[], None]:
    """A write's copies, by the compiled function."""
    cut, first = in_turns(batch, quantum)
    streams = [device.new_stream() for _ in range(2)]
    events = [device.record(stream) for stream in streams]
    pair = ctypes.c_void_p * 2
    on, between = pair(*(each.cuda_stream for each in streams)), pair(*(each.cuda_event for each in events))

    def ask(kept: object = (streams, events)) -> None:  # an event is destroyed with its object
        arrays = [each.ctypes.data for each in (cut.dst, cut.src, cut.nbytes, first)]
        code = call(len(cut), *arrays, len(first), len(batch) > SHORT, on, between)
        if code:
            raise RuntimeError(f"the compiled copies failed at step {code}")

    return ask


def _timed(device: Bench, run: Callable[[], None], repeats: int) -> Spread:
    """Microseconds of this thread, the GPU idle before each."""
    took = []
    with no_collection():
        for _ in range(repeats + 1):
            device.synchronize()
            began = time.perf_counter_ns()
            run()
            took.append((time.perf_counter_ns() - began) / 1e3)
            device.synchronize()
    return Spread.of(took[1:])


def measure(case: Case, call: Callable[..., int] | None, *, cpu: bool, repeats: int) -> dict[str, Any]:
    """A row: the case, copies, turns, and the times that the module names.

    Args:
        case: the write.
        call: the compiled function; None leaves its time out.
        cpu: run on the CPU.
        repeats: of each.
    """
    device = open_bench(cpu)
    setting = Setting(device, default_policy(), repeats, ("hybrid",))
    memory = setting.memory(case)
    memory.refill()
    nbytes = setting.task(case, memory, forwards_wait=True).geometry.bytes_per_token * case.tokens
    setting.options = {"hybrid": {"staging_mb": 2 + nbytes * 5 // 4 // 2**20}}
    task = setting.task(case, memory, forwards_wait=True)
    (hybrid,) = contenders(task, ("hybrid",))
    assert hybrid.submit is not None, hybrid.reason
    with no_collection():
        thread = [one_write(task, hybrid.submit)[0]["submit_us"] for _ in range(repeats + 1)][1:]
    plan = WritePlan(task.geometry, task.host)
    planned = plan.cut(plan.left)
    staging = device.allocate_staging(planned.room)
    batch = plan.drain(planned, staging.address)
    quantum = getattr(device, "quantum_bytes", 32 * 2**20)
    stream = device.new_stream()
    row: dict[str, Any] = {
        "write": str(case),
        "copies": len(batch),
        "turns": len(in_turns(batch, quantum)[1]),
        "thread_us": asdict(Spread.of(thread)),
        "copies_us": asdict(_timed(device, lambda: device.copy(batch, stream), repeats)),
    }
    if call is not None:
        asked = _by_compiled(call, device, batch, quantum)
        row["compiled_us"] = asdict(_timed(device, asked, repeats))
    return row


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of a saved run for the documents: medians, and the least and the greatest."""

    def us(row: Mapping[str, Any], name: str) -> str:
        spread = Spread(**row[name])
        return f"{spread.median:,.0f} ({spread.low:,.0f} to {spread.high:,.0f})"

    names = ("thread_us", "copies_us", "compiled_us")
    lines = [
        markdown_row(("write", "copies", "turns", "all of it, us", "asking for copies, us", "compiled, us")),
        markdown_row(["---"] * (3 + len(names))),
    ]
    for row in rows:
        counts = (f"{row['copies']:,}", f"{row['turns']:,}")
        lines.append(markdown_row((row["write"], *counts, *(us(row, name) for name in names))))
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, save."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    args = parsed(parser)
    rows = SavedRows(args.out, cpu=args.cpu)
    with tempfile.TemporaryDirectory() as work:
        call = None if args.cpu else _compiled(Path(work))
        for page, fragmented in ((64, False), (64, True), (1, False), (1, True)):
            for tokens in (64,) if args.cpu else (512, 8_192, 32_768):
                case = Case("Qwen3-8B", "page_first", page, tokens, fragmented)
                row = measure(case, call, cpu=args.cpu, repeats=args.repeats)
                rows.add(row)
                times = ", ".join(
                    f"{name} {row[name]['median']:,.0f}" for name in row if name.endswith("_us")
                )
                print(f"{case}: {row['copies']:,} copies in {row['turns']} turns: {times}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
