"""What streams are given to do, and what they make of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .ranges import NOTHING, ByteRanges

if TYPE_CHECKING:
    from .races import SmUse, VectorClock

Engine = Literal["sm", "copy_d2h", "copy_h2d", "none"]
"""What does the work: the SMs, the copy engine of one direction, or nothing that takes time."""


@dataclass(frozen=True, slots=True)
class Operation:
    """Work for a stream.

    Attributes:
        name: for reports, such as "forward extend 7".
        work: its effects on memory, in pieces. A stream does them in order; between two of them any other
            stream may go on, as an SM kernel and a copy do on a GPU.
        reads, writes: bytes that it touches, for the race checker. They are taken when it is launched.
        engine: what does the work.
        d2h_on_sms: it is the write-back's work on the SMs.
        exclusive_sms: a forward that must not share the SMs with such work.
        uses: objects (torch tensors, numpy arrays) that it touches and that somebody else owns, such as index
            tensors and staging. The last owner must not let go before it is done. A stream does not own
            them, so ``work`` must not hold them either: see :meth:`~.memory.Memory.borrow`.
        copies: in a batch (cost model).
        nbytes: bytes that it moves (cost model).
        crosses_link: SM work that reads or writes host memory (cost model).
        ms: how long it takes, in milliseconds, if not what the cost model says of the above.
    """

    name: str
    work: Sequence[Callable[[], object]] = ()
    reads: ByteRanges = NOTHING
    writes: ByteRanges = NOTHING
    engine: Engine = "sm"
    d2h_on_sms: bool = False
    exclusive_sms: bool = False
    uses: Sequence[object] = ()
    copies: int = 1
    nbytes: int = 0
    crosses_link: bool = False
    ms: float | None = None

    @property
    def sm_work(self) -> SmUse | None:
        """The class of SM work that the race checker knows."""
        if self.d2h_on_sms:
            return "d2h"
        return "exclusive" if self.exclusive_sms else None


class Queued:
    """A place in a stream's queue: an operation, a wait, or a recording of an event.

    Attributes:
        stream: the virtual stream, or a stream of another kind, on which everything is done at once.
        name: the operation's name; for a recording, that of the last operation before it.
        kind: what it is.
        issued: where it was asked for.
        after: what must be done before it can begin.
        pieces: what is left of its work.
        time: when it is done, in milliseconds of the device's clock; None: it has not run. By a cost model
            that may be later than the host's clock.
        clock: of a recording, for the race checker.
        operation: what the cost model wants to know (without its work and what it uses).
        asked: when the host had enqueued it, in milliseconds.
    """

    __slots__ = ("after", "asked", "clock", "issued", "kind", "name", "operation", "pieces", "stream", "time")

    def __init__(
        self,
        stream: Any,
        name: str,
        kind: Literal["operation", "wait", "record"],
        issued: str,
        *,
        after: tuple[Queued, ...] = (),
        work: Sequence[Callable[[], object]] = (),
        clock: VectorClock = (),
        operation: Operation | None = None,
    ) -> None:
        self.stream = stream
        self.name = name
        self.kind = kind
        self.issued = issued
        self.after = after
        self.pieces = deque(work)
        self.clock = clock
        self.operation = operation
        self.time: float | None = None
        self.asked = 0.0

    def done_by(self, clock: float) -> bool:
        """Whether it was done at that time of the virtual clock, in its units."""
        return self.time is not None and self.time <= clock

    @property
    def able(self) -> bool:
        """Whether everything it waits for is done."""
        return all(other.time is not None for other in self.after)
