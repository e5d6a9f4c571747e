"""``hybrid``: a short gather on the SMs packs scattered rows into staging, the copy engines drain it.

Wins when device rows are scattered or copies would be short (page_first, small pages): the gather runs at
HBM speed, so a forward that must not share the SMs waits for a fraction of the transfer, and the drain is
few large copies whatever the device side looked like.

Three streams: gathers on one, drains on another, and SGLang's transfer stream, which only waits for the last
drain so that what SGLang records there is the transfer's completion. A write is cut into chunks.

Where no forward waits for gathers, the chunks are a pipeline: a gather waits on the GPU for the drain of the
memory it fills; two chunks fill the ring, so that one is gathered while another drains (see
:func:`~.plan.chunks.chunk_lengths`).

Where forwards do wait, that would make them wait for the link. Under a scheduler's overlap loop there is one
gap between forwards for each of them, and it is filled in advance, while the forward before it runs: whether
memory is free *then* cannot be asked. So a gap takes what fits memory that was gathered into in earlier gaps,
whether or not it is drained by now: the forward in between gives the link its time, and a ring that holds a
step's rows (:mod:`~.plan.ring_size`) keeps pace with any forward that is longer than their transfer. What
does not fit is left for the next gap (:class:`~.interface.Pending`), where whoever left it asks for all of
it: then, and when the link is busy all the time, forwards wait for the link, and nothing else is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ..policy.backend_spec import BackendSpec, Option, SmWork
from .copy_engine import MAX_COPIES_PER_BATCH
from .device.base import Device, Event, Staging, Stream
from .interface import Backend, OptionsError, Submission, Transfer
from .plan.chunks import Chunk, ring_units
from .plan.geometry import PoolGeometry
from .plan.ring import ANY_GAP, Ring
from .plan.ring_size import DEFAULT_STAGING_MB, FREE_SHARE, least_staging, staging_size
from .plan.staged_write import PlannedChunk, WritePlan, units_in_gap

DEFAULT_GATHER_CTAS = 64
"""Thread blocks of the gather. An H100 gathers 134 MB in 320, 191, 134, 115 and 114 us with 16, 32, 64, 132
and 264 of them, launch included. Short gathers disturb less than narrow ones: a GEMM on half of the SMs takes
1.18, 1.10, 1.06 and 1.05 times as long beside write-back with 16, 32, 64 and 132.
(bench/results/2026-11-25-h100/profile.json)"""

FENCED_GATHER_CTAS = 192
"""The same where forwards wait for the gather, so that no SM has anything better to do: as many as the
largest GPU has SMs (a full GB202); the device takes no more than the GPU's. For 1.2 GB a forward waits 1.16
ms with 64 blocks, 0.94 with 132, 0.98 with 192, on H100s with 132 SMs whose memory would take 0.82 to read
and write that (bench/results/2026-11-26-h100-sustained, -ctas132 and -ctas192)."""


AUTO = "auto"
"""Of ``staging_mb``, and what it is without it: :func:`~.plan.ring_size.staging_size` where forwards wait,
:data:`DEFAULT_STAGING_MB` elsewhere."""


class _Write:
    """One transfer's chunks that are not enqueued yet."""

    def __init__(self, backend: HybridBackend, transfer: Transfer, plan: WritePlan, stream: Stream) -> None:
        self.transfer = transfer
        self.plan = plan
        self.left_tokens = transfer.tokens
        self.enqueued_chunks = 0
        self.stream = stream
        self._backend = backend
        self._then: list[Callable[[], None]] = []
        self.error: BaseException | None = None

    def enqueued(self) -> bool:
        if self.error is not None:
            raise RuntimeError("a write to host memory failed half-way") from self.error
        return not self.left_tokens

    def went(self, chunk: Chunk) -> None:
        """That chunk is enqueued."""
        self.left_tokens -= chunk.tokens
        self.enqueued_chunks += 1

    def drop(self) -> None:
        """Forget all that is left."""
        self.left_tokens = 0

    def can_advance(self) -> bool:
        return self._backend.can_advance(self)

    def advance(self, ready: tuple[Event, ...], *, wait: bool = False) -> Event | None:
        return None if self.enqueued() else self._backend.advance(self, ready, wait=wait)

    def abandon(self) -> None:
        if self.left_tokens:
            self._backend.abandon(self)
            self.finish()

    def then(self, action: Callable[[], None]) -> None:
        if self.enqueued():
            action()
        else:
            self._then.append(action)

    def finish(self) -> None:
        actions, self._then = self._then, []
        for action in actions:
            action()


