"""The gather's kernel in Triton's interpreter, on ordinary memory, against the naive reference.

Run by test_gather.py in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import POISON, MemoryPool, indices_of, make_pool, on_the_host
from strategies import LAYOUTS, stepped_pools, whole_writes

from sglang_hicache.io_backends import Transfer, get_backend
from sglang_hicache.io_backends.device.cpu import CpuDevice
from sglang_hicache.io_backends.device.gather import Gather
from sglang_hicache.io_backends.device.gather_plan import plan
from sglang_hicache.io_backends.plan.chunks import STAGING_ALIGNMENT, Chunk, staged
from sglang_hicache.io_backends.plan.staged_write import WritePlan

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_gather.py"

# Small blocks, so that small pools take several tiles, and the one that is used on the GPU.
SHAPES = [(1, 1), (1, 4), (8, 8)]


class InterpretedDevice(CpuDevice):
    """The CPU engine, except that its gather is the GPU's."""

    def __init__(self, warps: int = 8, units_per_thread: int = 8) -> None:
        super().__init__()
        self.kernel = Gather(warps=warps, units_per_thread=units_per_thread)

    def gather(self, staged: Any, base: int, slots: Any, chunk: Any, stream: Any, ctas: int) -> None:
        self.kernel.launch(staged, base, torch.as_tensor(slots), chunk, ctas)


