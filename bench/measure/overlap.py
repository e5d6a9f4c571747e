"""A scheduler's overlap loop, back to back forwards that each leave rows to write back.

One forward runs while the next is prepared: a forward is launched, then the results of the one before are
waited for, and the rows of that one are given to write-back. So a write is submitted while the forward after
the one that made its rows runs, and its producer fence waits for that one too. This is the order of
``event_loop_overlap`` in SGLang 0.5.23; the fences are taken where this project's hooks take them.

The loop knows streams and events only, so that it runs on a GPU, on a CPU, and in model time on the virtual
device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .devices import Bench

WARM_CYCLES = 3
"""Of the pattern, left out of figures: until then the first writes fill what was empty."""


@dataclass(frozen=True, slots=True)
class ForwardStep:
    """A forward: how long it runs alone in ms, tokens whose rows it makes, and whether it decodes."""

    ms: float
    tokens: int
    decode: bool = False


@dataclass
class Flight:
    """A write on its way.

    Attributes:
        nbytes: of its rows.
        submitted: event at the submission.
        producer: end of the forward that it waits for, the last one launched by then.
        done: event at its end; None while a part is not enqueued.
    """

    nbytes: int
    submitted: Any
    producer: Any
    done: Any = None


class Writer(Protocol):
    """Who writes back in a loop."""

    def submit(self, tokens: int, flight: Flight, forward_stream: Any) -> None:
        """Enqueue a write behind the forwards; sets ``flight.done``, now or when all of it is enqueued."""
        ...

    def advance(self, forward_stream: Any, *, launching: bool) -> None:
        """Enqueue what was left. ``launching``: a forward is launched next; else the scheduler polls."""
        ...

    def take_fences(self) -> Sequence[Any]:
        """Events that the next forward waits for; forgotten then."""
        ...

    def waiting_bytes(self) -> int:
        """Bytes of rows that are given to it and not enqueued."""
        ...


@dataclass
class Trace:
    """What happened, as events of the device.

    Attributes:
        begin: before the first forward.
        ends: after each forward.
        fences: (reached, released) on the forward stream, of each forward that waited.
        flights: every write.
        waiting: bytes not enqueued, at an event before each forward.
    """

    begin: Any
    ends: list[Any] = field(default_factory=list)
    fences: list[tuple[int, Any, Any]] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
    waiting: list[tuple[Any, int]] = field(default_factory=list)


class Ids(Protocol):
    """Copies the token ids of a step to the host."""

    def copy(self, step: int) -> None:
        """Enqueue on the current stream."""
        ...


def run(
    device: Bench,
    steps: Sequence[ForwardStep],
    launch: Callable[[ForwardStep], None],
    ids: Ids,
    streams: tuple[Any, Any, Any],
    writer: Writer | None,
    bytes_per_token: int,
) -> Trace:
    """All steps, then whatever is left of the writes.

    Args:
        launch: enqueues a step's forward on the current stream.
        streams: the scheduler's own, the forwards', and that of the copies of ids. Nothing else is on them.
        writer: None: no write-back.
    """
    schedule, forwards, copies = streams
    device.synchronize()
    with device.use_stream(schedule):
        trace = Trace(device.record(forwards))
        loop = _Loop(device, forwards, schedule, writer, trace, bytes_per_token)
        before: tuple[ForwardStep, Any] | None = None
        for nth, step in enumerate(steps):
            loop.poll()
            loop.fence(nth)
            with device.use_stream(forwards):
                launch(step)
                trace.ends.append(device.record(forwards))
            device.wait(copies, trace.ends[-1])
            with device.use_stream(copies):
                ids.copy(nth)
            arrived = device.record(copies)
            if before is not None:
                loop.results_of(*before)
            before = step, arrived
        if before is not None:
            loop.results_of(*before)
        while loop.outstanding:
            loop.poll()
    device.synchronize()
    return trace


class _Loop:
    def __init__(
        self, device: Bench, forwards: Any, schedule: Any, writer: Writer | None, trace: Trace, per_token: int
    ) -> None:
        self._device, self._forwards, self._schedule = device, forwards, schedule
        self._writer, self._trace, self._per_token = writer, trace, per_token
        self.outstanding: list[Flight] = []

    def poll(self) -> None:
        """What SGLang asks in every round: which writes, oldest first, are done."""
        writer = self._writer
        while writer is not None and self.outstanding:
            oldest = self.outstanding[0]
            if oldest.done is None:
                writer.advance(self._forwards, launching=False)
            if oldest.done is None or not self._device.query(oldest.done):
                return
            self.outstanding.pop(0)

    def fence(self, nth: int) -> None:
        """Before a forward is launched."""
        device, forwards = self._device, self._forwards
        if self._writer is None:
            return
        self._writer.advance(forwards, launching=True)
        events = self._writer.take_fences()
        self._trace.waiting.append((device.record(self._schedule), self._writer.waiting_bytes()))
        if events:
            reached = device.record(forwards)
            for event in events:
                device.wait(forwards, event)
            self._trace.fences.append((nth, reached, device.record(forwards)))

    def results_of(self, step: ForwardStep, arrived: Any) -> None:
        """The host waits for a step's results, and gives its rows to write-back."""
        arrived.synchronize()
        if self._writer is None or not step.tokens:
            return
        device = self._device
        flight = Flight(step.tokens * self._per_token, device.record(self._schedule), self._trace.ends[-1])
        self._writer.submit(step.tokens, flight, self._forwards)
        self._trace.flights.append(flight)
        self.outstanding.append(flight)


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that at least ``share`` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def loop_metrics(trace: Trace, cycle: int) -> dict[str, float]:
    """Metrics of a loop over a pattern of ``cycle`` steps; those of writes only where there were some."""
    begin = trace.begin
    ends = [begin.elapsed_time(end) for end in trace.ends]
    first = WARM_CYCLES * cycle - 1
    start, stop = ends[first], ends[-1]
    found = {"cycle_ms": (stop - start) / ((len(ends) - 1 - first) / cycle)}
    if not trace.flights:
        return found
    sent = [begin.elapsed_time(flight.submitted) for flight in trace.flights]
    done = [begin.elapsed_time(flight.done) for flight in trace.flights]
    sizes = [flight.nbytes for flight in trace.flights]
    arrived = sum(size for size, at in zip(sizes, done, strict=True) if start < at <= stop)
    found["kept_gb_per_s"] = arrived / (stop - start) / 1e6
    # The last one finds no forward to wait for, and the one before still on the link.
    late = [nth for nth, at in enumerate(sent) if start < at < stop]
    took = [done[nth] - sent[nth] for nth in late]
    after = [done[nth] - max(sent[nth], begin.elapsed_time(trace.flights[nth].producer)) for nth in late]
    for name, values in (("done", took), ("after_forward", after)):
        found[f"{name}_p50_ms"], found[f"{name}_p99_ms"] = (quantile(values, share) for share in (0.5, 0.99))
    waits = dict.fromkeys(range(first + 1, len(ends)), 0.0)
    for nth, reached, released in trace.fences:
        if nth in waits:
            waits[nth] = reached.elapsed_time(released)
    found["fence_ms"] = sum(waits.values()) / len(waits)
    found["fence_max_ms"] = max(waits.values())
    found["held_mb"] = (
        max(
            sum(size for size, at, end in zip(sizes, sent, done, strict=True) if at <= now < end)
            for now in sent
        )
        / 1e6
    )
    found["waiting_mb"] = max(nbytes for _, nbytes in trace.waiting) / 1e6
    return found


def series(trace: Trace) -> list[tuple[float, float]]:
    """(ms since the beginning, MB not enqueued), before each forward."""
    return [(round(trace.begin.elapsed_time(at), 3), nbytes / 1e6) for at, nbytes in trace.waiting]
