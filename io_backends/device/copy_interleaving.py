"""Copies in turns on two streams, so that copies of others get the engine in between.

All copies to the host share one copy engine, and it stays with a stream for as long as that one has more: on
an H100 a copy of 1 KiB on another stream waited for all that was left of a write of 1.2 GB, 20 ms (part
``turns`` of bench/results/2026-11-26-h100/profile.json). SGLang copies the token ids of every step that way.
The engine looks for others when the stream it serves must wait for another stream's turn. Tried by hand on
that GPU, and no help: streams of the highest priority for the small copies, 32 hardware queues instead of 8,
and a wait that is over within microseconds, which the engine waits for too. Nor on an H200: the large copy as
a peer's, as one between two places of device memory, in a batch, from another context, from a CUDA graph, or
to host memory that the driver maps itself. There an operation on another engine (a copy of 4 bytes to the
device or on it, a memset) between two copies of one stream lets others in too, but takes more of the link
beside busy SMs than turns on two streams do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..plan.copies import CopyBatch
from .base import Event, Stream
from .driver import Driver
from .host_memory import SHORT, drop_empty

QUANTUM_SECONDS = 0.6e-3
"""Of a stream's turn, which others wait for; twice as long while two streams take turns with theirs (two
backends of one policy). Half of it costs an H100's link 1.1 to 1.4 instead of 0.5 to 0.6 % (the file above,
32 MiB)."""

QUANTUM_BYTES = 32 * 2**20
"""What is copied before it is the other's turn (the quantum of deficit round robin, Shreedhar and
Varghese 1995), where the link was not measured: what 55 GB/s move in that time."""

_LEAST_QUANTUM, _MOST_QUANTUM = 8 * 2**20, 256 * 2**20
"""Whatever a measurement says: one PCIe 4.0 x8 link's, and one NVLink-C2C's."""


def quantum_of(bytes_per_second: float) -> int:
    """The quantum, in bytes, on a link of that rate."""
    return min(max(int(bytes_per_second * QUANTUM_SECONDS), _LEAST_QUANTUM), _MOST_QUANTUM)


def split_long(batch: CopyBatch, most: int) -> CopyBatch:
    """``batch`` with every copy cut into pieces of at most ``most`` bytes; itself if none is longer.

    Args:
        batch: copies without zero-byte ones.
        most: bytes, at least 1.
    """
    nbytes = batch.nbytes.view(np.int64)
    if int(nbytes.max(initial=0)) <= most:
        return batch
    pieces = -(-nbytes // most)
    # Where each piece begins within its copy: 0, most, 2 * most, ...
    nth = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = nth * most
    step = begin.view(np.uint64)
    return CopyBatch(
        dst=np.repeat(batch.dst, pieces) + step,
        src=np.repeat(batch.src, pieces) + step,
        nbytes=np.minimum(np.repeat(nbytes, pieces) - begin, most).view(np.uint64),
    )


class _Pair:
    """A stream that copies are asked for on, and the one that takes turns with it.

    Attributes:
        handles: their CUstreams.
        now: whose turn it is, 0 or 1.
        given: bytes of that turn so far.
    """

    def __init__(self, stream: Stream, other: Stream, new_event: Callable[[], Event]) -> None:
        self._streams = (stream, other)
        self._events = (new_event(), new_event())
        for event, on in zip(self._events, self._streams, strict=True):
            event.record(on)  # torch makes the event now, so that it cannot fail to when a turn is over
        self.handles: tuple[int, int] = (stream.cuda_stream, other.cuda_stream)
        self.now = self.given = 0

    def hand_over(self) -> None:
        """The other's turn begins when this one's copies are done."""
        event, other = self._events[self.now], 1 - self.now
        event.record(self._streams[self.now])
        self._streams[other].wait_event(event)
        self.now, self.given = other, 0

    def close(self) -> None:
        """Back to the first stream, which then waits for all copies; if it cannot, the host does."""
        if not self.now:
            return
        try:
            self.hand_over()
        except BaseException:
            # Whoever waits for the first stream alone would reuse memory under the other's copies.
            self._streams[1].synchronize()
            self.now = self.given = 0
            raise


class InterleavedCopies:
    """Enqueues copies; what is on a stream behind them waits for all of them, as if they were all on it.

    Args:
        new_event: makes an event, which can be recorded again and again.
        driver: takes the copies.
        new_stream: makes a stream that nobody else has.
        quantum_bytes: what is copied in one turn at most.

    Raises:
        ValueError: ``quantum_bytes`` is below 1.
    """

    def __init__(
        self,
        new_event: Callable[[], Event],
        driver: Driver,
        new_stream: Callable[[], Stream],
        quantum_bytes: int = QUANTUM_BYTES,
    ) -> None:
        self._new_event, self._new_stream = new_event, new_stream
        self._driver = driver
        self.quantum_bytes = quantum_bytes
        self._pairs: dict[int, _Pair] = {}
        self._lock = threading.Lock()

    @property
    def quantum_bytes(self) -> int:
        """What is copied in one turn at most, from 1 up (else ValueError); may change between two writes."""
        return self._most

    @quantum_bytes.setter
    def quantum_bytes(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"quantum_bytes must be at least 1, not {most}")
        self._most = most

    def copy(self, batch: CopyBatch, stream: Stream) -> None:
        """Enqueue every copy on ``stream``, or on one that takes turns with it.

        Args:
            batch: addresses as the GPU sees them.
            stream: a ``torch.cuda.Stream``, not the legacy NULL one.

        Raises:
            CopyRefusedError, DriverError: see :meth:`~.driver.Driver.copy`. After the latter too, ``stream``
                waits for what was enqueued.
        """
        driver, few = self._driver, len(batch) <= SHORT
        # For a few, numpy's sum takes longer than all the rest of this method.
        total = sum(batch.nbytes.tolist()) if few else batch.total_bytes
        if not total:
            return
        driver.check(stream.cuda_stream)
        # Another thread's copies, in the middle of this one's, would begin on a stream that waits for nothing
        # of theirs.
        with self._lock:
            pair = self._pairs.get(stream.cuda_stream)
            if pair is None:
                pair = self._pairs[stream.cuda_stream] = _Pair(stream, self._new_stream(), self._new_event)
            if pair.given + total <= self._most:
                pair.given += total
                driver.enqueue(drop_empty(batch), stream.cuda_stream)
                return
            try:
                if few:
                    self._few(batch, pair)
                else:
                    self._many(split_long(drop_empty(batch), self._most), pair)
            finally:
                pair.close()

    def _few(self, batch: CopyBatch, pair: _Pair) -> None:
        """One call of the driver a piece: with numpy, a turn of one piece would cost four times as much."""
        most, copy_one = self._most, self._driver.copy_one
        for dst, src, left in zip(batch.dst.tolist(), batch.src.tolist(), batch.nbytes.tolist(), strict=True):
            while left:
                if pair.given >= most:
                    pair.hand_over()
                nbytes = min(left, most - pair.given)
                copy_one(dst, src, nbytes, pair.handles[pair.now])
                pair.given += nbytes
                dst, src, left = dst + nbytes, src + nbytes, left - nbytes

    def _many(self, batch: CopyBatch, pair: _Pair) -> None:
        """Whole copies, none longer than the quantum."""
        ends: npt.NDArray[np.int64] = np.cumsum(batch.nbytes.view(np.int64))
        most, enqueue, total = self._most, self._driver.enqueue, len(ends)
        start = done = 0
        while True:
            stop = int(ends.searchsorted(done + most - pair.given, side="right"))
            if stop > start:  # not where the turn that goes on has no room for the first one
                enqueue(batch, pair.handles[pair.now], start, stop)
                last = int(ends[stop - 1])
                pair.given += last - done
                start, done = stop, last
            if start == total:
                return
            pair.hand_over()