# Of bench/results/2026-11-23-h200/gpu.json: 32,768 tokens of Qwen3-8B, 147,456 bytes each.
_LARGEST_WRITE_MB = 32_768 * 147_456 // 2**20


def _staging_in_words(options: Mapping[str, Any], forwards_wait: bool) -> str:
    """The ring's size, as far as it is known before serving."""
    asked = options.get("staging_mb", AUTO)
    if asked != AUTO:
        return f"{int(asked):,} MiB"
    if not forwards_wait:
        return f"{DEFAULT_STAGING_MB} MiB"
    return (
        f"the rows of one step, and a seventh and 64 MiB more, at most 1/{FREE_SHARE} of what is free when "
        "serving starts, which the log says"
    )


class HybridBackend(Backend):
    """Gather into a bounded staging ring, drain by copy engine."""

    spec = BackendSpec(
        "hybrid",
        layouts=frozenset({"layer_first", "page_first", "page_first_direct", "page_head"}),
        options=(
            Option(
                "staging_mb",
                default=AUTO,
                most=288 * 1024,
                because="no GPU has more memory (a B300 has 288 GB)",
                words=(AUTO,),
                ample=_LARGEST_WRITE_MB,
                ample_because="takes more GPU memory from the KV cache than the largest write measured is "
                f"long ({_LARGEST_WRITE_MB:,} MiB); {AUTO}, which is used without it, takes what one step "
                "needs",
            ),
            Option(
                "gather_ctas",
                # NVIDIA's RTX Blackwell whitepaper: more than any other of its GPUs.
                most=192,
                because="no GPU has more SMs (a full GB202 has 192, a B200 148, an H200 132)",
            ),
            MAX_COPIES_PER_BATCH,
        ),
        sm_work=SmWork.GATHER,
        index_steps=True,
        staging=_staging_in_words,
    )
    name = spec.name
    whole_pages = True

    def __init__(self, device: Device, options: Mapping[str, Any]) -> None:
        self._device = device
        asked = options.get("staging_mb", AUTO)
        self._size_was_asked_for = asked != AUTO
        megabytes = DEFAULT_STAGING_MB if asked == AUTO else int(asked)
        self._ring = Ring(megabytes * 2**20, device.query)
        self._pools: list[PoolGeometry] = []
        self._gap = 0
        """Counts forwards that were launched."""
        self._limit: int | None = options.get("max_copies_per_batch")
        asked_ctas = options.get("gather_ctas")
        self._ctas = {
            forwards_wait: int(asked_ctas or (FENCED_GATHER_CTAS if forwards_wait else DEFAULT_GATHER_CTAS))
            for forwards_wait in (False, True)
        }
        self._staging: Staging | None = None
        self._started = False
        self._gather_stream: Stream = None
        self._drain_stream: Stream = None
        self._waiting: deque[_Write] = deque()

    @property
    def staging_bytes(self) -> tuple[int, int]:
        """(in use, in all) of the ring, for metrics."""
        return self._ring.used, self._ring.nbytes

    @property
    def waiting_bytes(self) -> int:
        """Bytes of rows that were submitted and are not enqueued, for metrics."""
        return sum(each.left_tokens * each.transfer.geometry.bytes_per_token for each in self._waiting)

    def supports(self, geometry: PoolGeometry) -> str | None:
        if self.spec.cannot_serve(geometry.layout, geometry.kv_kind):
            return f"hybrid does not know layout {geometry.layout}"
        return None if self._size_was_asked_for else self._too_small(geometry)

    def _too_small(self, geometry: PoolGeometry) -> str | None:
        """Why no write of this pool can go through the ring; None if it can."""
        if ring_units(geometry, self._ring.nbytes) >= 2:
            return None
        units = "pages" if geometry.paged else "tokens"
        return (
            f"two {units} of {geometry.unit_bytes} bytes do not fit the staging ring of "
            f"{self._ring.nbytes} bytes; raise staging_mb"
        )

    def prepare(self, geometry: PoolGeometry) -> None:
        problem = self._too_small(geometry)
        if problem is not None:
            raise OptionsError(f"hybrid can never write pool {geometry.label}: {problem}")
        self._device.prepare_gather(geometry)
        if not self._pools:
            # The gather has a stream of its own: behind the drain of an earlier write it would make
            # a fenced forward wait for the link.
            self._gather_stream = self._device.new_stream()
            self._drain_stream = self._device.new_stream()
        self._pools.append(geometry)
        if self._size_was_asked_for or self._started:
            self._allocate()

    def start(self, *, step_tokens: int, forwards_wait: bool, sharers: int = 1) -> str | None:
        """See :class:`~.interface.Backend`: allocates the ring, of the size that the server's steps want."""
        self._started = True
        if not self._pools:
            return None
        because = "asked for by staging_mb"
        if self._staging is None and not self._size_was_asked_for:
            because = "its default size where no forward waits"
            if forwards_wait:
                size = staging_size(self._pools, step_tokens, self._device.memory_free(), sharers)
                self._ring, because = Ring(size.nbytes, self._device.query), size.because
            because += self._allocate_what_there_is()
        self._allocate()
        return f"hybrid stages {self._ring.nbytes / 2**20:,.0f} MiB in GPU memory: {because}"

    def _allocate_what_there_is(self) -> str:
        """Half of the size, and half of that, while there is no memory for it. Returns a word for the log.

        Raises:
            OptionsError: there is no memory for the smallest ring that works.
        """
        wanted, least = self._ring.nbytes, least_staging(self._pools)
        while True:
            try:
                self._allocate()
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if self._ring.nbytes // 2 < least:
                    raise OptionsError(
                        f"no GPU memory is left for hybrid's staging ({self._ring.nbytes // 2**20} MiB); "
                        "lower --mem-fraction-static"
                    ) from error
                self._ring = Ring(self._ring.nbytes // 2, self._device.query)
            else:
                cut = self._ring.nbytes < wanted
                return f", cut from {wanted / 2**20:,.0f} MiB for want of memory" if cut else ""

    def _allocate(self) -> Staging:
        if self._staging is None:
            self._staging = self._device.allocate_staging(self._ring.nbytes)
        return self._staging

    def launched(self) -> None:
        """See :class:`~.interface.Backend`: what is gathered from now on is in a later gap."""
        self._gap += 1

    def submit(self, transfer: Transfer, stream: Stream) -> Submission:
        geometry = transfer.geometry
        tokens = transfer.tokens
        if tokens != len(transfer.host_slots):
            raise ValueError(f"{len(transfer.host_slots)} host indices for {tokens} device indices")
        self._allocate()  # not before where nobody starts it: the ring may still get another size
        # Where forwards wait chunks are cut as the ring has room, else so that two of them fill it.
        ring_bytes = None if transfer.forwards_wait else self._ring.nbytes
        plan = WritePlan(geometry, transfer.host_slots, ring_bytes)
        for event in transfer.ready:
            self._device.wait(self._gather_stream, event)
        write = _Write(self, transfer, plan, stream)
        gathered: Event | None = None
        copies = 0
        if tokens:
            self._waiting.append(write)
            try:
                gathered = self._enqueue(write, wait=not transfer.forwards_wait)
                copies = plan.copies()  # looks at every host slot, if no drain has
            except BaseException:
                # SGLang sees the error and frees the slots: nothing may be written to them later.
                self.abandon(write)
                raise
        return Submission(
            copies=copies,
            nbytes=tokens * geometry.bytes_per_token,
            sm_done=gathered,
            keep=(transfer.device_slots,),
            pending=None if write.enqueued() else write,
        )

    def can_advance(self, write: _Write) -> bool:
        """Whether ``write`` is the oldest that waits, and there is memory for its next chunk."""
        return bool(self._waiting) and self._waiting[0] is write and self._units(write, self._gap) > 0

    def advance(self, write: _Write, ready: tuple[Event, ...], *, wait: bool) -> Event | None:
        """See :meth:`~.interface.Pending.advance`."""
        if not wait and not self.can_advance(write):
            return None
        for event in ready:
            self._device.wait(self._gather_stream, event)
        return self._enqueue(write, wait=wait)

    def abandon(self, write: _Write) -> None:
        """Forget what of ``write`` is not enqueued, and let its stream wait for what is.

        After an error SGLang waits for that stream before it gives the slots to others. At a reset it waits
        for the write's completion, which follows that stream.
        """
        write.drop()
        if write in self._waiting:
            self._waiting.remove(write)
        for stream in (self._gather_stream, self._drain_stream):
            self._device.wait(write.stream, self._device.record(stream))

    def _enqueue(self, until: _Write, *, wait: bool) -> Event | None:
        """Gathers and drains of ``until`` and of writes before it, oldest first, as far as memory allows.

        Without ``wait`` a gather waits for drains of earlier gaps only. They had a forward's time; if that
        was not enough, the link has more to do than it can, and a forward that waits for it loses no more
        than that.
        """
        before = ANY_GAP if wait else self._gap
        gathered: Event | None = None
        while until in self._waiting:
            write = self._waiting[0]
            try:
                while write.left_tokens:
                    planned = self._next_chunk(write, before)
                    if planned is None:
                        return gathered
                    gathered = self._enqueue_chunk(write, planned, before)
                    write.went(planned.chunk)
                self._device.wait(write.stream, self._device.record(self._drain_stream))
            except BaseException as error:
                # The transfer fails as a whole: SGLang sees the error and acknowledges nothing. Said first:
                # where CUDA has failed, what follows fails too.
                write.error = error
                self.abandon(write)
                raise
            self._waiting.popleft()
            write.finish()
        return gathered

    def _next_chunk(self, write: _Write, before: int) -> PlannedChunk | None:
        """The chunk that comes next; None where forwards wait and there is no memory for one now."""
        if not write.transfer.forwards_wait:
            return write.plan[write.enqueued_chunks]
        units = self._units(write, before)
        return write.plan.cut(units) if units else None

    def _units(self, write: _Write, before: int) -> int:
        """Of the next chunk of a write that forwards wait for; 0: there is no memory for it now."""
        first = not write.enqueued_chunks
        return units_in_gap(write.transfer.geometry, write.plan.left, self._ring, before=before, first=first)

    def _enqueue_chunk(self, write: _Write, planned: PlannedChunk, before: int) -> Event:
        device = self._device
        taken = self._ring.take(planned.room, gap=self._gap, before=before)
        assert taken is not None, "a chunk is cut where there is room for it"
        region, drained = taken
        base = self._allocate().address + region.start
        try:
            for event in drained:
                device.wait(self._gather_stream, event)
            rows, ctas = write.transfer.device_slots, self._ctas[write.transfer.forwards_wait]
            device.gather(planned.staged, base, rows, planned.chunk, self._gather_stream, ctas)
            gathered = device.record(self._gather_stream)
            device.wait(self._drain_stream, gathered)
            # Planned now: the gather runs meanwhile.
            for part in write.plan.drain(planned, base).split(self._limit):
                device.copy(part, self._drain_stream)
        finally:
            # After an error too: whoever gets the region next must wait for what was enqueued.
            region.drained = device.record(self._drain_stream)
        return gathered
