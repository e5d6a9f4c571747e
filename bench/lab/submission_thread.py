"""Whether a thread of its own should submit copies, measured beside decode steps before it is built.

    python -m sglang_hicache.bench.lab.submission_thread --out submission_thread.json [--cpu] [--budget 200]

The scheduler's thread is stood in for by a loop of decode steps as SGLang overlaps them: Python work, the
launch of a CUDA graph, a copy of the step's ids to the host, and the wait for the step before. Every few
steps it submits a write, in one of these ways:

alone    no write at all
inline   the thread submits everything itself, as the backends do
copies   its gathers, events and planning stay; the calls that enqueue copies go to a FIFO thread
all      the whole submission is made by the FIFO thread: the most that can be taken off this one

Each with several lengths of a driver call, since the driver may let nobody else in during one. Reported:
milliseconds of the thread a write, of a step and of a graph's launch, and until a write's bytes are there.
Reuse of staging is not ordered with the thread here: this is for timing, and no byte is kept.
"""

from __future__ import annotations

import itertools
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...io_backends.device.driver import MAX_COPIES_PER_CALL
from ...io_backends.policy_files import default_policy
from ...io_backends.registry import BACKENDS
from ...policy.backend_spec import spec_of
from ..measure.cases import Case
from ..measure.contenders import Task, ours
from ..measure.devices import open_bench
from ..measure.one_write import Setting
from .trial import SavedRows, parsed, parser_of

ALONE, INLINE, COPIES, ALL = "alone", "inline", "copies", "all"
CALL_ENTRIES = (MAX_COPIES_PER_CALL, 4096, 16384)
"""Entries of a driver call at most."""

STAGING_MB = 2048


class Fifo:
    """One thread that does what it is given, in order."""

    def __init__(self) -> None:
        self._todo: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self.error: BaseException | None = None

    def put(self, work: Callable[[], object]) -> None:
        self._todo.put(work)

    def drain(self) -> None:
        """Wait until all of it is done."""
        done = threading.Event()
        self._todo.put(done.set)
        done.wait()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (work := self._todo.get()) is not None:
            try:
                work()
            except BaseException as error:
                self.error = self.error or error


class CopiesElsewhere:
    """A device whose copies, and what is ordered with them on their streams, a FIFO thread enqueues."""

    def __init__(self, device: Any, fifo: Fifo) -> None:
        self._device, self._fifo = device, fifo
        self._streams: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def _is_moved(self, stream: Any) -> bool:
        return id(stream) in self._streams

    def move(self, stream: Any) -> None:
        self._streams.add(id(stream))

    def copy(self, batch: Any, stream: Any) -> None:
        self.move(stream)
        self._fifo.put(lambda: self._device.copy(batch, stream))

    def record(self, stream: Any) -> Any:
        if not self._is_moved(stream):
            return self._device.record(stream)
        event = self._device.record(self._device.current_stream())
        if hasattr(event, "record"):  # a CPU's need not
            self._fifo.put(lambda: event.record(stream))
        return event

    def wait(self, stream: Any, event: Any) -> None:
        if self._is_moved(stream):
            self._fifo.put(lambda: self._device.wait(stream, event))
        else:
            self._device.wait(stream, event)


@dataclass(frozen=True)
class DecodeLoad:
    """Decode steps and the writes beside them.

    Attributes:
        python_ms: of Python work a step, which holds the interpreter's lock.
        gpu_ms: of the graph.
        every: a write each that many steps.
    """

    python_ms: float
    gpu_ms: float
    every: int


@dataclass
class Figures:
    """Of one way: milliseconds, as (median, 99th percentile, most)."""

    case: str
    backend: str
    way: str
    call_entries: int
    load: DecodeLoad
    thread_ms: tuple[float, float, float] | None
    step_ms: tuple[float, float, float]
    step_mean_ms: float
    launch_ms: tuple[float, float, float]
    done_ms: tuple[float, float, float] | None
    writes: int
    copies: int | None
    switch_ms: float


