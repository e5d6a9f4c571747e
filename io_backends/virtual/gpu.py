"""``torch.cuda`` on ordinary memory: this module can stand where that one does.

A stream is a queue. Nothing in it runs when it is enqueued: an :class:`~.order.Order` picks any stream that
can go on, whenever the host polls or waits, and sometimes while it enqueues. So work that no fence orders
runs in some seeds in the wrong order, and leaves wrong bytes; the race checker (:mod:`~.races`) is told the
same and needs no luck.

What CUDA promises, and no more, holds here: a stream's work runs in order; an event is complete when its
place in the queue is reached. The rules that are easy to get wrong stand where they are implemented.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from . import sites
from .hardware import Gpu, Hang
from .operations import Operation, Queued
from .order import Order

__all__ = [
    "Event",
    "ExternalStream",
    "Gpu",
    "Hang",
    "Stream",
    "StreamContext",
    "allocated",
    "current_device",
    "current_stream",
    "default_stream",
    "gpu",
    "is_available",
    "record_stream",
    "reset",
    "set_stream",
    "stream",
    "synchronize",
]

HANDLES = itertools.count(0x1000)
"""CUstream values. 0 is the legacy default stream."""


class Stream:
    """``torch.cuda.Stream``.

    Those of torch's pool do not synchronize with the legacy default stream (``cudaStreamNonBlocking``,
    ``kDefaultFlags`` in c10/cuda/CUDAStream.cpp), so neither do these, unless ``blocking`` is asked for: that
    is what ``cudaStreamCreate`` makes, which torch can be handed as an ``ExternalStream``.

    Args:
        of: its device; the one that is current without it.

    Attributes:
        cuda_stream: its handle.
        number: its number for the race checker.
        held: nothing of it runs, as if its engine were busy elsewhere.
        pace: how likely it is the one that goes on, against others.
        queue: what has not run.
        last: what was enqueued last, run or not.
    """

    def __init__(
        self,
        device: object = None,
        priority: int = 0,
        *,
        blocking: bool = False,
        handle: int | None = None,
        of: Gpu | None = None,
    ) -> None:
        self.gpu = of or gpu
        self.cuda_stream = next(HANDLES) if handle is None else handle
        self.priority = priority
        self.blocking = blocking
        self.held = False
        self.pace = 1.0
        self.queue: deque[Queued] = deque()
        self.last: Queued | None = None
        self._operation = "its beginning"
        self._name = f"stream {len(self.gpu.streams)}"
        self.number = self.gpu.checker.add_stream(self._name)
        self.gpu.streams[self.cuda_stream] = self
        self.gpu.order.new_stream(self)

    @property
    def name(self) -> str:
        """For reports, the timeline and :attr:`Gpu.leave_out`."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name
        self.gpu.checker.rename(self.number, name)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """(lowest, highest), as CUDA counts."""
        return 0, -5

    def launch(self, operation: Operation) -> None:
        """Enqueue ``operation``; returns at once."""
        gpu = self.gpu
        gpu.memory.settle()
        site = sites.caller()
        described = _without_references(operation)
        queued = Queued(self, operation.name, "operation", site, work=operation.work, operation=described)
        gpu.put(self, queued)
        access = gpu.checker.launch(
            self.number,
            operation.name,
            site,
            reads=operation.reads,
            writes=operation.writes,
            sm_work=operation.sm_work,
        )
        for used in operation.uses:
            gpu.memory.use(used, access)
        self._operation = operation.name
        gpu.order.enqueued(gpu, queued)

    def able(self) -> bool:
        """Whether it can go on."""
        return bool(self.queue) and not self.held and self.queue[0].able

    def run_piece(self) -> None:
        """Go on by one piece of work."""
        queued = self.queue[0]
        if queued.pieces:
            queued.pieces.popleft()()
        if not queued.pieces:
            self.leave(queued, self.gpu.clock)

    def leave(self, queued: Queued, time: float) -> None:
        """The head of the queue is done at ``time``."""
        assert self.queue.popleft() is queued
        queued.time = time
        # A chain of what waited for what would keep all there ever was.
        queued.after = ()

    def record_here(self, site: str) -> Queued:
        """A place at the end of the queue; done when it is reached."""
        gpu = self.gpu
        gpu.memory.settle()
        recorded = Queued(self, self._operation, "record", site)
        gpu.put(self, recorded)
        recorded.clock = gpu.checker.record(self.number)
        gpu.order.enqueued(gpu, recorded)
        return recorded

    def wait_here(self, recorded: Queued, site: str) -> None:
        """What is enqueued from now on begins after ``recorded``."""
        gpu = self.gpu
        gpu.memory.settle()
        if isinstance(recorded.stream, Stream) and gpu.leave_out(self, recorded.stream, site):
            gpu.counts["waits left out"] += 1
            return
        gpu.counts["waits"] += 1
        gpu.checker.wait(self.number, recorded.clock)
        waiting = Queued(self, recorded.name, "wait", site, after=(recorded,))
        gpu.put(self, waiting)
        gpu.order.enqueued(gpu, waiting)

    def wait_event(self, event: Event) -> None:
        """Work enqueued from now on waits for the latest recording of ``event`` as of this call."""
        event.wait(self)

    def wait_stream(self, other: Any) -> None:
        """For all that is on ``other`` so far."""
        event = Event()
        event.record(other)
        self.wait_event(event)

    def record_event(self, event: Event | None = None) -> Event:
        """Record ``event``, or a new one, here; returns it."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether everything enqueued so far is done."""
        return self.gpu.host_looks(self._end(), self.gpu.checker.record(self.number))

    def synchronize(self) -> None:
        """The host waits for everything enqueued so far."""
        self.gpu.host_waits(self._end(), self.gpu.checker.record(self.number), sites.caller())

    def _end(self) -> Queued:
        """The last place in the queue."""
        if self.last is not None:
            return self.last
        empty = Queued(self, self._operation, "record", "")
        empty.time = 0.0
        return empty


