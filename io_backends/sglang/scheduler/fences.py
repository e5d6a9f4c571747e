"""The order between forwards and write-back: every fence of this project is made here.

Forwards write device rows and write-back reads them; both run on streams of their own. What holds:

1. **Producer fence.** Work that reads device rows is enqueued behind events that were recorded *for that
   call* on every stream that forwards, or what makes indices, may run on (:meth:`Fences.ready`). Whoever
   enqueues takes them as an argument; nobody keeps them: an event from before the present forward was
   launched would let SM work run beside it.
2. **Forward fence.** Each piece of write-back that runs on the SMs leaves an event (:meth:`Fences.sm_work`).
   A forward that its decision lists is launched behind all of them (:meth:`Fences.before_forward`), on every
   stream that it may be launched on.
3. Both are waits of streams for events. The host waits for neither.

With 1, SM work that is enqueued while a listed forward runs begins behind it; with 2, it ends before the next
one begins. So the two never share the SMs, whoever asked for the work, and whenever.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ...device.base import Device, Event, Stream

if TYPE_CHECKING:
    from ..metrics import Metrics


class LaunchesForwards(Protocol):
    """What is asked of SGLang's ``Scheduler``. Both are known only once it is built."""

    enable_overlap: bool
    forward_stream: Stream


@dataclass(slots=True)
class _SmWork:
    """The last SM work of one source.

    Attributes:
        done: recorded after it.
        engine: whose stream it ran on. Held, because another one could get its id.
        waited: streams that forwards are launched on, and that wait for it already.
    """

    done: Event
    engine: Any
    waited: list[Stream] = field(default_factory=list)


class Fences:
    """The fences of one scheduler.

    Args:
        device: the seam.
        scheduler: who launches forwards.
        producer: False leaves the producer fence out (``--hicache-io-unsafe-fences none``): write-back then
            waits for the stream that is current only, as SGLang before 0.5.23 does.
    """

    def __init__(self, device: Device, scheduler: LaunchesForwards, *, producer: bool = True) -> None:
        self._device = device
        self._scheduler = scheduler
        self.producer = producer
        # Where forwards were launched so far, if not on the forward stream: without overlap, the scheduler's.
        self._launched_on: list[Stream] = []
        # By source, forwards that wait, and engine (None: the source's own streams): they may be on streams
        # of their own, so that none of them covers another.
        self._sm_work: dict[tuple[object, frozenset[str], int | None], _SmWork] = {}

    def ready(self) -> tuple[Event, ...]:
        """Events that a read of device rows which is enqueued now must wait for.

        The last one follows the work on the current stream, which made the indices. It waits for a forward
        that runs elsewhere only where that stream does: SGLang's scheduler stream, for the prefill in flight
        (``_apply_war_barrier``; of decodes in a CUDA graph for what they read of the scheduler's).
        """
        device = self._device
        current = device.current_stream()
        streams: list[Stream] = []
        if self.producer:
            for stream in (self._scheduler.forward_stream, *self._launched_on):
                if stream != current and stream not in streams:
                    streams.append(stream)
        return tuple(device.record(stream) for stream in (*streams, current))

    def sm_work(
        self, source: object, forwards: frozenset[str], done: Event | None, engine: Any = None
    ) -> None:
        """Write-back enqueued work on the SMs.

        Args:
            source: who did; its work of one engine runs in order, so that a later event covers earlier ones.
            forwards: those that wait for it.
            done: recorded after it; None if there was none after all.
            engine: whose transfer stream it ran on; None: streams of the source's own.
        """
        if done is not None and forwards:
            self._sm_work[source, forwards, None if engine is None else id(engine)] = _SmWork(done, engine)

    def before_forward(self, forwards: frozenset[str], metrics: Metrics | None = None) -> int:
        """A batch is about to be launched: let it wait for SM work that one of ``forwards`` must wait for.

        Args:
            forwards: what the batch launches (:func:`forwards_of`).
            metrics: told of the wait.

        Returns:
            How many events it waits for that nothing before it on the same stream has waited for.
        """
        streams = self._launch_streams()
        new = [
            (work, stream)
            for key, work in self._sm_work.items()
            if key[1] & forwards
            for stream in streams
            if stream not in work.waited
        ]
        if not new:
            return 0
        with nullcontext() if metrics is None else metrics.fence(self._device, streams[-1]):
            for work, stream in new:
                self._device.wait(stream, work.done)
                work.waited.append(stream)
        return len({id(work) for work, _ in new})

    def _launch_streams(self) -> tuple[Stream, ...]:
        """Streams that the next batch may be launched on."""
        forward = self._scheduler.forward_stream
        if self._scheduler.enable_overlap:
            return (forward,)
        # Without overlap SGLang launches on the stream that is current (0.5.18 to 0.5.23), which with
        # pipeline parallelism is the forward stream.
        current = self._device.current_stream()
        if current == forward:
            return (forward,)
        if current not in self._launched_on:
            self._launched_on.append(current)
        return (current, forward)


def forwards_of(mode: Any, *, speculative: bool) -> frozenset[str]:
    """Which of the policy's forwards, ``extend`` and ``decode``, a batch of this ``ForwardMode`` launches.

    As in SGLang's ``HybridAttnBackend``: decode and idle batches use the decode backend, everything else
    the prefill backend. A speculative step launches drafts, verification and draft extension, so both.
    """
    if mode.is_prebuilt():
        return frozenset()
    if speculative:
        return frozenset({"extend", "decode"})
    return frozenset({"decode"} if mode.is_decode_or_idle() else {"extend"})
