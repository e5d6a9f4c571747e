"""What one call of SGLang's write-back is made of, and what is counted of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...device.base import Event
from ...interface import Backend, Pending
from ...routes import Route

UPSTREAM = "upstream"
"""Where a count by backend stands for SGLang's own path."""


@dataclass(slots=True)
class Counters:
    """What happened in this process.

    ``by_backend`` counts pools written, by who copied them. Of those written in copy-engine entries,
    ``short_entry_writes`` had entries that were shorter on average than
    :data:`~sglang_hicache.io_backends.copy_engine.BREAK_EVEN_ENTRY_BYTES`. ``ordered_writes`` are those that
    SGLang's kernel was given by ascending host slot. ``plan_reads`` are values that attention was planned
    from, read past a copy to the host (:mod:`~.plan_reads`). ``submit_seconds`` is the scheduler's thread in
    submissions, SGLang's own part of them included; ``gap_seconds`` what their rest takes of it later, in
    gaps between forwards, at polls, and where SGLang waits for one.
    """

    bytes: int = 0
    writes: int = 0
    copies: int = 0
    producer_fences: int = 0
    forward_fences: int = 0
    fallback_writes: int = 0
    short_entry_writes: int = 0
    ordered_writes: int = 0
    plan_reads: int = 0
    submit_seconds: float = 0.0
    gap_seconds: float = 0.0
    by_backend: dict[str, int] = field(default_factory=dict)

    @property
    def served_writes(self) -> int:
        """By backends, not by SGLang's own copy; of a write with several pools each counts."""
        return sum(self.by_backend.values()) - self.fallback_writes

    def served_by(self, name: str) -> None:
        """Count a pool of a write for the backend of that name, or for SGLang's own copy."""
        self.by_backend[name] = self.by_backend.get(name, 0) + 1


@dataclass(slots=True, eq=False)
class Write:
    """One call of ``submit_device_to_host``.

    Attributes:
        engine: SGLang's ``L2TransferEngine``.
        ready: events that its reads of device rows wait for.
        late: a forward was launched since it began, so that the next gap is not its first.
        keep: what must stay alive until it is done.
        pending: what backends left of it for later gaps between forwards.
        given_up: follows all that was enqueued of it if a part of it failed; None: none did.
    """

    engine: Any
    ready: tuple[Event, ...]
    late: bool = False
    keep: list[object] = field(default_factory=list)
    pending: list[tuple[Backend, Pending]] = field(default_factory=list)
    given_up: Event | None = None

    @property
    def failed(self) -> bool:
        """Whether a part of it failed half-way."""
        try:
            for _, part in self.pending:
                part.enqueued()
        except RuntimeError:
            return True
        return False


@dataclass(frozen=True, slots=True)
class PoolWrite:
    """One pool's part of a write.

    Attributes:
        write: which.
        pool: the host pool.
        route: the way it takes; None: SGLang's own path.
        by_host: whether SGLang's kernel gets it by ascending host slot.
        why: why it takes SGLang's own path though a backend serves its pool; None: it does not, or the pool's
            reasons say.
    """

    write: Write
    pool: Any
    route: Route | None
    by_host: bool
    why: str | None = None
