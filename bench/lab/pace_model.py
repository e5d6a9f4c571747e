"""``bench sustained`` in model time: the real backend, ring and planner under the same loop, on a device that
moves nothing and whose work takes as long as a cost model says. A model, not a measurement.

    python -m sglang_hicache.bench.lab.pace_model [--staging-mb 256 512 auto] [--json]

Bytes, copies and ring are those of the real model's rows. What the model leaves out: contention for SMs, HBM
and the host's CPUs (see :class:`~sglang_hicache.io_backends.virtual.model.CostModel`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ...io_backends import PoolGeometry, get_backend
from ...io_backends.plan.chunks import Chunk, Staged
from ...io_backends.plan.copies import CopyBatch, Slots
from ...io_backends.routes import one_route
from ...io_backends.virtual import gpu as cuda
from ...io_backends.virtual.device import VirtualDevice
from ...io_backends.virtual.gpu import Event, Stream
from ...io_backends.virtual.model import CostModel
from ...io_backends.virtual.operations import Operation
from ...io_backends.virtual.timeline import NOTE, ModelOrder
from ...policy.names import FORWARDS
from ..measure.cases import MODELS, Case, pool_of, slots_of
from ..measure.contenders import Task
from ..measure.overlap import Flight, ForwardStep, Trace, Writer, loop_metrics, run
from ..measure.patterns import LEAST_CYCLES, PATTERNS, whole_pages
from ..measure.writers import OwnWriter

H100 = CostModel(hbm_gb_per_s=2000.0)
"""With a gather of 64 thread blocks: 134 MB in 134 us (part gather of
bench/results/2026-11-25-h100/profile.json)."""

SCHEDULE_MS = 1.0
"""Of the host before each launch: batching, tensors, kernel launches. An assumption."""


class LoopDevice(VirtualDevice):
    """The virtual device with what :func:`~..measure.overlap.run` asks of one beside the seam."""

    where = "cpu"

    def record(self, stream: Stream) -> Event:
        event = Event(enable_timing=True)
        event.record(stream)
        return event

    def synchronize(self) -> None:
        cuda.synchronize()

    def flush(self) -> None:
        """No caches."""

    def forward_stream(self) -> Stream:
        return self.new_stream()

    def indices(self, slots: np.ndarray) -> Any:
        return slots


class ModelDevice(LoopDevice):
    """Gathers and copies take time and touch no memory."""

    def allocate_staging(self, nbytes: int) -> Any:
        return _Staging(1 << 46, nbytes)

    def gather(
        self, staged: Staged, base: int, device_slots: Any, chunk: Chunk, stream: Stream, ctas: int
    ) -> None:
        nbytes = chunk.tokens * staged.geometry.bytes_per_token
        stream.launch(Operation("gather", d2h_on_sms=True, nbytes=nbytes))

    def copy(self, batch: CopyBatch, stream: Stream) -> None:
        if len(batch):
            stream.launch(Operation("drain", engine="copy_d2h", copies=len(batch), nbytes=batch.total_bytes))


@dataclass(frozen=True)
class _Staging:
    address: int
    nbytes: int


class KernelWriter:
    """SGLang's kernel, which writes host memory and which no forward waits for."""

    def __init__(self, device: ModelDevice, bytes_per_token: int) -> None:
        self._device, self._per_token = device, bytes_per_token
        self._stream = device.new_stream()

    def submit(self, tokens: int, flight: Flight, forward_stream: Any) -> None:
        device, stream = self._device, self._stream
        device.wait(stream, device.record(forward_stream))
        nbytes = tokens * self._per_token
        stream.launch(Operation("kernel", d2h_on_sms=True, crosses_link=True, nbytes=nbytes))
        flight.done = device.record(stream)

    def advance(self, forward_stream: Any, *, launching: bool) -> None:
        """Nothing is ever left."""

    def take_fences(self) -> Sequence[Event]:
        return ()

    def waiting_bytes(self) -> int:
        return 0


class NoIds:
    """Token ids, whose copies are left out."""

    def copy(self, step: int) -> None:
        """They are few bytes."""


