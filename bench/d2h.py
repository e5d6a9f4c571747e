"""D2H transfers measured on this machine's GPU: bandwidth, forward stall, submit cost, interference.

Every figure is end to end on the GPU's own clock: from an event before the transfer is submitted, on idle
streams, to the event that SGLang would take for its completion, Python's planning included. Bytes are
checked against the device rows once per case, the host buffer poisoned first. Needs torch and an NVIDIA GPU,
no SGLang; its own pools enter the field through :mod:`sglang_hicache.bench.d2h_sglang`.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from sglang_hicache.io_backends import Component, PoolGeometry, Transfer, get_backend, host_strides
from sglang_hicache.io_backends.device.cpu import host_view
from sglang_hicache.io_backends.device.cuda import CudaDevice
from sglang_hicache.io_backends.plan import direct_copies

POISON = 0xA5
ENOUGH_S = 3.0
"""A contender that is this slow is not repeated any further."""


@dataclass(frozen=True)
class Model:
    """KV rows of a named model on one GPU. ``components`` are row bytes, bf16."""

    name: str
    kv_kind: str
    layers: int
    heads: int
    components: tuple[int, ...]

    @property
    def bytes_per_token(self) -> int:
        return self.layers * sum(self.components)


QWEN3_8B = Model("Qwen3-8B", "mha", 36, 8, (8 * 128 * 2, 8 * 128 * 2))
LLAMA3_70B_TP8 = Model("Llama-3-70B TP8", "mha", 80, 1, (128 * 2, 128 * 2))
DEEPSEEK_V3 = Model("DeepSeek-V3", "mla", 61, 1, (576 * 2,))
MODELS = {model.name: model for model in (QWEN3_8B, LLAMA3_70B_TP8, DEEPSEEK_V3)}


@dataclass(frozen=True)
class Case:
    """One transfer. ``fragmented``: host and device pages are shuffled; else both are contiguous."""

    model: str
    layout: str
    page_size: int
    tokens: int
    fragmented: bool

    def __str__(self) -> str:
        shape = "fragmented" if self.fragmented else "contiguous"
        return f"{self.model} {self.layout} page {self.page_size} {self.tokens} tokens {shape}"


@dataclass
class Row:
    """One contender in one case. Times are medians over ``repeats``; without any, ``reason``."""

    case: Case
    contender: str
    gb_per_s: float | None = None
    ms: float | None = None
    ms_spread: float | None = None
    submit_us: float | None = None
    stall_ms: float | None = None
    copies: int | None = None
    repeats: int = 0
    checked: bool = False
    reason: str | None = None


class TimedDevice(CudaDevice):
    """Events measure time, so that a stall can be read off them."""

    def record(self, stream: Any) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event


class Memory:
    """Device rows and one pinned host buffer, shared by all cases of a model."""

    def __init__(self, model: Model, slots: int, device: CudaDevice) -> None:
        import torch

        self.model = model
        self.slots = slots
        self.rows = [
            [
                torch.randint(0, 256, (slots, row), dtype=torch.uint8, device="cuda")
                for _ in range(model.layers)
            ]
            for row in model.components
        ]
        # One allocation, since SGLang's pools hold all components in one buffer.
        sizes = [model.layers * slots * row for row in model.components]
        self.pinned = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        self.host = list(self.pinned.split(sizes))
        self.device = device

    def geometry(self, layout: str, page_size: int) -> PoolGeometry:
        parts = []
        for index, row in enumerate(self.model.components):
            strides = host_strides(
                layout,
                base=self.host[index].data_ptr(),
                layers=self.model.layers,
                page_size=page_size,
                slots=self.slots,
                row_bytes=row,
                heads=self.model.heads,
            )
            rows = tuple(tensor.data_ptr() for tensor in self.rows[index])
            parts.append(Component("kv"[index] if index < 2 else "x", row, rows, row, strides))
        geometry = PoolGeometry(
            label="kv",
            kv_kind=self.model.kv_kind,
            layout=layout,
            dtype="bfloat16",
            heads=self.model.heads,
            layers=self.model.layers,
            page_size=page_size,
            host_slots=self.slots,
            device_slots=self.slots,
            components=tuple(parts),
        )
        self.device.prepare_copies(geometry)
        return geometry

    def poison(self, geometry: PoolGeometry, host_slots: np.ndarray) -> None:
        """Overwrite the host rows that :meth:`matches` will look at."""
        for _, _, _, view, page, offset in self._sample(geometry, host_slots):
            view[page, offset] = POISON

    def matches(self, geometry: PoolGeometry, host_slots: np.ndarray, device_slots: np.ndarray) -> bool:
        """Whether up to 512 of the rows arrived in every layer and component."""
        import torch

        rows = torch.from_numpy(device_slots[_picked(host_slots)]).cuda()
        for index, layer, piece, view, page, offset in self._sample(geometry, host_slots):
            width = geometry.components[index].piece_bytes
            want = self.rows[index][layer][rows, piece * width : (piece + 1) * width].cpu().numpy()
            if not np.array_equal(view[page, offset], want):
                return False
        return True

    def _sample(
        self, geometry: PoolGeometry, host_slots: np.ndarray
    ) -> Iterator[tuple[int, int, int, np.ndarray, np.ndarray, np.ndarray]]:
        page, offset = np.divmod(host_slots[_picked(host_slots)], geometry.page_size)
        for index, part in enumerate(geometry.components):
            for layer in range(geometry.layers):
                for piece in range(part.host.pieces):
                    yield index, layer, piece, host_view(geometry, part, layer, piece), page, offset


def _picked(slots: np.ndarray) -> np.ndarray:
    return np.unique(np.linspace(0, len(slots) - 1, min(512, len(slots))).astype(np.int64))


def slots_of(case: Case, slots: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(host, device) slots of a case: whole pages, in order or shuffled independently."""
    pages = case.tokens // case.page_size
    total = slots // case.page_size
    rng = np.random.default_rng(seed)

    def some() -> np.ndarray:
        picked = rng.permutation(total)[:pages] if case.fragmented else np.arange(pages)
        result: np.ndarray = (picked[:, None] * case.page_size + np.arange(case.page_size)).reshape(-1)
        return result.astype(np.int64)

    return some(), some()


