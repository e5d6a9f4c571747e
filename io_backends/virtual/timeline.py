"""A run in model time: who runs when, who waits and for whom; and the same as a Chrome trace.

:class:`ModelOrder` is a discrete-event simulation in the place of a seed: the program, with its polls and its
decisions, meets the times that the cost model gives it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .model import CostModel
from .operations import Operation, Queued

if TYPE_CHECKING:
    from .gpu import Gpu, Stream

HOST = "host thread"
"""The host's row."""

NOTE = "model, not a measurement"

Category = Literal["forward", "sm_d2h", "copy_d2h", "copy_h2d", "host", "wait"]

_LINKS = {"copy_d2h": "the link to the host", "copy_h2d": "the link from the host"}


@dataclass(frozen=True, slots=True)
class Slice:
    """Something that took time.

    Attributes:
        track: the stream's name, or :data:`HOST`.
        name: the operation's; for a wait, "waits for ...".
        category: what did it, or ``wait``.
        start, end: milliseconds of model time.
        issued: where it was asked for.
        source: of a wait for another stream: its name, and until when it ran.
        nbytes: bytes moved.
    """

    track: str
    name: str
    category: Category
    start: float
    end: float
    issued: str = ""
    source: tuple[str, float] | None = None
    nbytes: int = 0


@dataclass
class Timeline:
    """What happened, in no order.

    Attributes:
        model: the costs it was made with.
    """

    model: CostModel
    slices: list[Slice] = field(default_factory=list)

    @property
    def tracks(self) -> list[str]:
        """The host first, then streams in the order in which they first did something."""
        by_start = sorted(self.slices, key=lambda slice: slice.start)
        return list(dict.fromkeys([HOST, *(slice.track for slice in by_start)]))

    def waited(self, track: str, *, on: str | None = None) -> float:
        """Milliseconds that ``track`` waited (for stream ``on`` only, if given)."""
        return sum(
            slice.end - slice.start
            for slice in self.slices
            if slice.track == track
            and slice.category == "wait"
            and (on is None or (slice.source is not None and slice.source[0] == on))
        )


class ModelOrder:
    """An :class:`~.order.Order` by a cost model.

    Each stream does its work in order. A copy needs the link in its direction, and so do SM kernels that
    write host memory; the link serves one at a time, whoever can begin first. An operation's effects on
    memory happen when it begins.
    """

    def __init__(self, model: CostModel | None = None) -> None:
        self.model = model or CostModel()
        self.timeline = Timeline(self.model)
        self._free: dict[int, float] = {}
        self._links = dict.fromkeys(_LINKS, 0.0)

    def new_stream(self, stream: Stream) -> None:
        self._free[stream.cuda_stream] = 0.0

    def enqueued(self, gpu: Gpu, queued: Queued) -> None:
        if queued.operation is None:
            gpu.clock += self.model.event_us / 1e3
        else:
            self._spend(gpu, f"launch {queued.name}", self.model.host_ms(queued.operation), queued.issued)
        # It is in its queue already, and may not begin before the call for it returns.
        queued.asked = gpu.clock
        self._advance(gpu)

    def looked(self, gpu: Gpu) -> None:
        gpu.clock += self.model.poll_us / 1e3
        self._advance(gpu)

    def waited(self, gpu: Gpu, queued: Queued, site: str) -> None:
        assert queued.time is not None
        if queued.time > gpu.clock:
            self._wait(HOST, gpu.clock, queued, site)
            gpu.clock = queued.time
        self._advance(gpu)

    def busy(self, gpu: Gpu, name: str, ms: float) -> None:
        self._spend(gpu, name, ms, "")
        self._advance(gpu)

    def step(self, gpu: Gpu) -> bool:
        head = self._next(gpu)
        if head is None:
            return False
        self._run(*head)
        return True

    def _spend(self, gpu: Gpu, name: str, ms: float, issued: str) -> None:
        start, gpu.clock = gpu.clock, gpu.clock + ms
        if ms:
            self.timeline.slices.append(Slice(HOST, name, "host", start, gpu.clock, issued))

    def _advance(self, gpu: Gpu) -> None:
        """Whatever begins before the host's clock."""
        while True:
            head = self._next(gpu)
            if head is None or head[1] > gpu.clock:
                return
            self._run(*head)

    def _next(self, gpu: Gpu) -> tuple[Queued, float] | None:
        """What can begin first, and when."""
        heads = [stream.queue[0] for stream in gpu.streams.values() if stream.able()]
        return min(((head, self._start(head)) for head in heads), key=lambda pair: pair[1], default=None)

    def _start(self, head: Queued) -> float:
        link = _link(head.operation)
        return max(self._ready(head), self._fenced(head), 0.0 if link is None else self._links[link])

    def _ready(self, head: Queued) -> float:
        """When it would begin, but for others."""
        return max(head.asked, self._free[head.stream.cuda_stream])

    def _fenced(self, head: Queued) -> float:
        return max((other.time or 0.0 for other in head.after), default=0.0)

    def _run(self, head: Queued, start: float) -> None:
        stream, ready, fenced = head.stream, self._ready(head), self._fenced(head)
        if fenced > ready:
            last = max(head.after, key=lambda other: other.time or 0.0)
            self._wait(stream.name, ready, last, head.issued)
        end = start
        operation, link = head.operation, _link(head.operation)
        if operation is not None:
            end += self.model.device_ms(operation)
            if link is not None:
                self._links[link] = end
                if start > max(ready, fenced):
                    name = f"waits for {_LINKS[link]}"
                    self.timeline.slices.append(
                        Slice(stream.name, name, "wait", max(ready, fenced), start, head.issued)
                    )
            if end > start:
                self.timeline.slices.append(
                    Slice(
                        stream.name,
                        head.name,
                        _category(operation),
                        start,
                        end,
                        head.issued,
                        nbytes=round(self.model.nbytes(operation)),
                    )
                )
        self._free[stream.cuda_stream] = end
        while head.pieces:
            head.pieces.popleft()()
        stream.leave(head, end)

    def _wait(self, track: str, start: float, other: Queued, site: str) -> None:
        assert other.time is not None
        name, source = f"waits for {other.name}", None
        if hasattr(other.stream, "name"):
            source = (other.stream.name, other.time)
            name += f" on {other.stream.name}"
        self.timeline.slices.append(Slice(track, name, "wait", start, other.time, site, source))


