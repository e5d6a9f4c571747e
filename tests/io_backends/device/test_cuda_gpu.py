"""The CUDA device and the backends on a real GPU: bytes, and what is refused.

Needs torch, Triton and cuda-python, no SGLang.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gpu import LONG, MARKS, WHY_NOT, GpuPool, assert_host, gpu_pool, prepared, transfer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import POISON, make_pool, on_the_host
from strategies import LAYOUTS, pools, whole_writes, writes

from sglang_hicache.io_backends import CopyBatch, direct_copies
from sglang_hicache.io_backends.device.base import DeviceUnavailableError
from sglang_hicache.io_backends.device.copy_interleaving import QUANTUM_BYTES
from sglang_hicache.io_backends.device.cuda import CudaDevice
from sglang_hicache.io_backends.device.driver import CopyRefusedError, DriverError
from sglang_hicache.io_backends.device.host_memory import HostRange, UnknownHostMemoryError
from sglang_hicache.io_backends.plan.chunks import Chunk

pytestmark = MARKS
if WHY_NOT is None:
    import torch


def write(device: CudaDevice, name: str, pool: GpuPool, host: np.ndarray, slots: np.ndarray) -> None:
    """One write by ``name``, waited for."""
    # The least ring that hybrid takes is 1 MiB: writes of any size go round it.
    backend = prepared(device, name, pool, staging_mb=1)
    stream = device.new_stream()
    transfer = transfer_of(pool, host, slots)
    ready = device.record(device.current_stream())
    device.wait(stream, ready)
    with device.use_stream(stream):
        backend.submit(replace(transfer, ready=(ready,), indices_ready=ready), stream)
    stream.synchronize()


def fragmented(pool: GpuPool, tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(host, device) slots of ``tokens`` tokens: whole pages in random runs, the last one partial."""
    rng = np.random.default_rng(seed)
    g = pool.geometry

    def slots(total: int) -> np.ndarray:
        pages = np.arange(total // g.page_size)
        runs = np.split(pages, np.sort(rng.choice(len(pages), len(pages) // 8, replace=False)))
        rng.shuffle(runs := [run for run in runs if len(run)])  # type: ignore[arg-type]
        return (np.concatenate(runs)[:, None] * g.page_size + np.arange(g.page_size)).reshape(-1)[:tokens]

    return slots(g.host_slots), slots(g.device_slots)


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


@pytest.fixture(scope="module", params=[QUANTUM_BYTES, 10_000], ids=["turns", "short turns"])
def any_device(request: pytest.FixtureRequest) -> CudaDevice:
    """With turns as they are, and so short that all but the least writes take some."""
    return CudaDevice(quantum_bytes=request.param)


class TestBytes:
    @pytest.mark.parametrize("name", ["copy_engine", "hybrid"])
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_random_pools_and_writes(self, any_device: CudaDevice, name: str, data: st.DataObject) -> None:
        layouts = ("layer_first", "page_first", "page_first_direct") if name == "copy_engine" else LAYOUTS
        pool = GpuPool(data.draw(pools(layouts)))
        host, slots = data.draw((whole_writes if name == "hybrid" else writes)(pool))
        expected = pool.expected(host, slots)
        write(any_device, name, pool, host, slots)
        assert_host(pool, expected)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(
        ("row_bytes", "heads", "padding"),
        # bf16 and fp8 heads of 128, K and V of two widths, MLA's row, strided rows, odd rows.
        [
            ((2048, 2048), 8, 0),
            ((1024, 1024), 8, 0),
            ((384, 256), 1, 0),
            ((1152,), 1, 0),
            ((512, 512), 2, 64),
            ((12, 12), 3, 4),
            ((7, 7), 1, 0),
        ],
    )
    @pytest.mark.parametrize("tokens", [1, 129, 2000])
    def test_rows_of_real_models(
        self,
        any_device: CudaDevice,
        layout: str,
        row_bytes: tuple[int, ...],
        heads: int,
        padding: int,
        tokens: int,
    ) -> None:
        pool = gpu_pool(
            layout,
            layers=3,
            page_size=16,
            row_bytes=row_bytes,
            heads=heads,
            padding=padding,
            pages=160,
            device_slots=2560,
        )
        # Whole pages, which is all that is written to paged layouts.
        host, slots = fragmented(pool, -(-tokens // 16) * 16 if pool.geometry.paged else tokens, seed=tokens)
        expected = pool.expected(host, slots)
        write(any_device, "hybrid", pool, host, slots)
        assert_host(pool, expected)
        for array in pool.host:
            array[:] = POISON
        stream = any_device.new_stream()
        any_device.copy(direct_copies(pool.geometry, host, slots), stream)
        stream.synchronize()
        assert_host(pool, expected)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("page_size", [1, 64])
    def test_a_hundred_thousand_rows(self, any_device: CudaDevice, layout: str, page_size: int) -> None:
        tokens = 100_000
        pages = -(-tokens // page_size) + 7
        pool = gpu_pool(
            layout,
            layers=2,
            page_size=page_size,
            row_bytes=(64, 64),
            heads=2,
            pages=pages,
            device_slots=pages * page_size,
        )
        host, slots = fragmented(pool, -(-tokens // page_size) * page_size, seed=1)
        expected = pool.expected(host, slots)
        for name in ("hybrid",) if layout == "page_head" else ("hybrid", "copy_engine"):
            for array in pool.host:
                array[:] = POISON
            write(any_device, name, pool, host, slots)
            assert_host(pool, expected)

    def test_fenced_kernel_enqueues_sglangs_copy_and_marks_its_end(self, device: CudaDevice) -> None:
        pool = gpu_pool("layer_first", layers=2, page_size=16, row_bytes=(64,))
        backend = prepared(device, "fenced_kernel", pool)
        host, slots = np.arange(16, 48), np.random.default_rng(0).permutation(64)[:32]
        expected = pool.expected(host, slots)
        rows = torch.from_numpy(slots).cuda()
        stream = device.new_stream()
        device.wait(stream, device.record(device.current_stream()))

        def upstream_copy() -> None:
            for layer, source in enumerate(pool.rows[0]):
                pool.pinned[0][layer, 16:48].copy_(source[rows], non_blocking=True)
            # Last, because a copy to host memory may make the host wait.
            torch.cuda._sleep(LONG)

        with device.use_stream(stream):
            done = backend.submit(transfer_of(pool, host, slots, upstream_copy=upstream_copy), stream)
        assert not device.query(done.sm_done)
        stream.synchronize()
        assert device.query(done.sm_done)
        assert_host(pool, expected)

    @pytest.mark.parametrize("dtype", ["int32", "int64"])
    def test_indices_on_the_host(self, device: CudaDevice, dtype: str) -> None:
        values = np.random.default_rng(0).integers(0, 2**31, 300_000).astype(dtype)
        got = device.host_values(torch.from_numpy(values).cuda())
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, values)

    @pytest.mark.parametrize("dtype", ["int32", "int64"])
    def test_indices_that_are_not_contiguous_on_the_host(self, device: CudaDevice, dtype: str) -> None:
        values = np.arange(1000).astype(dtype)
        for step in (1, 3):
            got = device.host_values(torch.from_numpy(values).cuda()[::step])
            np.testing.assert_array_equal(got, values[::step])
        assert device.host_values(torch.from_numpy(values).cuda()[:0]).shape == (0,)


class TestHostWaits:
    """Indices come to the host without a wait for forwards that run elsewhere."""

    def test_a_forward_on_another_stream_is_not_waited_for(self, device: CudaDevice) -> None:
        indices = torch.arange(1000, device="cuda")
        device.host_values(indices)
        with device.use_stream(forward := device.new_stream()):
            torch.cuda._sleep(20 * LONG)
        assert device.host_values(indices).tolist() == list(range(1000))
        assert not forward.query(), "host_values waited for a stream that has nothing to do with it"

    def test_nor_by_a_stream_that_waits_for_it_if_the_event_is_given(self, device: CudaDevice) -> None:
        indices = torch.arange(1000, device="cuda")
        made = device.record(device.current_stream())
        device.host_values(indices)
        with device.use_stream(forward := device.new_stream()):
            torch.cuda._sleep(20 * LONG)
        transfers = device.new_stream()
        device.wait(transfers, device.record(forward))
        with device.use_stream(transfers):
            assert device.host_values(indices, made).tolist() == list(range(1000))
        assert not forward.query()


class TestTurns:
    """Copies on the stream's partner wait for the stream, and the stream for them."""

    @pytest.mark.parametrize("entries", [12, 1024], ids=["few", "many"])
    @pytest.mark.parametrize("dropped", [None, "partner", "stream"])
    def test_each_wait_is_needed_and_there(self, dropped: str | None, entries: int) -> None:
        device = CudaDevice(quantum_bytes=300_000)
        rows = torch.zeros((entries, 2**20 // entries), dtype=torch.uint8, device="cuda")
        target = torch.full(rows.shape, POISON, dtype=torch.uint8, pin_memory=True)
        step = np.arange(entries, dtype=np.uint64) * np.uint64(rows.shape[1])
        batch = CopyBatch(
            np.uint64(target.data_ptr()) + step,
            np.uint64(rows.data_ptr()) + step,
            np.full(entries, rows.shape[1], dtype=np.uint64),
        )
        device._host.add([HostRange(target.data_ptr(), target.numel())])
        stream, partner = device.new_stream(), device.new_stream()
        waits = {"partner": partner, "stream": stream}
        if dropped is not None:
            waits[dropped].wait_event = lambda event: None
        device._copies._new_stream = lambda: partner
        torch.cuda.synchronize()
        with device.use_stream(stream):
            torch.cuda._sleep(LONG)
            rows.fill_(1)
        if dropped == "stream":  # the partner's copies come late
            device.wait(partner, device.record(stream))
            with device.use_stream(partner):
                torch.cuda._sleep(LONG)
        device.copy(batch, stream)
        stream.synchronize()
        assert bool((target == 1).all()) == (dropped is None)
        torch.cuda.synchronize()


class TestOthersCopies:
    """A small copy to the host on another stream, such as that of the token ids of a step."""

    @pytest.mark.parametrize(("name", "layout"), [("hybrid", "page_first"), ("copy_engine", "layer_first")])
    def test_is_served_between_two_turns_of_a_long_write(self, name: str, layout: str) -> None:
        pool = gpu_pool(layout, layers=8, page_size=64, row_bytes=(8192, 8192), pages=128, device_slots=8192)
        if self.comes_first(CudaDevice(quantum_bytes=2**40), name, pool):
            pytest.skip("this GPU's engine serves others in the middle of a turn too")
        assert self.comes_first(CudaDevice(), name, pool)

    @staticmethod
    def comes_first(device: CudaDevice, name: str, pool: GpuPool) -> bool:
        """Whether a copy that is asked for behind a write of 1 GiB is done before it."""
        ids, arrived = torch.arange(256, device="cuda"), torch.empty(256, dtype=torch.int64, pin_memory=True)
        backend = prepared(device, name, pool)
        stream, other = device.new_stream(), device.new_stream()
        transfer = transfer_of(pool, *fragmented(pool, 8192, seed=0))
        torch.cuda.synchronize()
        with device.use_stream(stream):
            backend.submit(transfer, stream)
        end = device.record(stream)
        with device.use_stream(other):
            arrived.copy_(ids, non_blocking=True)
        other.synchronize()
        first = not device.query(end)
        stream.synchronize()
        assert arrived.tolist() == list(range(256))
        return first


class TestRefusals:
    def batch(self, device: CudaDevice) -> tuple[GpuPool, CopyBatch]:
        pool = gpu_pool("page_first", layers=2, page_size=4, row_bytes=(64,))
        device.prepare_copies(pool.geometry)
        return pool, direct_copies(pool.geometry, np.arange(8), np.arange(8))

    def test_the_legacy_null_stream(self, device: CudaDevice) -> None:
        pool, batch = self.batch(device)
        with pytest.raises(CopyRefusedError, match="NULL stream"):
            device.copy(batch, torch.cuda.default_stream())
        assert np.all(pool.host[0] == POISON)

    def test_graph_capture_which_goes_on_unharmed(self, device: CudaDevice) -> None:
        pool, batch = self.batch(device)
        device.prepare_gather(pool.geometry)
        counter = torch.zeros(1, device="cuda")
        slots = torch.arange(8, device="cuda")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = device.new_stream()
        with torch.cuda.graph(graph, stream=stream):
            counter.add_(1)
            with pytest.raises(CopyRefusedError, match="graph is being captured"):
                device.copy(batch, stream)
            with pytest.raises(CopyRefusedError, match="graph is being captured"):
                device.gather(on_the_host(pool.geometry), 0, slots, Chunk(0, 8), stream, 1)
            counter.add_(1)
        graph.replay()
        torch.cuda.synchronize()
        assert counter.item() == 2
        assert np.all(pool.host[0] == POISON)

    def test_pageable_memory(self, device: CudaDevice) -> None:
        with pytest.raises(DeviceUnavailableError, match="is pageable"):
            device.prepare_copies(make_pool("page_first", layers=2, page_size=4, row_bytes=(64,)).geometry)

    def test_memory_that_nobody_spoke_of(self, device: CudaDevice) -> None:
        pool = gpu_pool("page_first", layers=2, page_size=4, row_bytes=(64,))
        with pytest.raises(UnknownHostMemoryError):
            CudaDevice().copy(direct_copies(pool.geometry, np.arange(8), np.arange(8)), device.new_stream())


def test_rows_across_two_registrations(device: CudaDevice) -> None:
    """SGLang registers large buffers in pieces; an entry that spans two fails unless it is cut."""
    source = make_pool("layer_first", layers=1, page_size=1, row_bytes=(2048,), pages=64)
    page = 4096
    memory = np.full(64 * 2048 + 2 * page, POISON, dtype=np.uint8)
    start = -(-int(memory.ctypes.data) // page) * page
    pieces = [(start, 9 * page), (start + 9 * page, 23 * page)]
    cudart = torch.cuda.cudart()
    registered = []
    try:
        for address, nbytes in pieces:
            code = int(cudart.cudaHostRegister(address, nbytes, 0))
            if code != 0:
                pytest.skip(f"cudaHostRegister is not to be had here ({code})")
            registered.append(address)
        pool = GpuPool(source)
        skip = start - int(memory.ctypes.data)
        pool.host = [memory[skip : skip + 64 * 2048].reshape(1, 64, 2048)]
        (part,) = pool.geometry.components
        pool.geometry = replace(
            pool.geometry, components=(replace(part, host=replace(part.host, base=start)),)
        )
        batch = direct_copies(pool.geometry, np.arange(64), np.arange(64))
        assert len(batch) == 1
        expected = pool.expected(np.arange(64), np.arange(64))
        stream = device.new_stream()
        # Told of one registration: what the driver says to an entry across two is for the log.
        try:
            unaware = CudaDevice()
            unaware.prepare_copies(pool.geometry)
            unaware.copy(batch, stream)
            stream.synchronize()
            print("an entry across two registrations, not cut: accepted by this driver")
        except DriverError as error:
            print(f"an entry across two registrations, not cut: {error}")
        pool.host[0][:] = POISON
        device.prepare_copies(pool.geometry, pieces)
        device.copy(batch, stream)
        stream.synchronize()
        assert_host(pool, expected)
    finally:
        for address in registered:
            cudart.cudaHostUnregister(address)
