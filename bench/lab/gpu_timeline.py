"""What a GPU does in each step of a whole server that computes prompts: forward, gather, nothing.

    python -m sglang_hicache.bench.lab.gpu_timeline kvheavy-page64 --workload prefill --out DIR

As :mod:`~.thread_profile`, but SGLang's profiler looks at the GPU only, which hardly slows the server. Saves
CELL-ARM and the rank in a .trace.json.gz, and CELL-ARM-gpu.json: of each step (from one forward's first
kernel to the next one's) how long it is, and how much of it the forward's stream is busy, this project's
gathers run, copies to the host run, and neither the forward's stream nor a gather does anything. And of each
kind of work on the forward's stream, kernels and copies, how long it takes, and how long the stream had
nothing to do before it, apart for what began beside a large copy to the host: what those cost a forward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from ..measure.environment import describe_environment
from ..saved import write_json
from ..serving import ServerError
from .cell_server import name_of, need_gpu
from .gpu_plan import say
from .profiled_server import events_of, profile_parser

FIRST_KERNEL = "compute_position_kernel"
"""Of each prefill, SGLang 0.5.23."""

GATHER = "gather_rows"

_LARGE = 2**16
"""Bytes of a copy that is no token id."""


@dataclass(frozen=True)
class StepTime:
    """One step, milliseconds.

    Attributes:
        length: from its first kernel to the next step's.
        forward: in which the stream of forwards is busy.
        gather: in which a gather runs.
        gathers: how many.
        copies: in which copies to the host run.
        nothing: in which neither of the first two does.
    """

    length: float
    forward: float
    gather: float
    gathers: int
    copies: float
    nothing: float


@dataclass(frozen=True)
class KindTime:
    """Work of one kind on the stream of forwards, microseconds.

    Attributes:
        kind: ``kernel``, or of a copy or a memset its name.
        beside: whether it began while a large copy to the host ran.
        count: how many.
        took_us, most_us: of one, median and longest.
        idle_us: in which the stream had nothing to do before it, on average.
    """

    kind: str
    beside: bool
    count: int
    took_us: float
    most_us: float
    idle_us: float


def step_times(events: Iterable[Mapping[str, Any]]) -> list[StepTime]:
    """Of a Chrome trace's events, as torch writes them."""
    work = _work(events)
    firsts = sorted((_span(each)[0], each["args"]["stream"]) for each in work if FIRST_KERNEL in each["name"])
    if not firsts:
        return []
    stream = firsts[0][1]
    forward = [_span(each) for each in work if each["args"]["stream"] == stream]
    gathers = [_span(each) for each in work if each["name"] == GATHER]
    copies = _large_copies(work)
    steps = []
    for (begin, _), (end, _) in pairwise(firsts):
        took = end - begin
        steps.append(
            StepTime(
                took,
                _busy(forward, begin, end),
                _busy(gathers, begin, end),
                sum(begin <= start < end for start, _ in gathers),
                _busy(copies, begin, end),
                took - _busy([*forward, *gathers], begin, end),
            )
        )
    return steps


def kind_times(events: Iterable[Mapping[str, Any]]) -> list[KindTime]:
    """Of a Chrome trace's events, from the first prefill's first kernel on."""
    work = sorted(_work(events), key=lambda each: _span(each)[0])
    copies = _large_copies(work)
    found: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    stream, until, copied = None, 0.0, 0
    for each in work:
        begin, end = _span(each)
        if stream is None and FIRST_KERNEL in each["name"]:
            stream, until = each["args"]["stream"], begin
        if stream is None or each["args"]["stream"] != stream:
            continue
        while copied < len(copies) and copies[copied][1] <= begin:
            copied += 1
        beside = copied < len(copies) and copies[copied][0] <= begin
        kind = "kernel" if each["cat"] == "kernel" else each["name"]
        found.setdefault((kind, beside), []).append((end - begin, max(0.0, begin - until)))
        until = max(until, end)
    return [
        KindTime(
            kind,
            beside,
            len(times),
            median(took for took, _ in times) * 1e3,
            max(took for took, _ in times) * 1e3,
            fmean(idle for _, idle in times) * 1e3,
        )
        for (kind, beside), times in sorted(found.items())
    ]


def _work(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What the GPU did."""
    return [
        event
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def _large_copies(work: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """When copies to the host ran that are no token ids, in the order given."""
    return [_span(each) for each in work if "DtoH" in each["name"] and each["args"].get("bytes", 0) >= _LARGE]


def _span(event: Mapping[str, Any]) -> tuple[float, float]:
    """When it began and ended, ms."""
    begin = float(event["ts"]) / 1e3
    return begin, begin + float(event["dur"]) / 1e3


def _busy(spans: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    """How much of a time any of these covers."""
    covered, until = 0.0, begin
    for start, stop in sorted(spans):
        start, stop = max(start, until), min(stop, end)
        if stop > start:
            covered, until = covered + stop - start, stop
    return covered


def text(steps: Sequence[StepTime], kinds: Sequence[KindTime] = ()) -> str:
    """Medians over the steps, and a line for each kind."""
    if not steps:
        return "no steps"
    middle = {name: median(getattr(each, name) for each in steps) for name in asdict(steps[0])}
    lines = [
        f"{len(steps)} steps, medians in ms: {middle['length']:.2f} each; forward's stream busy "
        f"{middle['forward']:.2f}, gathers {middle['gather']:.2f} ({middle['gathers']:.0f}), copies to the "
        f"host {middle['copies']:.2f}, neither forward nor gather {middle['nothing']:.2f}"
    ]
    for each in kinds:
        where = ", beside a copy to the host" if each.beside else ""
        lines.append(
            f"  {each.kind}{where}: {each.count:,} of {each.took_us:.1f} us (at most {each.most_us:,.1f}), "
            f"after {each.idle_us:.1f} us of nothing"
        )
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = profile_parser(__doc__, steps=60)
    args = parser.parse_args(given)
    need_gpu(parser)
    name = name_of(args)
    try:
        events = events_of(args, ("GPU",))
    except ServerError as error:
        say(f"{name}: {error}")
        return 2
    steps, kinds = step_times(events), kind_times(events)
    print(text(steps, kinds))
    saved = {
        "environment": describe_environment(cpu=False),
        "steps": [asdict(each) for each in steps],
        "kinds": [asdict(each) for each in kinds],
    }
    write_json(args.out / f"{name}-gpu.json", saved)
    return 0


if __name__ == "__main__":
    sys.exit(main())