def _link(operation: Operation | None) -> str | None:
    if operation is None:
        return None
    if operation.engine in _LINKS:
        return operation.engine
    return "copy_d2h" if operation.crosses_link else None


def _category(operation: Operation) -> Category:
    if operation.d2h_on_sms:
        return "sm_d2h"
    if operation.engine == "copy_d2h" or operation.engine == "copy_h2d":
        return operation.engine
    return "forward"


def write_chrome_trace(path: str | Path, runs: Mapping[str, Timeline]) -> None:
    """Write Chrome trace JSON, which ui.perfetto.dev opens: a process a run, a thread a stream.

    Args:
        path: where to.
        runs: timelines by name.
    """
    events = [event for process, run in enumerate(runs.items(), 1) for event in _events(process, *run)]
    models = {name: asdict(timeline.model) for name, timeline in runs.items()}
    trace = {"traceEvents": events, "otherData": {"note": NOTE, "model": json.dumps(models)}}
    Path(path).write_text(json.dumps(trace, indent=1) + "\n", encoding="utf-8")


def _events(process: int, name: str, timeline: Timeline) -> Iterator[dict[str, Any]]:
    def meta(kind: str, thread: int, **values: Any) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": values}

    yield meta("process_name", 0, name=f"{name} ({NOTE})")
    yield meta("process_sort_index", 0, sort_index=process)
    threads = {track: thread for thread, track in enumerate(timeline.tracks, 1)}
    for track, thread in threads.items():
        yield meta("thread_name", thread, name=track)
        yield meta("thread_sort_index", thread, sort_index=thread)
    for nth, slice in enumerate(timeline.slices):
        where = {"pid": process, "tid": threads[slice.track]}
        details = (
            {"issued": slice.issued, "bytes": slice.nbytes} if slice.nbytes else {"issued": slice.issued}
        )
        # Microseconds, to the nanosecond: what touches in the model touches in the trace.
        start, end = round(slice.start * 1e3, 3), round(slice.end * 1e3, 3)
        yield {
            "ph": "X",
            "name": slice.name,
            "cat": slice.category,
            "ts": start,
            "dur": round(end - start, 3),
            **where,
            "args": details,
        }
        if slice.source is not None and slice.source[0] in threads:
            # An arrow from the end of what was waited for to the end of the wait. An arrow begins and ends at
            # the slice that is there at its time: a nanosecond before both ends.
            flow = {
                "cat": "wait",
                "name": "waited for",
                "id": process * 1_000_000 + nth,
                "ts": round(end - 1e-3, 3),
            }
            yield {"ph": "s", **flow, "pid": process, "tid": threads[slice.source[0]]}
            yield {"ph": "f", "bp": "e", **flow, **where}
