"""Every fence of ``hybrid`` on a real GPU: with it the bytes are right, without it they are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gpu import LONG, MARKS, WHY_NOT, gpu_pool, prepared, transfer_of

from sglang_hicache.io_backends import CopyBatch
from sglang_hicache.io_backends.device.cuda import CudaDevice

pytestmark = MARKS
if WHY_NOT is None:
    import torch

STALE = 0xEE

FENCES = {
    # The waits that are left out (who, on whose event), and the stream that is slow.
    "the gather after its producer": (("gather", "forward"), None),
    "the drain after its gather": (("drain", "gather"), "gather"),
    "the gather after the ring's drain": (("gather", "drain"), "drain"),
    "the transfer's end after the last drain": (("transfer", "drain"), "drain"),
    "the next forward after the gather": (("forward", "gather"), "gather"),
}


class LeakyDevice(CudaDevice):
    """Leaves out the waits of one kind and slows one stream down.

    Args:
        drop: (who would wait, on whose event) of the waits to leave out.
        slow: the stream that sleeps before each piece of work, "gather" or "drain".
    """

    def __init__(self, drop: tuple[str, str] | None, slow: str | None) -> None:
        super().__init__(quantum_bytes=100_000)
        self._drop, self._slow = drop, slow
        self._unnamed = ["gather", "drain"]  # the order in which hybrid makes its streams
        self.names: dict[int, str] = {}
        self.dropped = 0

    def new_stream(self) -> Any:
        stream = super().new_stream()
        if self._unnamed:
            self.names[stream.cuda_stream] = self._unnamed.pop(0)
        return stream

    def allocate_staging(self, nbytes: int) -> Any:
        staging = super().allocate_staging(nbytes)
        # What is left there from another test could be the right bytes.
        staging._memory.fill_(STALE)
        torch.cuda.synchronize()
        return staging

    def record(self, stream: Any) -> Any:
        event = super().record(stream)
        event.origin = self.names.get(stream.cuda_stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        if self._drop is not None and (self.names.get(stream.cuda_stream), event.origin) == self._drop:
            self.dropped += 1
        else:
            super().wait(stream, event)

    def gather(self, staged: Any, base: int, slots: Any, chunk: Any, stream: Any, ctas: int) -> None:
        self._sleep("gather", stream)
        super().gather(staged, base, slots, chunk, stream, ctas)

    def copy(self, batch: CopyBatch, stream: Any) -> None:
        self._sleep("drain", stream)
        super().copy(batch, stream)

    def _sleep(self, name: str, stream: Any) -> None:
        if self._slow == name:
            with self.use_stream(stream):
                torch.cuda._sleep(LONG)


@pytest.mark.parametrize("by_gaps", [False, True], ids=["at once", "gap by gap"])
@pytest.mark.parametrize("fence", FENCES)
def test_is_needed_and_there(fence: str, by_gaps: bool) -> None:
    drop, slow = FENCES[fence]
    wrong, dropped = wrong_bytes(drop, slow, by_gaps)
    assert dropped, "this wait was never asked for"
    assert wrong, "left out, the wait was not missed: the test proves nothing"
    assert wrong_bytes(None, slow, by_gaps) == (0, 0)


def test_the_copy_engine_reads_in_stream_order() -> None:
    """A batch behind a wait reads after it: source order STREAM; without the wait it reads too early."""
    device = CudaDevice()
    for fenced in (False, True):
        pool = gpu_pool("layer_first", layers=2, page_size=16, row_bytes=(1024,), pages=64, device_slots=1024)
        backend = prepared(device, "copy_engine", pool)
        host, slots = np.arange(1024), np.random.default_rng(0).permutation(1024)
        transfer = transfer_of(pool, host, slots)
        expected = pool.expected(host, slots)
        after = [rows.clone() for rows in pool.rows[0]]
        for rows in pool.rows[0]:
            rows.zero_()
        torch.cuda.synchronize()
        forward, stream = device.new_stream(), device.new_stream()
        indices_ready = device.record(device.current_stream())
        with device.use_stream(forward):
            torch.cuda._sleep(LONG)
            for rows, new in zip(pool.rows[0], after, strict=True):
                rows.copy_(new)
        if fenced:
            device.wait(stream, device.record(forward))
        with device.use_stream(stream):
            backend.submit(replace(transfer, indices_ready=indices_ready), stream)
        assert not forward.query(), "submit waited on the host for the forward"
        stream.synchronize()
        assert fenced == np.array_equal(pool.host[0], expected[0])
        torch.cuda.synchronize()


def wrong_bytes(drop: tuple[str, str] | None, slow: str | None, by_gaps: bool) -> tuple[int, int]:
    """(bytes that are not the forward's rows, waits left out) after one write between two forwards.

    Args:
        drop, slow: of the device.
        by_gaps: as where forwards wait: what fits the ring, then behind the drains of each gap before.
    """
    device = LeakyDevice(drop, slow)
    # 2 MiB through a ring of 1 MiB.
    pool = gpu_pool("page_first", layers=2, page_size=16, row_bytes=(1024,), pages=64, device_slots=1024)
    backend = prepared(device, "hybrid", pool, staging_mb=1)
    host, slots = np.arange(1024), np.random.default_rng(0).permutation(1024)
    transfer = transfer_of(pool, host, slots)
    expected = pool.expected(host, slots)
    before = [torch.zeros_like(rows) for rows in pool.rows[0]]
    after = [rows.clone() for rows in pool.rows[0]]
    for rows, old in zip(pool.rows[0], before, strict=True):
        rows.copy_(old)
    torch.cuda.synchronize()

    forward, stream = device.new_stream(), device.new_stream()
    device.names[forward.cuda_stream] = "forward"
    device.names[stream.cuda_stream] = "transfer"
    with device.use_stream(forward):
        if slow is None:
            torch.cuda._sleep(LONG)
        for rows, new in zip(pool.rows[0], after, strict=True):
            rows.copy_(new)
    ready = device.record(forward)
    torch.cuda.Stream.wait_event(stream, ready)
    with device.use_stream(stream):
        transfer = replace(transfer, ready=(ready,), indices_ready=ready, forwards_wait=by_gaps)
        done = backend.submit(transfer, stream)
    gathered = done.sm_done
    if drop is None:  # without a wait the first drains may be done already, and all fits
        assert (done.pending is not None) == by_gaps
    while done.pending is not None and not done.pending.enqueued():
        backend.launched()  # type: ignore[attr-defined]
        gathered = done.pending.advance((device.record(forward),))
        assert gathered is not None, "a gap takes memory that is not drained yet"
    finish = torch.cuda.Event()
    finish.record(stream)
    # The next forward overwrites the rows.
    device.wait(forward, gathered)
    with device.use_stream(forward):
        for rows, old in zip(pool.rows[0], before, strict=True):
            rows.copy_(old)
    finish.synchronize()
    wrong = int((pool.host[0] != expected[0]).sum())
    torch.cuda.synchronize()
    return wrong, device.dropped
