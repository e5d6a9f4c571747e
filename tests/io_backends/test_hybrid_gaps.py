"""Random programs of a ``hybrid`` backend that forwards wait for, on streams that run in any order: several
pools share one small ring, and bytes of staging that are gathered over too early arrive on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import MemoryPool, indices_of
from strategies import stepped_pools, whole_writes

from sglang_hicache.io_backends import Transfer
from sglang_hicache.io_backends.device.cpu import CpuDevice
from sglang_hicache.io_backends.hybrid import HybridBackend
from sglang_hicache.io_backends.plan import chunks
from sglang_hicache.io_backends.plan.ring import Ring
from sglang_hicache.io_backends.plan.staged_write import is_whole

GATHER, DRAIN, TRANSFER = "stream 1", "stream 2", "transfer"


@dataclass(eq=False)
class Marker:
    stream: str
    gap: int
    done: bool = False


class FailedCopyError(Exception):
    """Of a :class:`LateDevice`."""


@dataclass(eq=False)
class LateDevice(CpuDevice):
    """Enqueued work runs when :meth:`run` says so, each stream in order, streams in any order."""

    gap: int = 0
    calls: int = 0
    fails: bool = False
    """The next copy raises."""
    queues: dict[str, deque[Callable[[], bool]]] = field(default_factory=dict)
    waited: list[Marker] = field(default_factory=list)
    """By the gather stream."""

    def __post_init__(self) -> None:
        super().__init__()

    def new_stream(self) -> str:  # type: ignore[override]
        name = f"stream {len(self.queues) + 1}"
        self.queues[name] = deque()
        return name

    def _put(self, stream: Any, action: Callable[[], bool]) -> None:
        self.calls += 1
        self.queues.setdefault(stream, deque()).append(action)

    def record(self, stream: Any) -> Marker:  # type: ignore[override]
        marker = Marker(stream, self.gap)

        def reach() -> bool:
            marker.done = True
            return True

        self._put(stream, reach)
        return marker

    def wait(self, stream: Any, event: Any) -> None:
        if stream == GATHER:
            self.waited.append(event)
        self._put(stream, lambda: event.done)

    def query(self, event: Any) -> bool:
        return bool(event.done)

    def gather(self, staged: Any, base: int, slots: Any, chunk: Any, stream: Any, ctas: int) -> None:
        def run() -> bool:
            CpuDevice.gather(self, staged, base, slots, chunk, stream, ctas)
            return True

        self._put(stream, run)

    def copy(self, batch: Any, stream: Any) -> None:
        if self.fails:
            self.fails = False
            raise FailedCopyError

        def run() -> bool:
            CpuDevice.copy(self, batch, stream)
            return True

        self._put(stream, run)

    def run(self, stream: str, most: int = 1 << 30) -> int:
        """Run the next ones of one stream, until it waits for another. Returns how many ran."""
        queue, ran = self.queues.get(stream, deque()), 0
        while queue and ran < most and queue[0]():
            queue.popleft()
            ran += 1
        return ran

    def run_all(self) -> None:
        """A stream that may run ahead of the others does: the gathers' first."""
        while sum(self.run(stream) for stream in list(self.queues)):
            pass
        assert not any(self.queues.values()), "streams wait for each other"


@dataclass(eq=False)
class Asked:
    pool: MemoryPool
    host: np.ndarray
    rows: np.ndarray
    pending: Any


def has_failed(write: Asked) -> bool:
    try:
        _ = write.pending is None or write.pending.enqueued()
    except RuntimeError:
        return True
    return False


def left_of(asked: list[Asked]) -> list[Asked]:
    return [
        each
        for each in asked
        if each.pending is not None and not has_failed(each) and not each.pending.enqueued()
    ]


def with_rows(arrays: list[np.ndarray], writes: list[Asked]) -> list[np.ndarray]:
    """Host arrays as they are once these writes of one pool are done."""
    for each in writes:
        arrays = replace(each.pool, host=arrays).expected(each.host, each.rows)
    return arrays


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_program_copies_every_byte_once_and_waits_for_no_drain_of_its_own_gap(
    data: st.DataObject,
) -> None:
    pools = data.draw(st.lists(stepped_pools(), min_size=1, max_size=3))
    lead = data.draw(st.sampled_from([1, 2_000, 64 * 2**20]))
    least = max(
        2 * pool.geometry.unit_bytes + 2 * chunks.STAGING_ALIGNMENT * len(pool.geometry.components)
        for pool in pools
    )
    nbytes = data.draw(st.sampled_from([least, least + 1, 2 * least, 5 * least]))
    chunks.ring_and_lead.cache_clear()
    with mock.patch.object(chunks, "LEAD_BYTES", lead):
        run_program(data, pools, nbytes)
    chunks.ring_and_lead.cache_clear()


