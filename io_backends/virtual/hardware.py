"""One virtual device: its streams, the order in which they go on, and the race checker that is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import sites
from .memory import Memory
from .operations import Queued
from .order import Order, SeededOrder
from .races import Checker, Race, VectorClock
from .ranges import NOTHING, ByteRanges

if TYPE_CHECKING:
    from .gpu import Stream


class Hang(RuntimeError):
    """The host waits for something that no stream will ever reach."""


class Gpu:
    """The device: its streams, the order in which they go on, and what the race checker makes of it.

    Args:
        seed: of the order of everything that no fence orders.
        order: another order than the seed's.
        default: makes the legacy default stream.

    Attributes:
        streams: by handle.
        default: the legacy default stream.
        current: the stream that work goes to when none is named.
        leave_out: says of a wait (who waits, on which stream's event, and ``package/module.py:line in
            function`` of who asked for it) whether to forget it: shows what a fence is for.
        counts: what happened: "steps", "waits", "waits left out", "host waits", and whatever others count.
        clock: the host's, in milliseconds; in a seeded order, one for each step.
    """

    def __init__(self, seed: int, order: Order | None, default: Callable[[Gpu], Stream]) -> None:
        self.seed = seed
        self.checker = Checker()
        self.memory = Memory(self.checker)
        self.order = order or SeededOrder(seed)
        self.streams: dict[int, Stream] = {}
        self.leave_out: Callable[[Stream, Stream, str], bool] = lambda waiting, recorded_on, site: False
        self.counts: Counter[str] = Counter()
        self.clock = 0.0
        self.default = default(self)
        self.current = self.default

    def races(self) -> list[Race]:
        """Found so far."""
        self.memory.settle()
        return self.checker.races

    def host_access(self, name: str, reads: ByteRanges = NOTHING, writes: ByteRanges = NOTHING) -> None:
        """The host thread itself reads or writes memory, now."""
        self.memory.settle()
        self.checker.host_access(name, sites.caller(), reads=reads, writes=writes)

    def finish(self) -> None:
        """Run everything that can run, without the host waiting for it: for the end of a test."""
        self.memory.settle()
        while self.order.step(self):
            pass

    def put(self, stream: Stream, queued: Queued) -> None:
        """At the end of ``stream``, behind what CUDA puts before it."""
        for other in self._implicit(stream):
            self.checker.wait(stream.number, self.checker.record(other.number))
            if other.last is not None:
                queued.after += (other.last,)
        stream.queue.append(queued)
        stream.last = queued

    def _implicit(self, stream: Stream) -> list[Stream]:
        """Streams whose work so far comes before what is enqueued on ``stream`` now.

        "The legacy stream first waits on all blocking streams, the action is queued in the legacy stream,
        and then all blocking streams wait on the legacy stream" (CUDA Runtime API, Stream synchronization
        behavior). Here a blocking stream does so when it is given work next; that a wait of the host for a
        blocking stream covers the legacy stream's work is not promised.
        """
        if stream is self.default:
            return [other for other in self.streams.values() if other.blocking and other is not stream]
        return [self.default] if stream.blocking else []

    def host_waits(self, queued: Queued, clock: VectorClock, site: str) -> None:
        """The host waits until it is done; then everything before ``clock`` is known to be.

        Raises:
            Hang: it can never be done.
        """
        self.memory.settle()
        self.counts["host waits"] += 1
        while queued.time is None:
            if not self.order.step(self):
                raise Hang(f"what the host waits for in {site} is never reached: a stream waits for ever")
        self.order.waited(self, queued, site)
        self.checker.host_waits(clock)

    def host_looks(self, queued: Queued, clock: VectorClock) -> bool:
        """Whether it is done, as the host finds it; then everything before ``clock`` is known to be."""
        self.memory.settle()
        self.order.looked(self)
        done = queued.done_by(self.clock)
        if done:
            self.checker.host_waits(clock)
        return done

    def host_work(self, name: str, ms: float) -> None:
        """The host thread is busy for ``ms`` milliseconds of a cost model; in a seeded order, for a while."""
        self.memory.settle()
        self.order.busy(self, name, ms)