def through_staging(
    pool: MemoryPool,
    host: np.ndarray,
    slots: np.ndarray,
    device: InterpretedDevice,
    *,
    ctas: int,
    capacity: int,
    offset: int = 0,
) -> None:
    """Copy through a poisoned staging buffer with guards; ``offset`` bytes off a 256-byte boundary."""
    guard = 2 * STAGING_ALIGNMENT
    buffer = np.full(capacity + 2 * guard, POISON, dtype=np.uint8)
    base = -(-int(buffer.ctypes.data + 1) // STAGING_ALIGNMENT) * STAGING_ALIGNMENT + offset
    stream = device.current_stream()
    slots = indices_of(pool.geometry, slots)
    plan = WritePlan(pool.geometry, host, capacity)
    for planned in plan:
        device.gather(planned.staged, base, slots, planned.chunk, stream, ctas)
        device.copy(plan.drain(planned, base), stream)
    start = base - int(buffer.ctypes.data)
    assert np.all(buffer[:start] == POISON), "wrote before the staging buffer"
    assert np.all(buffer[start + capacity :] == POISON), "wrote behind the staging buffer"


def assert_host(pool: MemoryPool, expected: list[np.ndarray]) -> None:
    for part, got, want in zip(pool.geometry.components, pool.host, expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=part.name)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_moves_exactly_these_rows(data: st.DataObject) -> None:
    pool = data.draw(stepped_pools())
    host, slots = data.draw(whole_writes(pool))
    expected = pool.expected(host, slots)
    warps, units_per_thread = data.draw(st.sampled_from(SHAPES))
    index_dtype = data.draw(st.sampled_from([np.int64, np.int32]))
    through_staging(
        pool,
        host,
        slots.astype(index_dtype),
        InterpretedDevice(warps, units_per_thread),
        ctas=data.draw(st.sampled_from([1, 3, 32])),
        capacity=pool.geometry.unit_bytes * data.draw(st.integers(2, 9))
        + 2 * STAGING_ALIGNMENT * len(pool.geometry.components),
        offset=data.draw(st.sampled_from([0, 0, 1, 8])),
    )
    assert_host(pool, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    # Per head: both sides of every access width, short rows, and rows that no power of two divides.
    ("row_bytes", "heads", "padding"),
    [
        ((1, 1), 1, 0),
        ((6, 6), 2, 0),
        ((24, 12), 3, 4),
        ((40, 40), 1, 0),
        ((256, 128), 4, 16),
        ((1152,), 1, 0),
        ((132,), 1, 0),
        ((96, 24, 24), 1, 8),
    ],
)
def test_every_layout_and_width(layout: str, row_bytes: tuple[int, ...], heads: int, padding: int) -> None:
    pool = make_pool(
        layout, layers=2, page_size=4, row_bytes=row_bytes, heads=heads, pages=6, padding=padding
    )
    rng = np.random.default_rng(0)
    pages = rng.permutation(6)[:5]
    host = (pages[:, None] * 4 + np.arange(4)).reshape(-1)
    if not pool.geometry.paged:
        host = host[:-1]
    slots = rng.permutation(64)[: len(host)]
    expected = pool.expected(host, slots)
    capacity = pool.geometry.unit_bytes * 24 + 2 * STAGING_ALIGNMENT * len(row_bytes)
    through_staging(pool, host, slots, InterpretedDevice(1, 4), ctas=2, capacity=capacity)
    assert_host(pool, expected)


@pytest.mark.parametrize("width", [16, 8, 4, 2, 1])
def test_every_access_width(width: int) -> None:
    """The width follows the least aligned address; rows one access off their alignment are read right."""
    pool = make_pool("page_first", layers=1, page_size=1, row_bytes=(48,), pages=16, device_slots=16)
    memory = np.random.default_rng(width).integers(0, 256, 16 * 64 + 64, dtype=np.uint8)
    start = -(-int(memory.ctypes.data) // 64) * 64 + width % 16
    (part,) = pool.geometry.components
    part = replace(part, device_rows=(start,), device_row_stride=64)
    geometry = replace(pool.geometry, components=(part,))
    skip = start - int(memory.ctypes.data)
    pool.device[0][0] = np.lib.stride_tricks.as_strided(memory[skip:], (16, 48), (64, 1))
    shifted = MemoryPool(geometry, pool.device, pool.host)
    host, slots = np.arange(16), np.arange(16)[::-1].copy()
    expected = shifted.expected(host, slots)
    assert [launch.constants["WIDTH"] for launch in plan(staged(geometry, 16), 256)] == [width]
    through_staging(shifted, host, slots, InterpretedDevice(1, 1), ctas=4, capacity=4096)
    assert_host(shifted, expected)


def test_row_offsets_pass_32_bits() -> None:
    """Row 3 of this pool begins 6 GiB behind row 0."""
    stride = 2**31
    anonymous = ctypes.CDLL(None, use_errno=True)
    anonymous.mmap.restype = ctypes.c_void_p
    anonymous.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    anonymous.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    nbytes = 3 * stride + 4096
    # Read and write; private, anonymous, nothing reserved: 6 GiB of addresses, four pages of memory.
    address = anonymous.mmap(None, nbytes, 3, 0x4022, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        pytest.skip("the system gives no 6 GiB of addresses")
    try:
        pool = make_pool("page_first", layers=1, page_size=1, row_bytes=(32,), pages=4, device_slots=4)
        for slot in range(4):
            ctypes.memset(address + slot * stride, slot + 1, 32)
        (part,) = pool.geometry.components
        part = replace(part, device_rows=(address,), device_row_stride=stride)
        geometry = replace(pool.geometry, components=(part,))
        far = MemoryPool(geometry, pool.device, pool.host)
        slots = np.array([3, 0, 2, 1])
        through_staging(far, np.arange(4), slots, InterpretedDevice(1, 1), ctas=1, capacity=4096)
        np.testing.assert_array_equal(far.host[0][:, 0, 0], slots + 1)
    finally:
        anonymous.munmap(address, nbytes)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_hybrid_with_this_gather(data: st.DataObject) -> None:
    pool = data.draw(stepped_pools())
    host, slots = data.draw(whole_writes(pool))
    expected = pool.expected(host, slots)
    device = InterpretedDevice()
    backend = get_backend("hybrid")(device, {"staging_mb": 1})
    assert backend.supports(pool.geometry) is None
    backend.prepare(pool.geometry)
    transfer = Transfer(
        geometry=pool.geometry,
        host_slots=host,
        device_slots=torch.from_numpy(indices_of(pool.geometry, slots)),
        ready=(),
        indices_ready=None,
        forwards_wait=False,
        upstream_copy=lambda: None,
    )
    backend.submit(transfer, device.current_stream())
    assert_host(pool, expected)


class TestLaunch:
    def launch(self, slots: torch.Tensor, ctas: int) -> None:
        pool = make_pool("page_first", layers=1, page_size=1, row_bytes=(16,))
        Gather().launch(on_the_host(pool.geometry), 0, slots, Chunk(0, 1), ctas)

    def test_indices_of_another_type_are_refused(self) -> None:
        with pytest.raises(TypeError, match=r"torch\.float32, not int64 or int32"):
            self.launch(torch.zeros(1), 1)

    def test_no_blocks_are_refused(self) -> None:
        with pytest.raises(ValueError, match="gather_ctas must be at least 1, not 0"):
            self.launch(torch.zeros(1, dtype=torch.int64), 0)

    def test_more_tokens_than_indices_are_refused(self) -> None:
        with pytest.raises(ValueError, match="tokens up to 1 of 0 device indices"):
            self.launch(torch.zeros(0, dtype=torch.int64), 1)

    def test_indices_that_stand_for_fewer_rows_are_refused(self) -> None:
        pool = make_pool("page_first", layers=1, page_size=1, row_bytes=(16,))
        geometry = replace(pool.geometry, index_step=4)
        with pytest.raises(ValueError, match="tokens up to 2 of 7 device indices"):
            Gather().launch(staged(geometry, 2), 0, torch.zeros(7, dtype=torch.int64), Chunk(0, 2), 1)

    def test_only_one_index_of_a_row_counts(self) -> None:
        pool = make_pool("page_first", layers=1, page_size=1, row_bytes=(16,), pages=8)
        pool.geometry = replace(pool.geometry, index_step=4, index_offset=2)
        rows = np.array([5, 3, 6])
        indices = np.full((3, 4), 2**40)
        indices[:, 2] = rows * 4 + 2
        expected = pool.expected(np.arange(3), rows)
        target = on_the_host(pool.geometry)
        Gather().launch(target, 0, torch.from_numpy(indices.reshape(-1)), Chunk(0, 3), 1)
        assert_host(pool, expected)

    def test_indices_with_gaps_between_them(self) -> None:
        pool = make_pool("page_first", layers=1, page_size=1, row_bytes=(16,), pages=8)
        slots = torch.arange(16)[::2]
        expected = pool.expected(np.arange(8), slots.numpy())
        Gather().launch(on_the_host(pool.geometry), 0, slots, Chunk(0, 8), 1)
        assert_host(pool, expected)

    def test_preparing_writes_nothing(self) -> None:
        pool = make_pool("page_head", layers=2, page_size=4, row_bytes=(16, 16), heads=2)
        Gather().prepare(pool.geometry, "cpu")
        assert all(np.all(buffer == POISON) for buffer in pool.host)