def run_program(data: st.DataObject, pools: list[MemoryPool], ring_bytes: int) -> None:
    device = LateDevice()
    backend = HybridBackend(device, {"staging_mb": 1})  # type: ignore[arg-type]
    backend._ring = Ring(ring_bytes, device.query)
    for pool in pools:
        backend.prepare(pool.geometry)
    clean = {id(pool): [array.copy() for array in pool.host] for pool in pools}
    asked: list[Asked] = []
    taken: set[tuple[int, int]] = set()  # a host slot is one write's

    def without_wait(act: Callable[[], Any]) -> None:
        waits = len(device.waited)
        act()
        for event in device.waited[waits:]:
            assert event.stream != DRAIN or event.gap < device.gap, "a forward waits for its own gap's drain"

    def forget(gone: Asked) -> None:
        """What came of a write is right, and nothing comes later."""
        device.run_all()
        before = clean[id(gone.pool)]
        for at, whole, got in zip(before, with_rows(before, [gone]), gone.pool.host, strict=True):
            mine = at != whole
            assert ((got == at) | (got == whole))[mine].all()
            at[mine] = got[mine]
        if gone in asked:
            asked.remove(gone)

    for _ in range(data.draw(st.integers(8, 40))):
        match data.draw(
            st.sampled_from(
                [
                    "submit",
                    "submit",
                    "submit",
                    "poll",
                    "poll",
                    "launch",
                    "launch",
                    "run",
                    "run",
                    "late",
                    "abandon",
                    "break",
                ]
            )
        ):
            case "submit":
                pool = data.draw(st.sampled_from(pools))
                host, rows = data.draw(whole_writes(pool))
                if not is_whole(pool.geometry, indices_of(pool.geometry, host)):
                    continue
                if taken & {(id(pool), slot) for slot in host.tolist()}:
                    continue
                taken |= {(id(pool), slot) for slot in host.tolist()}
                given_host = host.copy()
                transfer = Transfer(
                    geometry=pool.geometry,
                    host_slots=given_host,
                    device_slots=indices_of(pool.geometry, rows),
                    ready=(),
                    indices_ready=None,
                    forwards_wait=True,
                    upstream_copy=lambda: None,
                )

                def submit(
                    pool: MemoryPool = pool, host: Any = host, rows: Any = rows, transfer: Any = transfer
                ) -> None:
                    done = backend.submit(transfer, TRANSFER)
                    asked.append(Asked(pool, host, rows, done.pending))

                failing = device.fails
                try:
                    without_wait(submit)
                except FailedCopyError:
                    assert failing
                    forget(Asked(pool, host, rows, None))
                given_host[:] = 0
            case "poll":
                for each in left_of(asked):
                    state = (device.calls, backend.waiting_bytes, backend.staging_bytes)
                    answers = [each.pending.can_advance() for _ in range(2)]
                    assert answers[0] == answers[1]
                    assert (device.calls, backend.waiting_bytes, backend.staging_bytes) == state
                    left = backend.waiting_bytes
                    with suppress(FailedCopyError):
                        without_wait(partial(each.pending.advance, ()))
                    assert (backend.waiting_bytes < left) == answers[0]
            case "launch":
                backend.launched()
                device.gap += 1
                if left := left_of(asked):
                    assert left[0].pending.can_advance(), "a forward's time frees memory of every gap before"
            case "run":
                stream = data.draw(st.sampled_from([GATHER, GATHER, DRAIN, TRANSFER]))
                device.run(stream, data.draw(st.sampled_from([1, 4, 1000])))
            case "late":
                if left := left_of(asked):
                    upto = data.draw(st.sampled_from(left))
                    with suppress(FailedCopyError):
                        upto.pending.advance((), wait=True)
                        assert upto.pending.enqueued()
            case "abandon":
                if left := left_of(asked):
                    gone = data.draw(st.sampled_from(left))
                    gone.pending.abandon()
                    assert gone.pending.enqueued()
                    assert not gone.pending.can_advance()
                    forget(gone)
            case "break":
                device.fails = True
        for each in [each for each in asked if has_failed(each)]:
            assert not each.pending.can_advance()
            forget(each)
        total = sum(each.pending.left_tokens * each.pool.geometry.bytes_per_token for each in left_of(asked))
        assert backend.waiting_bytes == total
    device.fails = False
    for _ in range(2000):
        if not (left := left_of(asked)):
            break
        backend.launched()
        device.gap += 1
        assert left[0].pending.can_advance()
        without_wait(partial(left[0].pending.advance, ()))
    assert not left_of(asked), "a write never ends"
    assert backend.waiting_bytes == 0
    device.run_all()
    assert backend.staging_bytes[0] == 0
    for pool in pools:
        want = with_rows(clean[id(pool)], [each for each in asked if each.pool is pool])
        for got, whole in zip(pool.host, want, strict=True):
            np.testing.assert_array_equal(got, whole)
