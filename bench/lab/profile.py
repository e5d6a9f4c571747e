"""Where the time of one write goes: its parts, each measured alone, and all of them on one clock.

    python -m sglang_hicache.bench.lab.profile --out profile.json [--only PART ...] [--cpu]

gather     how long the gather of one chunk takes from before its launch, by thread blocks
shape      the longest of them by warps a thread block, accesses a thread, and thread blocks
sm_store   the same kernel writing straight to pinned host memory: what any SM kernel can reach on the link
order      SGLang's SM kernel on short rows of layer_first, in the order given and by host slot, over host
           pools of several sizes, sorting included
drain      copies from staging to host slots that lie scattered over several GiB, by bytes of a copy, in the
           order of their host addresses and in random order, on one stream and on two
write      one write of ``hybrid`` end to end: until the first gather is asked for, until the link is busy,
           how long it idles between copies
small_copy how long a copy of 1 KiB to the host takes on another stream while one write goes on; SGLang copies
           the token ids of each step to the host. Also torch's ``.to("cpu")`` of 12 bytes, for which the host
           waits (flashinfer reads its index pointers so, before each prefill), the same 12 bytes read by a
           kernel (:mod:`~.small_reads`), one of 1 KiB from the host, and one of 16 MiB on the device (a
           prefill with flashinfer makes one a layer)
turns      the same, and the write's own time, by the bytes of a turn (:mod:`~.copy_interleaving`);
           and how much decode steps slow down, which wait for their ids, beside writes that never stop
beside     how much a forward slows down beside ``hybrid``, by the gather's thread blocks

Constants of the backends cite what this prints; the file has the spread of the repeats.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...io_backends.plan.chunks import Chunk
from ...io_backends.plan.copies import CopyBatch
from ...io_backends.policy_files import default_policy
from ..measure import sglang_pools
from ..measure.cases import MODELS, Case
from ..measure.contenders import contenders
from ..measure.devices import Bench, no_collection, open_bench
from ..measure.environment import describe_environment
from ..measure.interference import interference
from ..measure.memory import KvBuffers
from ..measure.one_write import Setting
from ..measure.results import CPU_WATERMARK, Row, Spread
from ..measure.timing import link_ceiling, one_write
from ..saved import write_json
from .profile_alone import ProfiledPart, Size, drains, gathers, orders
from .trial import parsed, parser_of

MODEL = "Qwen3-8B"
CTAS_BESIDE = (16, 32, 64, 132)
NO_TURNS = 2**62
PARTS = ("alone", "write", "small_copy", "turns", "beside")
"""What can be asked for; ``alone`` are those that need no backend."""


def on_gpu() -> Size:
    """64 Ki slots of Qwen3-8B are 9 GiB on each side."""
    writes = tuple(
        Case(model, "page_first", page, tokens, fragmented)
        for model in ("Qwen3-8B", "DeepSeek-V3")
        for page, fragmented in ((1, False), (1, True), (16, True))
        for tokens in (512, 4096)
    )
    ordered = tuple(
        (model, page, tokens, slots)
        for model, page in ((MODEL, 1), (MODEL, 4), (MODEL, 16), ("DeepSeek-V3", 1))
        for tokens in (1024, 4096, 32768)
        for slots in (tokens * 9 // 8, 2**16)
    )
    long = tuple(
        Case(MODEL, layout, page, 8192, True) for layout, page in (("page_first", 16), ("layer_first", 64))
    )
    beside = Case(MODEL, "page_first", 16, 8192, True)
    turns = (*(mib * 2**20 for mib in (8, 16, 32, 64)), NO_TURNS)
    return Size(4096, 2**16, writes, beside, long, turns, ordered, 5)


def on_cpu() -> Size:
    """Enough to exercise the code."""
    case = Case(MODEL, "page_first", 1, 64, True)
    return Size(64, 256, (case,), case, (case,), (NO_TURNS,), ((MODEL, 1, 64, 256),), 2)


def measure(device: Bench, size: Size, only: Collection[str] = PARTS) -> Iterator[ProfiledPart]:
    """Every part, or those of :data:`PARTS` that are asked for."""
    setting = Setting(device, default_policy(), size.repeats, ("hybrid",))
    if "alone" in only:
        memory = KvBuffers(MODELS[MODEL], size.slots, device)
        memory.refill()
        yield from gathers(device, memory, size)
        yield from drains(device, memory, size)
        del memory
        yield from orders(setting, size)
    if "write" in only:
        for case in size.writes:
            yield _write(setting, case, size.repeats)
    if "small_copy" in only:
        for case in size.long:
            yield from _small_copies(replace(setting, wanted=None), case, size.repeats)
    if "turns" in only:
        yield from _by_turns(setting, size)
    if "beside" in only:
        for ctas in CTAS_BESIDE:
            setting.options = {"hybrid": {"gather_ctas": ctas}}
            for row in interference(setting, size.beside):
                yield ProfiledPart("beside", f"{row.forward}, {ctas} blocks", _of_interference(row))


def _by_turns(setting: Setting, size: Size) -> Iterator[ProfiledPart]:
    for quantum_bytes in size.turns:
        other = Setting(
            open_bench(setting.device.where == "cpu", quantum_bytes=quantum_bytes),
            setting.policy,
            size.repeats,
        )
        for case in size.long:
            # Who moves long copies there.
            other.wanted = ("copy_engine",) if case.layout == "layer_first" else ("hybrid",)
            yield from _small_copies(other, case, size.repeats, quantum_bytes)
            for row in interference(other, case, ("decode",)):
                what = f"{_turns(quantum_bytes)}, {row.contender}, {case}, {row.forward}"
                yield ProfiledPart("turns", what, _of_interference(row))


def _of_interference(row: Row) -> dict[str, Spread]:
    return {name: each for name, each in row.metrics.items() if name in ("slow_down", "gb_per_s")}


class Traced:
    """A device that notes when gathers and copies were asked for and ran; all else is the device's own."""

    def __init__(self, device: Bench) -> None:
        self._device = device
        self.pieces: list[tuple[str, int, Any, Any, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def gather(self, place: Any, base: int, slots: Any, chunk: Chunk, stream: Any, ctas: int) -> None:
        self._around(
            "gather", stream, 0, lambda: self._device.gather(place, base, slots, chunk, stream, ctas)
        )

    def copy(self, batch: CopyBatch, stream: Any) -> None:
        self._around("copy", stream, batch.total_bytes, lambda: self._device.copy(batch, stream))

    def _around(self, kind: str, stream: Any, nbytes: int, run: Callable[[], None]) -> None:
        asked = time.perf_counter_ns()
        begin = self._device.record(stream)
        run()
        self.pieces.append((kind, asked, begin, self._device.record(stream), nbytes))


def _write(setting: Setting, case: Case, repeats: int) -> ProfiledPart:
    memory = setting.memory(case)
    memory.refill()
    task = setting.task(case, memory, forwards_wait=False)
    traced = Traced(task.device)
    (hybrid,) = contenders(replace(task, device=traced), ("hybrid",))
    assert hybrid.submit is not None, hybrid.reason
    found: dict[str, list[float]] = {}
    with no_collection():
        for turn in range(repeats + 1):
            numbers = _trace(task, traced, hybrid.submit)
            for name, value in numbers.items():
                if turn:
                    found.setdefault(name, []).append(value)
    return ProfiledPart("write", str(case), {name: Spread.of(values) for name, values in found.items()})


def _small_copies(
    setting: Setting, case: Case, repeats: int, quantum_bytes: int | None = None
) -> Iterator[ProfiledPart]:
    device = setting.device
    memory = setting.memory(case)
    task = setting.task(case, memory, forwards_wait=False)
    other = device.forward_stream()

    def copy_us(kind: str) -> float:
        began = time.perf_counter_ns()
        with device.use_stream(other):
            copied[kind]()
        done = device.record(other)
        while not device.query(done):
            pass
        return (time.perf_counter_ns() - began) / 1e3

    def beside(submit: Callable[[Any], Any], kind: str) -> Mapping[str, float]:
        device.synchronize()
        numbers = {"alone_us": copy_us(kind)}
        with device.use_stream(task.stream):
            submit(lambda event: None)
            end = device.record(task.stream)
        took = [copy_us(kind)]
        while not device.query(end):
            took.append(copy_us(kind))
        return numbers | {"first_us": took[0], "median_us": float(np.median(took)), "most_us": max(took)}

    copied = _copies_of_forwards(device)
    for contender in contenders(task, setting.wanted):
        if contender.submit is None:
            continue
        found: dict[str, list[float]] = {}
        with no_collection():
            for turn in range(repeats + 1):
                write, _ = one_write(task, contender.submit)
                numbers = {"ms": write["ms"], "gb_per_s": write["gb_per_s"], "thread_us": write["submit_us"]}
                for kind in copied:
                    numbers |= {kind + name: us for name, us in beside(contender.submit, kind).items()}
                if turn:
                    for name, value in numbers.items():
                        found.setdefault(name, []).append(value)
        spread = {name: Spread.of(values) for name, values in found.items()}
        if quantum_bytes is None:
            yield ProfiledPart("small_copy", f"{contender.name}, {case}", spread)
        else:
            yield ProfiledPart("turns", f"{_turns(quantum_bytes)}, {contender.name}, {case}", spread)


def _copies_of_forwards(device: Bench) -> dict[str, Callable[[], object]]:
    """By what the names of its times begin with: see ``small_copy`` of this module."""
    import torch

    def copy(target: Any, source: Any) -> Callable[[], object]:
        return lambda: target.copy_(source, non_blocking=True)

    def on_device(nbytes: int) -> Any:
        return torch.zeros(nbytes, dtype=torch.uint8, device=device.where)

    def pinned(nbytes: int) -> Any:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.where == "cuda")

    copies: dict[str, Callable[[], object]] = {
        "": copy(pinned(1024), on_device(1024)),
        "pageable_": partial(torch.Tensor.to, on_device(12), "cpu"),
        "from_host_": copy(on_device(1024), pinned(1024)),
        "on_device_": copy(on_device(2**24), on_device(2**24)),
    }
    reads = device.small_reads()
    return copies if reads is None else {**copies, "by_kernel_": partial(reads.read, on_device(12))}


def _turns(quantum_bytes: int) -> str:
    return "no turns" if quantum_bytes == NO_TURNS else f"turns of {quantum_bytes >> 20} MiB"


def _trace(task: Any, traced: Traced, submit: Any) -> Mapping[str, float]:
    """One write, on the device's clock from before the submission.

    ``asked_us``: until the first gather is asked for; ``gather_ms``: until it may begin; ``link_ms``: until
    the first batch of copies is asked for and its gather done; ``idle_ms``: from the end of one batch to
    the same point of the next; ``busy_gb_per_s``: bytes by the rest, which includes waits of the engine for
    the thread; ``end_ms``: until the last copy is done; ``submit_us``: the thread's time, with two
    events around each gather and batch that only this measurement records.
    """
    device = task.device
    traced.pieces.clear()
    device.flush()
    device.synchronize()
    with device.use_stream(task.stream):
        start = device.record(task.stream)
        began = time.perf_counter_ns()
        submit(lambda event: None)
        submitted = time.perf_counter_ns()
    device.synchronize()
    copies = [piece for piece in traced.pieces if piece[0] == "copy"]
    gathers = [piece for piece in traced.pieces if piece[0] == "gather"]
    at = [(start.elapsed_time(begin), start.elapsed_time(end)) for _, _, begin, end, _ in copies]
    # A copy's first event is complete when the copies before it are; it may begin only behind its gather.
    ready = [start.elapsed_time(end) for _, _, _, end, _ in gathers]
    begins = [max(pair) for pair in zip((begin for begin, _ in at), ready, strict=True)]
    ends = [end for _, end in at]
    idle = sum(max(0.0, later - earlier) for later, earlier in zip(begins[1:], ends, strict=False))
    busy = ends[-1] - begins[0] - idle
    return {
        "asked_us": (gathers[0][1] - began) / 1e3,
        "gather_ms": start.elapsed_time(gathers[0][2]),
        "link_ms": begins[0],
        "idle_ms": idle,
        "busy_gb_per_s": sum(piece[4] for piece in copies) / max(busy, 1e-6) / 1e6,
        "end_ms": ends[-1],
        "submit_us": (submitted - began) / 1e3,
    }


def text(parts: list[ProfiledPart]) -> str:
    """One line a part."""
    lines = []
    for each in parts:
        numbers = ", ".join(f"{name} {spread.median:,.4g}" for name, spread in each.metrics.items())
        lines.append(f"{each.part}: {each.what}: {numbers}")
    return "\n".join(lines)


def profile(out: Path | None, *, cpu: bool, only: Collection[str] = PARTS) -> list[ProfiledPart]:
    """Measure, print, and save in ``out`` after each part: who is stopped loses the one that ran.

    Args:
        out: the JSON file.
        cpu: exercise the code without a GPU.
        only: of :data:`PARTS`.

    Raises:
        DeviceUnavailableError: there is no GPU and ``cpu`` is not set.
    """
    environment = describe_environment(cpu=cpu)
    device = open_bench(cpu)
    link = link_ceiling(device, 2**24 if cpu else 2**30)
    if not cpu:
        environment |= sglang_pools.prepare({row for model in MODELS.values() for row in model.components})
    watermark = CPU_WATERMARK if cpu else None
    print(f"{environment['cpu' if cpu else 'gpu']}, one large copy to the host {link.median:.1f} GB/s")
    if watermark:
        print(watermark)
    found: list[ProfiledPart] = []
    for part in measure(device, on_cpu() if cpu else on_gpu(), only):
        found.append(part)
        print(text([part]), flush=True)
        if out is not None:
            saved = {
                "ran_on": environment["ran_on"],
                "watermark": watermark,
                "environment": environment,
                "link_gb_per_s": asdict(link),
                "parts": [asdict(each) for each in found],
            }
            write_json(out, saved)
    return found


def main() -> int:
    """The command line."""
    parser = parser_of(__doc__, out_required=False)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    args = parsed(parser)
    profile(args.out, cpu=args.cpu, only=args.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