Submit = Callable[[], tuple[int | None, Any]]
"""Enqueues one transfer on the current stream; returns copies, and the event a fenced forward waits for."""


@dataclass(frozen=True)
class Task:
    """What every contender of a case is given."""

    case: Case
    memory: Memory
    geometry: PoolGeometry
    host: np.ndarray
    rows: np.ndarray
    stream: Any
    device: TimedDevice
    options: Mapping[str, Any]


Contenders = Callable[[Task], Iterator[tuple[str, Submit | str]]]
"""Names and submissions of a task; a string is the reason why one is not possible."""


def contenders(task: Task) -> Iterator[tuple[str, Submit | str]]:
    """This project's backends and a plain copy loop."""
    import torch

    geometry, device, host, stream = task.geometry, task.device, task.host, task.stream
    device_slots = torch.from_numpy(task.rows).cuda()
    for name in ("hybrid", "copy_engine"):
        backend = get_backend(name)(device, task.options)
        reason = backend.supports(geometry)
        if reason is not None:
            yield name, reason
            continue
        backend.prepare(geometry)

        def submit(backend: Any = backend) -> tuple[int, Any]:
            ready = device.record(device.current_stream())
            transfer = Transfer(geometry, host, device_slots, (ready,), ready, False, lambda: None)
            done = backend.submit(transfer, stream)
            return done.copies, done.sm_done

        yield name, submit
    batch = direct_copies(geometry, host, task.rows)
    if len(batch) > 20_000:
        yield "memcpy_loop", f"{len(batch)} calls: a loop of single copies would take seconds"
        return
    from cuda.bindings import driver as cuda

    entries = list(zip(batch.dst.tolist(), batch.src.tolist(), batch.nbytes.tolist(), strict=True))

    def loop() -> tuple[int, Any]:
        handle = stream.cuda_stream
        for dst, src, nbytes in entries:
            cuda.cuMemcpyDtoHAsync(dst, src, nbytes, handle)
        return len(entries), None

    yield "memcpy_loop", loop