def ExternalStream(handle: int, device: object = None) -> Stream:
    """``torch.cuda.ExternalStream``: the stream that whoever made ``handle`` means by it."""
    return gpu.streams.get(handle) or Stream(device, handle=handle)


class Event:
    """``torch.cuda.Event``, and a class that can be subclassed, as the plug-in does."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self._timing = enable_timing
        self._recorded: Queued | None = None

    def record(self, stream: Any = None) -> None:
        """Recording again moves the event; who waits already waits for the earlier place."""
        stream = current_stream() if stream is None else stream
        if isinstance(stream, Stream):
            self._recorded = stream.record_here(sites.caller())
        else:
            # A stream of the CPU engine: what is "on" it ran at once.
            self._recorded = Queued(stream, "", "record", "")
            self._recorded.time = gpu.clock

    def wait(self, stream: Any = None) -> None:
        """Waits for the latest recording as of this call; a wait for an event never recorded does nothing."""
        stream = current_stream() if stream is None else stream
        if self._recorded is not None:
            stream.wait_here(self._recorded, sites.caller())

    def query(self) -> bool:
        """An event that was never recorded reads as complete."""
        return self._recorded is None or gpu.host_looks(self._recorded, self._recorded.clock)

    def synchronize(self) -> None:
        if self._recorded is not None:
            gpu.host_waits(self._recorded, self._recorded.clock, sites.caller())

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds of the virtual clock; in a seeded order, steps.

        Raises:
            ValueError: as torch: an event keeps no time, was not recorded, or has not completed.
        """
        if not (self._timing and end._timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._recorded is None or end._recorded is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        began, ended = self._recorded.time, end._recorded.time
        if began is None or ended is None:
            raise ValueError("Both events must be completed before calculating elapsed time.")
        return ended - began


def reset(seed: int = 0, order: Order | None = None) -> Gpu:
    """A new device with empty queues, which is :data:`gpu` from now on. What is on the old one never runs."""
    global gpu
    gpu = Gpu(seed, order, _legacy_default)
    return gpu


def _legacy_default(device: Gpu) -> Stream:
    default = Stream(handle=0, blocking=True, of=device)
    default.name = "default"
    return default


def current_stream(device: object = None) -> Stream:
    """The stream that is current; there is one device."""
    return gpu.current


def default_stream(device: object = None) -> Stream:
    """The legacy default stream, with handle 0."""
    return gpu.default


@contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    """Make ``chosen`` current; None changes nothing, as in torch."""
    device = gpu
    previous = device.current
    device.current = previous if chosen is None else chosen
    try:
        yield
    finally:
        device.current = previous


StreamContext = stream
"""torch's other name for it."""


def set_stream(chosen: Stream | None) -> None:
    """Make ``chosen`` current from now on."""
    if chosen is not None:
        gpu.current = chosen


def synchronize(device: object = None) -> None:
    """The host waits for all streams."""
    for each in list(gpu.streams.values()):
        each.synchronize()


def record_stream(what: Any, on: Stream) -> None:
    """``torch.Tensor.record_stream``: the memory is not given to others before the work that is on ``on``
    when the tensor dies is done.
    """
    gpu.memory.block(what).protected.add(on.number)


def allocated(what: Any, on: Stream | None = None, name: str = "") -> None:
    """``what`` is memory of torch's caching allocator, taken on ``on`` (the current stream): when it dies,
    its memory goes to work that follows on that stream, and to no other before.
    """
    gpu.memory.block(what, name).stream = (on or gpu.current).number


def is_available() -> bool:
    """Whether there is a device: this one, always."""
    return True


def current_device() -> int:
    """The only device's number."""
    return 0


def get_device_properties(device: object = None) -> SimpleNamespace:
    """As :func:`torch.cuda.get_device_properties`, of which one is known: a Hopper's SMs."""
    return SimpleNamespace(multi_processor_count=132)


def _without_references(operation: Operation) -> Operation:
    """What the cost model reads of it: a queue keeps nothing alive."""
    return Operation(
        operation.name,
        engine=operation.engine,
        d2h_on_sms=operation.d2h_on_sms,
        exclusive_sms=operation.exclusive_sms,
        copies=operation.copies,
        nbytes=operation.nbytes,
        crosses_link=operation.crosses_link,
        ms=operation.ms,
    )


gpu: Gpu
reset()
