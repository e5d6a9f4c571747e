"""Small reads on a real GPU: what arrives, behind what, and beside a long copy to the host."""

from __future__ import annotations

import pytest
from gpu import MARKS, WHY_NOT

from sglang_hicache.io_backends.device.cuda import CudaDevice

pytestmark = MARKS
if WHY_NOT is None:
    import torch


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


@pytest.mark.parametrize("count", [1, 3, 1025, 16_384])
def test_values_arrive_behind_the_work_that_makes_them(device: CudaDevice, count: int) -> None:
    reads = device.small_reads()
    stream = device.new_stream()
    source = torch.zeros(count, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    for turn in range(1, 20):
        with device.use_stream(stream):
            torch.cuda._sleep(200_000)
            source.fill_(turn)
            read = reads.read(source)
        assert read.device.type == "cpu"
        assert read.tolist() == [turn] * count


def test_a_read_ends_while_a_long_copy_runs(device: CudaDevice) -> None:
    """As no copy to the host does; by the order of events, not by time."""
    reads = device.small_reads()
    long, pinned = (
        torch.empty(2**30, dtype=torch.uint8, device="cuda"),
        torch.empty(2**30, dtype=torch.uint8, pin_memory=True),
    )
    values = torch.arange(5, dtype=torch.int64, device="cuda")
    copies, other = device.new_stream(), device.new_stream()
    torch.cuda.synchronize()
    with device.use_stream(copies):
        for _ in range(4):
            pinned.copy_(long, non_blocking=True)
        done = device.record(copies)
    with device.use_stream(other):
        assert reads.read(values).tolist() == [0, 1, 2, 3, 4]
        assert not device.query(done)
        # Torch's own copy is behind them all.
        assert values.to("cpu").tolist() == [0, 1, 2, 3, 4]
        assert device.query(done)
    torch.cuda.synchronize()