def measure(
    row: Row, submit: Submit, nbytes: int, stream: Any, repeats: int, enough_s: float = ENOUGH_S
) -> None:
    """Fill ``row`` with medians over ``repeats``, or fewer (two at least) once ``enough_s`` have passed."""
    import torch

    times: list[float] = []
    stalls: list[float] = []
    submits: list[float] = []
    first = time.monotonic()
    for attempt in range(repeats + 1):
        if len(times) > 1 and time.monotonic() - first > enough_s:
            break
        torch.cuda.synchronize()
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            start.record(stream)
            began = time.perf_counter()
            copies, sm_done = submit()
            submitted = time.perf_counter() - began
            end.record(stream)
        end.synchronize()
        if attempt == 0:
            continue  # the first one warms up
        times.append(start.elapsed_time(end))
        submits.append(submitted * 1e6)
        stalls.append(start.elapsed_time(sm_done) if sm_done is not None else 0.0)
        row.copies = copies
    row.repeats = len(times)
    row.ms = statistics.median(times)
    row.ms_spread = max(times) - min(times)
    row.gb_per_s = nbytes / row.ms / 1e6
    row.submit_us = statistics.median(submits)
    row.stall_ms = statistics.median(stalls)


def link_ceiling(nbytes: int = 2**30, repeats: int = 5) -> float:
    """GB/s of one large pinned D2H copy."""
    import torch

    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return _copy_rate(lambda: target.copy_(source, non_blocking=True), nbytes, repeats)


def hbm_ceiling(nbytes: int = 2**31, repeats: int = 5) -> float:
    """GB/s of a large copy within device memory, bytes read plus bytes written."""
    import torch

    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return _copy_rate(lambda: target.copy_(source), 2 * nbytes, repeats)


def _copy_rate(run: Callable[[], Any], nbytes: int, repeats: int) -> float:
    import torch

    rates = []
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        rates.append(nbytes / start.elapsed_time(end) / 1e6)
    return statistics.median(rates[1:])


def bandwidth(
    model: Model,
    cases: Sequence[Case],
    *,
    options: Mapping[str, Any] | None = None,
    repeats: int = 5,
    budget_s: float = 120,
    say: Callable[[str], None] = lambda line: None,
    field_of: Sequence[Contenders] = (contenders,),
) -> list[Row]:
    """Every contender in every case, interleaved case by case, until ``budget_s`` is spent."""
    import torch

    device = TimedDevice()
    slots = max(case.tokens for case in cases) * 9 // 8 // 64 * 64
    memory = Memory(model, slots, device)
    stream = device.new_stream()
    rows: list[Row] = []
    began = time.monotonic()
    for case in cases:
        if time.monotonic() - began > budget_s:
            rows.append(Row(case, "all", reason=f"the time budget of {budget_s:.0f} s was spent"))
            continue
        geometry = memory.geometry(case.layout, case.page_size)
        host, device_slots = slots_of(case, slots)
        task = Task(case, memory, geometry, host, device_slots, stream, device, options or {})
        for name, submit in chain.from_iterable(found(task) for found in field_of):
            row = Row(case, name)
            rows.append(row)
            if isinstance(submit, str):
                row.reason = submit
                say(f"{case} {name}: {submit}")
                continue
            memory.poison(geometry, host)
            try:
                measure(row, submit, case.tokens * geometry.bytes_per_token, stream, repeats)
            except Exception as error:  # a contender that fails is a row with a reason
                row.reason = f"{type(error).__name__}: {error}".splitlines()[0]
                say(f"{case} {name}: {row.reason}")
                continue
            torch.cuda.synchronize()
            row.checked = memory.matches(geometry, host, device_slots)
            if not row.checked:
                row.reason = "WRONG BYTES"
            say(
                f"{case} {name}: {row.gb_per_s:.1f} GB/s, {row.copies} copies, "
                f"submit {row.submit_us:.0f} us, stall {row.stall_ms:.3f} ms"
                f"{'' if row.checked else ' WRONG BYTES'}"
            )
    return rows


