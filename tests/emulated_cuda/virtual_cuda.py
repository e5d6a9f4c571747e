"""``torch.cuda`` on ordinary memory: this module can stand where that one does.

A stream is a queue of Python callables. Nothing in it runs when it is enqueued: a seeded scheduler picks any
stream that can go on, whenever the host polls or waits, and sometimes while it enqueues. So work that no
fence orders runs in some seeds in the wrong order, and leaves wrong bytes.

What CUDA promises, and no more, holds here: a stream's work runs in order; an event is complete when its
place in the queue is reached. The rules that are easy to get wrong stand where they are implemented.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

HANDLES = itertools.count(0x1000)
"""CUstream values. 0 is the default stream, which the driver takes no batches on."""


class Hang(RuntimeError):
    """The host waits for something that no stream will ever reach."""


class Recording:
    """One recording of an event, at one place of one stream's queue."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.time: int | None = None

    @property
    def done(self) -> bool:
        return self.time is not None


class Gpu:
    """The device: its streams, and the order that one seed gives them.

    Attributes:
        leave_out: says of a wait (who waits, on which stream's event) whether to forget it: for tests that
            show what a fence is for.
        counts: what happened: "steps", "copies", "gathers", "waits left out", and so on.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.streams: dict[int, Stream] = {}
        self.leave_out: Callable[[Stream, Stream], bool] = lambda waiting, recorded: False
        self.counts: Counter[str] = Counter()
        self.clock = 0
        # How much runs while the host is still enqueuing: nothing, now and then, or all that can.
        self._eager = self.random.choice((0.0, 0.0, 0.5, 1.0))

    def step(self) -> bool:
        """Let one stream go on by one piece of work; False if none can."""
        able = [stream for stream in self.streams.values() if stream.able()]
        if not able:
            return False
        (stream,) = self.random.choices(able, [stream.pace for stream in able])
        self.counts["steps"] += 1
        self.clock += 1
        stream.run_next()
        return True

    def progress(self) -> None:
        """Some time passes while the host looks."""
        for _ in range(self.random.choice((0, 1, 2, 8))):
            self.step()

    def enqueued(self) -> None:
        """Some time passes while the host enqueues."""
        while self.random.random() < self._eager and self.step():
            pass

    def until(self, done: Callable[[], bool]) -> None:
        """The host waits."""
        while not done():
            if not self.step():
                raise Hang("what the host waits for is never reached: a stream waits for ever")


class Stream:
    """``torch.cuda.Stream``.

    Attributes:
        name: for :attr:`Gpu.leave_out`.
        held: nothing of it runs, as if its engine were busy elsewhere.
    """

    def __init__(self, device: object = None, priority: int = 0, *, handle: int | None = None) -> None:
        self.cuda_stream = next(HANDLES) if handle is None else handle
        self.priority = priority
        self.name = ""
        self.held = False
        self._queue: deque[tuple[Recording | None, Callable[[], object]]] = deque()
        # Streams differ in speed by up to ten thousand times, so that some seeds starve one of them.
        self.pace = 10 ** gpu.random.uniform(-2, 2)
        gpu.streams[self.cuda_stream] = self

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5

    def enqueue(self, work: Callable[[], object], after: Recording | None = None) -> None:
        """Put ``work`` behind what is queued; it, and what follows, does not start before ``after``."""
        self._queue.append((after, work))
        gpu.enqueued()

    def able(self) -> bool:
        if self.held or not self._queue:
            return False
        after, _ = self._queue[0]
        return after is None or after.done

    def run_next(self) -> None:
        _, work = self._queue.popleft()
        work()

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, other: Any) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        gpu.progress()
        return not self._queue

    def synchronize(self) -> None:
        gpu.counts["host waits"] += 1
        gpu.until(lambda: not self._queue)


class Event:
    """``torch.cuda.Event``, and a class that can be subclassed, as the plug-in does."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._timing = enable_timing
        self._recording: Recording | None = None

    def record(self, stream: Any = None) -> None:
        """Recording again moves the event; who waits already waits for the earlier place."""
        stream = current_stream() if stream is None else stream
        recording = self._recording = Recording(stream)
        if not isinstance(stream, Stream):
            # A stream of torch.cpu: what is "on" it ran at once.
            recording.time = gpu.clock
            return
        if type(self) is not Event:
            gpu.counts["deferred completions"] += 1

        def reached() -> None:
            recording.time = gpu.clock

        stream.enqueue(reached)

    def wait(self, stream: Any = None) -> None:
        """Waits for the latest recording as of this call; a wait for an event never recorded does nothing."""
        stream = current_stream() if stream is None else stream
        recording = self._recording
        if recording is None:
            return
        if isinstance(recording.stream, Stream) and gpu.leave_out(stream, recording.stream):
            gpu.counts["waits left out"] += 1
            return
        stream.enqueue(lambda: None, after=recording)

    def query(self) -> bool:
        """An event that was never recorded reads as complete."""
        gpu.progress()
        return self._recording is None or self._recording.done

    def synchronize(self) -> None:
        gpu.counts["host waits"] += 1
        recording = self._recording
        if recording is not None:
            gpu.until(lambda: recording.done)

    def elapsed_time(self, end: Event) -> float:
        if not (self._timing and end._timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._recording is None or end._recording is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if self._recording.time is None or end._recording.time is None:
            raise ValueError("Both events must be completed before calculating elapsed time.")
        return float(end._recording.time - self._recording.time)


def reset(seed: int) -> Gpu:
    """A new device with empty queues. Streams of the old one no longer run."""
    global gpu, _current
    gpu = Gpu(seed)
    _current = Stream(handle=0)
    _current.name = "schedule"
    return gpu


def current_stream(device: object = None) -> Stream:
    return _current


@contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    """Make ``chosen`` current; None changes nothing, as in torch."""
    global _current
    previous = _current
    _current = previous if chosen is None else chosen
    try:
        yield
    finally:
        _current = previous


def is_available() -> bool:
    return True


def current_device() -> int:
    return 0


gpu: Gpu
_current: Stream
reset(0)