def simulate(
    case: Case,
    pattern: Sequence[ForwardStep],
    options: Mapping[str, Any] | None,
    *,
    cycles: int = LEAST_CYCLES,
    costs: CostModel = H100,
    write: bool = True,
) -> Trace:
    """A loop in model time.

    Args:
        case: model, layout and pages; its tokens are the most that a step of ``pattern`` leaves.
        options: of ``hybrid``; None: SGLang's kernel, unfenced.
        write: without it, the forwards alone.
    """
    gpu = cuda.reset(0, ModelOrder(costs))
    device = ModelDevice(())
    geometry = pool_of(case)
    writer: Writer | None = None
    if write and options is None:
        writer = KernelWriter(device, geometry.bytes_per_token)
    elif write:
        backend = get_backend("hybrid")(device, options or {})
        stream = device.new_stream()
        tasks = {}
        for step in pattern:
            part = replace(case, tokens=step.tokens)
            tasks[step.tokens] = task_of(part, geometry, *slots_of(part), device, stream)
        writer = OwnWriter(tasks, one_route(backend, FORWARDS))
    streams = device.new_stream(), device.new_stream(), device.new_stream()

    def launch(step: ForwardStep) -> None:
        gpu.host_work("schedule", SCHEDULE_MS)
        cuda.current_stream().launch(Operation("forward", exclusive_sms=True, ms=step.ms))

    steps = tuple(pattern) * cycles
    return run(device, steps, launch, NoIds(), streams, writer, geometry.bytes_per_token)


def task_of(
    case: Case, geometry: PoolGeometry, host: Slots, rows: Slots, device: LoopDevice, stream: Stream
) -> Task:
    """A write of the loop's, by a backend that asks no policy.

    Args:
        case: what it is called.
        geometry: of the pool.
        host, rows: slots, int64 [n] each.
        device: where it runs.
        stream: SGLang's for writes.
    """
    return Task(
        case=case,
        memory=None,
        geometry=geometry,
        host=host,
        rows=rows,
        device_slots=rows.copy(),
        stream=stream,
        device=device,
        decision=None,  # type: ignore[arg-type]  # auto alone asks it
        forwards_wait=True,
        options={},
        upstream=lambda task: "no SM copies here",
    )


def main(given: Sequence[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--staging-mb", nargs="+", default=["256", "auto"], help="sizes of hybrid's ring")
    parser.add_argument("--model", nargs="+", default=["Qwen3-8B", "DeepSeek-V3"], choices=tuple(MODELS))
    parser.add_argument("--page-size", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--cycles", type=int, default=2 * LEAST_CYCLES)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(given)
    found = []
    for model in args.model:
        for page in args.page_size:
            for name, pattern in PATTERNS.items():
                steps = whole_pages(pattern, page)
                case = Case(model, "page_first", page, max(step.tokens for step in steps), True, "fa3")
                ways: dict[str, Any] = {"kernel": None}
                ways |= {f"hybrid {size}": _options(size) for size in args.staging_mb}
                alone = loop_metrics(simulate(case, steps, None, cycles=args.cycles, write=False), len(steps))
                asked = sum(step.tokens for step in steps) * MODELS[model].bytes_per_token
                for way, options in ways.items():
                    row = loop_metrics(simulate(case, steps, options, cycles=args.cycles), len(steps))
                    row["slow_down"] = row["cycle_ms"] / alone["cycle_ms"]
                    row["asked_gb_per_s"] = asked / alone["cycle_ms"] / 1e6
                    found.append({"model": model, "page_size": page, "forwards": name, "way": way, **row})
    if args.json:
        print(json.dumps({"note": NOTE, "costs": asdict(H100), "rows": found}, indent=1))
        return 0
    print(NOTE)
    for row in found:
        print(
            f"{row['model']:12} p{row['page_size']:<3} {row['forwards']:15} {row['way']:12}"
            f" {row['kept_gb_per_s']:5.2f} of {row['asked_gb_per_s']:5.2f} GB/s, {row['slow_down']:.3f}x,"
            f" fence {row['fence_ms']:6.2f}/{row['fence_max_ms']:6.2f} ms, done {row['done_p50_ms']:7.1f}/"
            f"{row['done_p99_ms']:7.1f}, after forward {row['after_forward_p50_ms']:6.1f}/"
            f"{row['after_forward_p99_ms']:6.1f} ms, waiting {row['waiting_mb']:6.0f}, held"
            f" {row['held_mb']:6.0f} MB"
        )
    return 0


def _options(size: str) -> dict[str, Any]:
    return {"staging_mb": int(size) if size.isdigit() else size}


if __name__ == "__main__":
    sys.exit(main())