class Steps:
    """Decode steps of a load."""

    def __init__(self, device: Any, load: DecodeLoad) -> None:
        import torch

        self._torch, self._device, self._load = torch, device, load
        self.cuda = device.where == "cuda"
        self.stream = device.forward_stream()
        self._memory = torch.ones(2**26 if self.cuda else 2**12, dtype=torch.float32, device=device.where)
        self._ids = torch.zeros(128, dtype=torch.int64, device=device.where)
        self._host = torch.empty((2, 128), dtype=torch.int64, pin_memory=self.cuda)
        self._loops = self._python_loops()
        self._graph = self._captured() if self.cuda else None

    def _pass(self) -> None:
        self._memory.mul_(1.0000001)

    def _captured(self) -> Any:
        torch = self._torch
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(200):
            self._pass()
        begin.record()
        for _ in range(200):
            self._pass()
        end.record()
        end.synchronize()
        passes = max(1, round(self._load.gpu_ms / (begin.elapsed_time(end) / 200)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(passes):
                self._pass()
        return graph

    def _python_loops(self) -> int:
        loops = 10_000
        while True:
            began = time.perf_counter()
            self._python(loops)
            took = time.perf_counter() - began
            if took > 0.01:
                return max(1, round(loops * self._load.python_ms / 1e3 / took))
            loops *= 2

    @staticmethod
    def _python(loops: int) -> int:
        kept: dict[int, int] = {}
        for number in range(loops):
            kept[number & 63] = number
        return len(kept)

    def step(self, number: int) -> tuple[Any, float]:
        """Launch one; the event after its ids, and milliseconds of the graph's launch."""
        self._python(self._loops)
        with self._device.use_stream(self.stream):
            began = time.perf_counter()
            if self._graph is None:
                self._pass()
            else:
                self._graph.replay()
            launch = time.perf_counter() - began
            self._host[number % 2].copy_(self._ids, non_blocking=True)
            event = self._device.record(self.stream)
        return event, launch * 1e3


def loop(
    steps: Steps, load: DecodeLoad, write: Callable[[], object] | None, seconds: float
) -> dict[str, list[float]]:
    """Steps for that long; lists of milliseconds."""
    found: dict[str, list[float]] = {"step": [], "launch": [], "thread": []}
    before = None
    end = time.perf_counter() + seconds
    last = time.perf_counter()
    for number in itertools.count():
        if write is not None and number % load.every == 0:
            began = time.perf_counter()
            write()
            found["thread"].append((time.perf_counter() - began) * 1e3)
        event, launch = steps.step(number)
        if before is not None:
            before.synchronize()
        before = event
        now = time.perf_counter()
        found["step"].append((now - last) * 1e3)
        found["launch"].append(launch)
        last = now
        if now > end and number > 3 * load.every:
            break
    steps._device.synchronize()
    return {name: values[load.every :] if name != "thread" else values[1:] for name, values in found.items()}


def three(values: list[float]) -> tuple[float, float, float] | None:
    """(median, 99th percentile, most)."""
    if not values:
        return None
    ordered = sorted(values)
    at = min(len(ordered) - 1, round(0.99 * len(ordered)))
    return statistics.median(ordered), ordered[at], ordered[-1]


class TaskWriter:
    """Submits a task's write one way, and notes when its bytes were there."""

    def __init__(self, task: Task, backend: str, way: str, entries: int) -> None:
        self._task, self._way = task, way
        self._fifo = Fifo() if way in (COPIES, ALL) else None
        device: Any = task.device
        if self._fifo is not None and way == COPIES:
            device = CopiesElsewhere(task.device, self._fifo)
            device.move(task.stream)
        options: dict[str, Any] = {"max_copies_per_batch": entries}
        if any(option.name == "staging_mb" for option in spec_of(BACKENDS, backend).options or ()):
            options["staging_mb"] = STAGING_MB
        if self._fifo is not None and task.device.where == "cuda":
            # Makes the GPU's context the thread's, which the driver's calls go to.
            self._fifo.put(task.device.synchronize)
        made = ours(backend, replace(task, device=device), options)
        if made.submit is None:
            raise RuntimeError(made.reason)
        self._submit = made.submit
        self._clock = task.device.forward_stream()
        self._marks: list[tuple[Any, Any]] = []
        self.copies: int | None = None

    def write(self) -> None:
        began = self._task.device.record(self._clock)
        if self._way == ALL:
            assert self._fifo is not None
            self._fifo.put(lambda: self._whole(began))
            return
        with self._task.device.use_stream(self._task.stream):
            self.copies = self._submit(lambda event: None).copies
        if self._fifo is None:
            self._mark(began)
        else:
            self._fifo.put(lambda: self._mark(began))

    def _whole(self, began: Any) -> None:
        with self._task.device.use_stream(self._task.stream):
            self.copies = self._submit(lambda event: None).copies
        self._mark(began)

    def _mark(self, began: Any) -> None:
        self._marks.append((began, self._task.device.record(self._task.stream)))

    def finish(self) -> list[float]:
        """Milliseconds until each write was done, once all are."""
        if self._fifo is not None:
            self._fifo.drain()
        self._task.device.synchronize()
        took = [float(began.elapsed_time(end)) for began, end in self._marks]
        self._marks.clear()
        return took

    def close(self) -> None:
        if self._fifo is not None:
            self._fifo.close()


def measure(
    task: Task,
    steps: Steps,
    load: DecodeLoad,
    backend: str,
    way: str,
    entries: int,
    seconds: float,
    switch_ms: float,
) -> Figures:
    """One way of one case."""
    writer = None if way == ALONE else TaskWriter(task, backend, way, entries)
    before = sys.getswitchinterval()
    done: list[float] = []
    try:
        sys.setswitchinterval(switch_ms / 1e3)
        if writer is not None:
            for _ in range(2):
                writer.write()
            writer.finish()
        found = loop(steps, load, None if writer is None else writer.write, seconds)
        if writer is not None:
            done = writer.finish()[1:]
    finally:
        sys.setswitchinterval(before)
        if writer is not None:
            writer.close()
    step, launch = three(found["step"]), three(found["launch"])
    assert step is not None
    assert launch is not None
    return Figures(
        case=str(task.case),
        backend=backend,
        way=way,
        call_entries=entries,
        load=load,
        thread_ms=three(found["thread"]),
        step_ms=step,
        step_mean_ms=statistics.fmean(found["step"]),
        launch_ms=launch,
        done_ms=three(done),
        writes=len(found["thread"]),
        copies=None if writer is None else writer.copies,
        switch_ms=switch_ms,
    )


def trials(cpu: bool) -> Iterator[tuple[Case, str, DecodeLoad]]:
    """The writes and the steps beside them."""
    small = 1024 if cpu else 1
    for python_ms in (1.0, 3.0):
        for tokens, every in ((4096, 8), (64, 4), (32768, 40)):
            page_first = Case("Qwen3-8B", "page_first", 1, max(16, tokens // small), True)
            yield page_first, "hybrid", DecodeLoad(python_ms, 4.0, every)
        paged = Case("Qwen3-8B", "layer_first", 16, max(16, 4096 // small), True)
        yield paged, "copy_engine", DecodeLoad(python_ms, 4.0, 8)


def arms() -> Iterator[tuple[str, int, float]]:
    """(way, entries of a driver call, the interpreter's switch interval in ms)"""
    usual = sys.getswitchinterval() * 1e3
    yield ALONE, CALL_ENTRIES[0], usual
    for way in (INLINE, COPIES, ALL):
        for entries in CALL_ENTRIES:
            yield way, entries, usual
    yield COPIES, CALL_ENTRIES[1], 0.5


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: each case's ways, of rows as they are saved."""
    lines = [
        "| write | Python a step | way, entries a call | thread, a write | step | 99 % | done p50 | p99 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    usual = max(row["switch_ms"] for row in found)
    for row in found:
        if row["switch_ms"] < usual:
            continue
        way = row["way"] if row["way"] == ALONE else f"{row['way']}, {row['call_entries']:,}"
        thread, done = row["thread_ms"], row["done_ms"]
        cells = (
            f"{row['backend']}, {row['case'].removesuffix(' triton')}",
            f"{row['load']['python_ms']:.0f} ms",
            way,
            "" if thread is None else f"{thread[0]:.2f} ms",
            f"{row['step_mean_ms']:.2f} ms",
            f"{row['step_ms'][1]:.1f} ms",
            "" if done is None else f"{done[0]:.1f} ms",
            "" if done is None else f"{done[1]:.0f} ms",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print a line each, save."""
    parser = parser_of(__doc__)
    parser.add_argument("--budget", type=float, default=200, help="seconds")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a loop")
    args = parsed(parser)
    rows = SavedRows(args.out, cpu=args.cpu)
    most = {} if args.cpu else {"max_copies_per_call": max(CALL_ENTRIES)}
    setting = Setting(open_bench(args.cpu, **most), default_policy(), 1)
    end = time.monotonic() + args.budget
    print("ms of thread: p50 p99 max; step: mean p99 max; launch: p99; done: p50 p99", flush=True)
    for case, backend, load in trials(args.cpu):
        if time.monotonic() > end:
            print("time is up", flush=True)
            break
        memory = setting.memory(case)
        memory.refill()
        task = setting.task(case, memory, forwards_wait=False)
        steps = Steps(task.device, load)
        for way, entries, switch_ms in arms():
            figures = measure(task, steps, load, backend, way, entries, args.seconds, switch_ms)
            rows.add(asdict(figures))
            print(line(figures), flush=True)
    return 0


def line(found: Figures) -> str:
    """One of the table."""
    thread = "-" if found.thread_ms is None else " ".join(f"{value:7.3f}" for value in found.thread_ms)
    done = "-" if found.done_ms is None else f"{found.done_ms[0]:7.2f} {found.done_ms[1]:7.2f}"
    return (
        f"{found.case[:44]:44} {found.way:7} {found.call_entries:5} sw {found.switch_ms:3.1f} "
        f"py {found.load.python_ms:.0f}  {thread:23}  {found.step_mean_ms:6.3f} {found.step_ms[1]:6.2f} "
        f"{found.step_ms[2]:6.2f}  {found.launch_ms[1]:6.3f}  {done}"
    )


if __name__ == "__main__":
    sys.exit(main())