@dataclass
class Interference:
    """Slow-down of a co-running forward stand-in: its time beside D2H over its time alone."""

    forward: str
    contender: str
    alone_ms: float
    beside_ms: float
    slow_down: float
    d2h_gb_per_s: float
    extra: dict[str, Any] = field(default_factory=dict)


def forwards() -> dict[str, Callable[[], Any]]:
    """Stand-ins for a forward, each some milliseconds long and filling the GPU."""
    import torch

    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    q, k, v = (torch.randn(4, 32, 8192, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    big = torch.randn(2**29, dtype=torch.float32, device="cuda")
    attention = torch.nn.functional.scaled_dot_product_attention
    return {
        "gemm": lambda: a @ b,
        "attention": lambda: attention(q, k, v, is_causal=True),
        "memory": lambda: big.mul_(1.0000001),
    }


def interference(
    case: Case,
    options: Mapping[str, Any] | None = None,
    rounds: int = 5,
    field_of: Sequence[Contenders] = (contenders,),
) -> list[Interference]:
    """Each stand-in alone, and beside back-to-back transfers of ``case`` by each contender."""
    import torch

    device = TimedDevice()
    slots = case.tokens * 9 // 8 // 64 * 64
    memory = Memory(MODELS[case.model], slots, device)
    geometry = memory.geometry(case.layout, case.page_size)
    host, rows = slots_of(case, slots)
    d2h = device.new_stream()
    forward_stream = torch.cuda.Stream()
    found: list[Interference] = []
    nbytes = case.tokens * geometry.bytes_per_token
    task = Task(case, memory, geometry, host, rows, d2h, device, options or {})
    made: list[tuple[str, Submit]] = []
    for name, submit in chain.from_iterable(each(task) for each in field_of):
        if isinstance(submit, str):
            continue
        try:
            with torch.cuda.stream(d2h):
                submit()
        except Exception:  # the bandwidth grid says why
            continue
        made.append((name, submit))

    def timed(run: Callable[[], Any], times: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(forward_stream):
            start.record(forward_stream)
            for _ in range(times):
                run()
            end.record(forward_stream)
        end.synchronize()
        return start.elapsed_time(end) / times

    for forward, run in forwards().items():
        timed(run, 3)
        per = timed(run, 5)
        # Long enough that several transfers run beside it.
        times = max(3, int(200 / per))
        alone = statistics.median(timed(run, times) for _ in range(rounds))
        for name, submit in made:
            beside: list[float] = []
            rates: list[float] = []
            started = time.monotonic()
            for _ in range(rounds):
                if len(beside) > 1 and time.monotonic() - started > ENOUGH_S:
                    break
                torch.cuda.synchronize()
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                with torch.cuda.stream(forward_stream):
                    begin.record(forward_stream)
                    for _ in range(times):
                        run()
                    end.record(forward_stream)
                sent = 0
                with torch.cuda.stream(d2h):
                    first.record(d2h)
                    while not end.query():
                        submit()
                        mark = device.record(d2h)
                        sent += 1
                        while not mark.query() and not end.query():
                            time.sleep(0)
                    last.record(d2h)
                end.synchronize()
                last.synchronize()
                beside.append(begin.elapsed_time(end) / times)
                rates.append(sent * nbytes / first.elapsed_time(last) / 1e6)
            median = statistics.median(beside)
            found.append(Interference(forward, name, alone, median, median / alone, statistics.median(rates)))
    return found


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    result: dict[str, Any] = {
        "ran_on": "GPU",
        "gpu": properties.name,
        "sm_count": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(("python -m sglang_hicache.bench.gpu_suite", *sys.argv[1:])),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
    try:
        import subprocess

        asked = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.sm", "--format=csv,noheader"]
        result["nvidia_smi"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except OSError:
        result["nvidia_smi"] = "not found"
    import triton

    result["triton"] = triton.__version__
    return result


def write(path: Path, parts: Mapping[str, Any]) -> None:
    """JSON of hardware and results."""
    path.write_text(json.dumps(dict(parts), indent=1, default=asdict) + "\n", encoding="utf-8")
