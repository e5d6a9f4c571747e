"""The interface between SGLang's write-back and whatever moves the bytes.

The invariant: **a backend only enqueues; it never synchronizes.** It is called on the scheduler's thread
while a forward may be running; a wait there stalls every request.

A backend is made once per process by its factory, ``factory(device, options)``, asked once per pool whether
it supports the pool's geometry, prepared once per supported pool, and then given one
:class:`Transfer` per pool and write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from .device.base import Device, Event, Stream
from .plan.copies import Slots
from .plan.geometry import PoolGeometry


@dataclass(frozen=True, slots=True)
class Transfer:
    """One pool's rows in one write to host memory.

    Attributes:
        geometry: the pool, as given to ``prepare``.
        host_slots: int64 [n] on the host; where each token goes. Empty for a backend with
            ``upstream_indices``, whose indices are where SGLang's own copy wants them.
        device_slots: int64 tensor [n] on the pool's device; where each token is. Of a pool with an
            ``index_step``, which only backends get whose spec says ``index_steps``, so many times n indices,
            which :meth:`~.plan.geometry.PoolGeometry.slots_of` turns into slots.
        ready: events that the first read of device rows must wait for (the producer fence). The stream
            given to ``submit`` has waited for them already; a backend that reads on a stream of its own
            waits for them there, and not for the given stream, which may still be waiting for an earlier
            transfer.
        indices_ready: the event among them that follows the work which made ``device_slots``; it waits for no
            forward, so whoever must wait on the host for the indices waits for this one only.
        forwards_wait: whether forwards may wait for this transfer's SM work. Then, unless it is told to
            (:meth:`Pending.advance`), that work must not wait for copies to the host that began in the same
            gap between forwards.
        upstream_copy: SGLang's own copy of the same rows, enqueued on the current stream; ``block_quota=``
            limits the thread blocks of its JIT kernels.
    """

    geometry: PoolGeometry
    host_slots: Slots
    device_slots: Any
    ready: tuple[Event, ...]
    indices_ready: Event | None
    forwards_wait: bool
    upstream_copy: Callable[..., None]

    @property
    def tokens(self) -> int:
        """Rows to copy, in each layer and component."""
        # len() of a tensor goes through Python.
        return int(self.device_slots.shape[0]) // self.geometry.index_step


class Pending(Protocol):
    """The part of a transfer that is left for later gaps between forwards.

    Parts of one backend go on in the order in which they were submitted.
    """

    def enqueued(self) -> bool:
        """Whether everything is enqueued by now, or forgotten (:meth:`abandon`).

        Raises:
            RuntimeError: enqueueing failed half-way, and the transfer will never be whole.
        """
        ...

    def can_advance(self) -> bool:
        """Whether :meth:`advance` would enqueue something now without a wait. Asked at every poll."""
        ...

    def advance(self, ready: tuple[Event, ...], *, wait: bool = False) -> Event | None:
        """Enqueue what can be enqueued now.

        Args:
            ready: as :attr:`Transfer.ready`, recorded for this call: forwards were launched since the
                transfer was submitted, and SM work must not run beside them.
            wait: enqueue all of it (and what is before it), and let it wait on the GPU for what it needs:
                somebody waits for this transfer.

        Returns:
            The event after the last SM-side work enqueued by this call, if any.

        Raises:
            RuntimeError: as ``enqueued``.

        After any error the stream given to ``submit`` waits for what was enqueued.
        """
        ...

    def abandon(self) -> None:
        """Forget the rest: its host slots are about to be given to others. It counts as enqueued then.

        The stream given to ``submit`` waits for what was enqueued.
        """
        ...

    def then(self, action: Callable[[], None]) -> None:
        """Call ``action`` as soon as everything is enqueued (at once if it is)."""
        ...


@dataclass(frozen=True, slots=True)
class Submission:
    """What a backend enqueued.

    Attributes:
        copies: for the copy engine; a kernel counts as one.
        nbytes: bytes that arrive on the host.
        sm_done: event recorded after the last work that runs on the GPU's SMs, or None when there is none.
            Forwards that the decision lists wait for it, and for nothing later.
        keep: whatever must stay alive until the transfer is done.
        pending: what is left to enqueue later, or None.
    """

    copies: int
    nbytes: int
    sm_done: Event | None = None
    keep: tuple[object, ...] = field(default=(), repr=False)
    pending: Pending | None = None


class OptionsError(ValueError):
    """Options of a backend that can never work; the message says which, and what would."""


@runtime_checkable
class Backend(Protocol):
    """Moves rows of a pool from the device to the host.

    ``name``, ``supports``, ``prepare`` and ``submit`` are what every backend has. The rest has defaults,
    which a class that derives from this one inherits and any other gets from :func:`complete`.
    """

    name: str

    upstream_indices: bool = False
    """Indices are moved as SGLang's own copy wants them (host indices on the GPU, or device indices on the
    host), and this backend calls :attr:`Transfer.upstream_copy`."""

    whole_pages: bool = False
    """A write to a paged layout that is not whole pages, each in order, is left to SGLang's own copy
    (:func:`~.plan.staged_write.is_whole`)."""

    @property
    def staging_bytes(self) -> tuple[int, int]:
        """(in use, in all) of the GPU memory that it stages rows in, for metrics."""
        return 0, 0

    @property
    def waiting_bytes(self) -> int:
        """Bytes of rows that were submitted and are left for later, for metrics."""
        return 0

    def supports(self, geometry: PoolGeometry) -> str | None:
        """None if this backend can serve the pool, else why not, as a sentence for the operator."""
        ...

    def prepare(self, geometry: PoolGeometry) -> None:
        """Allocate what transfers of this pool need (tables). Called once, before serving.

        Raises:
            OptionsError: with the options it was made with it can never serve this pool. The server does not
                start.
        """
        ...

    def start(self, *, step_tokens: int, forwards_wait: bool, sharers: int = 1) -> str | None:
        """Called once, when the pools that are known before serving are prepared and SGLang has allocated
        its own memory.

        Args:
            step_tokens: that a forward makes rows of at most.
            forwards_wait: whether any forward waits for this backend's SM work.
            sharers: backends that stage rows (:attr:`staging_bytes`), and share what memory is free.

        Returns:
            A line for the log, or None.
        """
        return None

    def submit(self, transfer: Transfer, stream: Stream) -> Submission:
        """Enqueue the transfer; everything it does is complete when work recorded on ``stream`` after this
        call is. ``stream`` is current, and has waited for ``transfer.ready``.

        Raises:
            ValueError: the transfer does not fit the geometry (an index out of range). Nothing was or will
                be written to host memory.

        After any error nothing is enqueued later, and what was enqueued is done when work recorded on
        ``stream`` after this call is.
        """
        ...

    def launched(self) -> None:
        """Called whenever a forward is about to be launched, behind all that was enqueued so far."""
        return None


class _Completed(Backend):
    """A backend whose class leaves out parts of the interface that have defaults."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.name = backend.name
        self.upstream_indices = bool(getattr(backend, "upstream_indices", False))
        self.whole_pages = bool(getattr(backend, "whole_pages", False))

    @property
    def staging_bytes(self) -> tuple[int, int]:
        return getattr(self._backend, "staging_bytes", super().staging_bytes)

    @property
    def waiting_bytes(self) -> int:
        return getattr(self._backend, "waiting_bytes", super().waiting_bytes)

    def supports(self, geometry: PoolGeometry) -> str | None:
        reason: str | None = self._backend.supports(geometry)
        return reason

    def prepare(self, geometry: PoolGeometry) -> None:
        self._backend.prepare(geometry)

    def start(self, *, step_tokens: int, forwards_wait: bool, sharers: int = 1) -> str | None:
        start = getattr(self._backend, "start", super().start)
        line: str | None = start(step_tokens=step_tokens, forwards_wait=forwards_wait, sharers=sharers)
        return line

    def submit(self, transfer: Transfer, stream: Stream) -> Submission:
        submission: Submission = self._backend.submit(transfer, stream)
        return submission

    def launched(self) -> None:
        getattr(self._backend, "launched", super().launched)()


def complete(backend: object) -> Backend:
    """``backend``, with the defaults of the interface where its class leaves them out."""
    return backend if isinstance(backend, Backend) else _Completed(backend)


BackendFactory = Callable[[Device, Mapping[str, Any]], Backend]
"""``factory(device, options)``; options come from the policy's ``use.options``."""
