"""SGLang's host pools and transfer engine, our routing, and the CUDA side of the seam on virtual streams.

Run by test_emulated_cuda.py, in a process that loads the stand-in driver and interprets Triton.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import emulation
import pytest
import torch
from test_pools import CASES, DCP_CASES, Pools, host_buffers, random_slots

from sglang_hicache.io_backends import get_backend
from sglang_hicache.io_backends.device.cuda import CudaDevice
from sglang_hicache.io_backends.device.driver import CopyRefusedError
from sglang_hicache.io_backends.plan.chunks import Chunk
from sglang_hicache.io_backends.routes import one_route
from sglang_hicache.io_backends.sglang.scheduler.fences import Fences
from sglang_hicache.io_backends.sglang.scheduler.scheduler_hooks import Active
from sglang_hicache.io_backends.sglang.scheduler.writeback import WriteBack
from sglang_hicache.io_backends.virtual import gpu as virtual_cuda
from sglang_hicache.io_backends.virtual.gpu import Event, Stream
from sglang_hicache.io_backends.virtual.operations import Operation

SEEDS = range(3)
MANY_SEEDS = range(60)
POISON = 0xA5
_BATCH = SimpleNamespace(
    forward_mode=SimpleNamespace(is_prebuilt=lambda: False, is_decode_or_idle=lambda: True)
)


@pytest.fixture(scope="session")
def process(cpu_sglang: None) -> emulation.Driver:
    driver = emulation.install()
    emulation.install_in_sglang(driver)
    return driver


@pytest.fixture
def driver(process: emulation.Driver) -> emulation.Driver:
    process.reset()
    return process


QUANTUM_BYTES = 20_000
"""So short that every write takes turns; no multiple of a row."""


class NamedDevice(CudaDevice):
    """Names its streams: those that ``hybrid`` makes by their order, the one that reads indices, and those
    that take turns with others."""

    def __init__(self) -> None:
        super().__init__(quantum_bytes=QUANTUM_BYTES)
        self._names = itertools.chain(("gather", "drain"), itertools.repeat("other"))
        new_stream = super().new_stream

        def named() -> Any:
            stream = new_stream()
            stream.name = "turns"
            return stream

        self._copies._new_stream = named

    def new_stream(self) -> Any:
        stream = super().new_stream()
        stream.name = next(self._names)
        return stream

    def prepare_copies(self, *args: Any) -> None:
        super().prepare_copies(*args)
        assert self._indices is not None
        self._indices._stream.name = "indices"


def launch(stream: Stream, work: Callable[[], object]) -> None:
    stream.launch(Operation("work", (work,)))


def _random_like(rows: Any, seed: int) -> Any:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, rows.view(torch.uint8).shape, dtype=torch.uint8, generator=random).view(
        rows.dtype
    )


class World:
    """A scheduler's D2H side between a forward that makes rows and one that makes others.

    Args:
        seed: of the order of everything that no fence orders.
        backend: its name.
        pools: device and host pools of one submission.
        pages: how many each pool writes.
        forwards_wait: whether forwards wait for SM work.
        leave_out: (who would wait, on whose stream's event) of waits to forget.
        options: the backend's.
    """

    def __init__(
        self,
        seed: int,
        backend: str,
        pools: Sequence[Pools],
        *,
        pages: int | None = None,
        forwards_wait: bool = False,
        leave_out: tuple[str, str] | None = None,
        **options: Any,
    ) -> None:
        from sglang.srt.mem_cache.l2_transfer import L2Transfer, L2TransferEngine

        self.gpu = gpu = virtual_cuda.reset(seed)
        gpu.default.name = "schedule"
        gpu.leave_out = lambda waiting, recorded_on, site: (waiting.name, recorded_on.name) == leave_out
        self.pools = pools
        self.device = NamedDevice()
        self.forward = Stream()
        self.forward.name = "forward"
        scheduler = SimpleNamespace(enable_overlap=True, forward_stream=self.forward)
        self.writeback = WriteBack(
            self.device,
            one_route(
                get_backend(backend)(self.device, {"staging_mb": 1, **options}),
                ("extend", "decode") if forwards_wait else (),
            ),
            Fences(self.device, scheduler),
        )
        self.active = Active(
            SimpleNamespace(fence_forward=("extend", "decode") if forwards_wait else ()),  # type: ignore[arg-type]
            self.device,
            self.writeback,
            scheduler,
            speculative=False,
        )
        paged_direct = pools[0].host.layout == "page_first_direct"
        self.engine: Any = L2TransferEngine("direct" if paged_direct else "kernel")
        self.engine.device_to_host_stream.name = "transfer"
        self.submit = lambda transfers: self.writeback.submit(
            L2TransferEngine.submit_device_to_host, self.engine, transfers
        )
        self.slots = [
            random_slots(p, pages or p.tokens // p.host.page_size, seed=seed + nth)
            for nth, p in enumerate(pools)
        ]
        # The first look at a pool, before serving: registrations, tables, staging.
        for pool in pools:
            for buffer in host_buffers(pool.host):
                buffer.view(torch.uint8).fill_(POISON)
            assert self.writeback.pools.serves(pool.host)
        self.rows = [[_random_like(rows, seed) for _, rows in pool.views()] for pool in pools]
        self.transfers = []
        for pool, (host, device) in zip(pools, self.slots, strict=True):
            # The scheduler's stream makes the indices; until then they are others.
            indices = torch.zeros_like(device).as_subclass(emulation.DeviceTensor)
            launch(gpu.default, lambda to=indices, values=device: to.copy_(values))
            self.transfers.append(L2Transfer(pool.host, pool.device, host, indices))
        self.run_forward(self.rows)

    def run_forward(self, rows: Sequence[Sequence[Any]] | None = None) -> Event:
        """Launch a forward as SGLang does; it makes ``rows``, or garbage. Returns its end."""
        self.active.fence_forward(_BATCH)
        for nth, pool in enumerate(self.pools):
            for layer, (_, device) in enumerate(pool.views()):
                if rows is None:
                    launch(self.forward, lambda to=device: to.zero_())
                else:
                    device.zero_()
                    launch(self.forward, lambda to=device, new=rows[nth][layer]: to.copy_(new))
        return self.forward.record_event()

    def run_other_forward(self) -> Event:
        """A forward that touches none of these rows: SGLang locks them until the write is complete."""
        self.active.fence_forward(_BATCH)
        launch(self.forward, lambda: None)
        return self.forward.record_event()

    def named(self, name: str) -> Stream:
        return next(s for s in self.gpu.streams.values() if s.name == name)

    def write(self) -> Any:
        return self.submit(self.transfers)

    def wait(self, completion: Any, each: Callable[[], None] = lambda: None) -> None:
        """Poll as the scheduler does."""
        for _ in range(100_000):
            if completion.finish_event.query():
                return
            each()
        raise AssertionError("the write is never complete")

    def assert_right(self) -> None:
        for pool, slots, rows in zip(self.pools, self.slots, self.rows, strict=True):
            pool.assert_copied(*slots, rows)

    def is_right(self) -> bool:
        try:
            self.assert_right()
        except AssertionError:
            return False
        return True


def upstream_stand_in(pools: Pools) -> None:
    """SGLang's copy kernel has no CPU form: one that copies the same rows when its stream gets there."""

    def backup(device_pool: Any, host_indices: Any, device_indices: Any, io_backend: str) -> None:
        assert virtual_cuda.current_stream().name == "transfer"
        page = pools.host.page_size
        for host, device in pools.views():

            def copy(host: Any = host, device: Any = device) -> None:
                rows = device[pools.rows_of(device_indices.as_subclass(torch.Tensor))]
                slots = pools.rows_of(host_indices.as_subclass(torch.Tensor))
                if pools.host.layout == "page_first_direct":
                    host[slots // page, slots % page] = rows
                else:
                    host[slots] = rows

            launch(virtual_cuda.current_stream(), copy)

    pools.host.backup_from_device_all_layer_physical = backup


def check(world: World) -> None:
    """Write, with forwards before and behind, and look at the bytes in the moment SGLang takes it as done."""
    completion = world.write()
    world.wait(completion, each=world.run_other_forward)
    world.assert_right()
    assert world.writeback.pools.fallbacks() == []


@pytest.mark.parametrize("backend", ["hybrid", "copy_engine", "fenced_kernel"])
@pytest.mark.parametrize(("kind", "layout"), CASES + DCP_CASES)
def test_byte_for_byte_in_any_order(driver: Any, kind: str, layout: str, backend: str) -> None:
    pools = Pools(kind, layout, 16)
    upstream_stand_in(pools)
    for seed in SEEDS:
        check(World(seed, backend, [pools], pages=10))


def test_a_gather_takes_no_more_blocks_than_the_gpu_has_multiprocessors(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, asked = NamedDevice(), []
    monkeypatch.setattr(device._gather, "launch", lambda *args: asked.append(args[4]))
    for ctas in (64, 192):
        device.gather(None, 0, None, Chunk(1, 2), device.new_stream(), ctas)  # type: ignore[arg-type]
    assert asked == [64, virtual_cuda.get_device_properties().multi_processor_count] == [64, 132]


@pytest.mark.parametrize("forwards_wait", [False, True])
@pytest.mark.parametrize("backend", ["hybrid", "copy_engine", "fenced_kernel"])
def test_several_pools_in_one_submission(driver: Any, backend: str, forwards_wait: bool) -> None:
    pools = [Pools("mha", "page_first", 16), Pools("mla", "page_first", 16), Pools("mha", "page_first", 16)]
    for pool in pools:
        upstream_stand_in(pool)
    for seed in SEEDS:
        world = World(seed, backend, pools, pages=8, forwards_wait=forwards_wait)
        check(world)
        assert world.gpu.counts["recorded on gather"] == (len(pools) if backend == "hybrid" else 0)


def large(kind: str, layout: str) -> Pools:
    """Half as much again as a ring of 1 MiB."""
    pools = Pools(kind, layout, 16, "float32", tokens={"mha": 1040, "wide_k": 832, "mla": 1680}[kind])
    assert pools.tokens * pools.host.size_per_token > 1.5 * 2**20
    return pools


@pytest.mark.parametrize("forwards_wait", [False, True])
@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_ring_smaller_than_one_write(driver: Any, kind: str, layout: str, forwards_wait: bool) -> None:
    pools = large(kind, layout)
    for seed in SEEDS[:2]:
        world = World(seed, "hybrid", [pools], forwards_wait=forwards_wait)
        check(world)
        # Torch keeps the indices for what is on the gather's stream when they die: told once, for all chunks.
        assert world.gpu.counts["gathers"] > 1
        assert world.gpu.counts["recorded on gather"] == 1


FENCES = {
    # Who waits, on whose event; the backend; whether the pool is larger than the ring.
    "hybrid: the gather for the forward that makes the rows": ("gather", "forward", "hybrid", False),
    "hybrid: the gather for the indices": ("gather", "schedule", "hybrid", False),
    "hybrid: the drain for its gather": ("drain", "gather", "hybrid", False),
    "hybrid: the gather for the drain of the memory it fills": ("gather", "drain", "hybrid", True),
    "hybrid: the transfer's end for the last drain": ("transfer", "drain", "hybrid", False),
    "hybrid: the next forward for the gather": ("forward", "gather", "hybrid", False),
    "copy_engine: the copies for the forward that makes the rows": (
        "transfer",
        "forward",
        "copy_engine",
        False,
    ),
    "copy_engine: the reader for the indices": ("indices", "schedule", "copy_engine", False),
    "hybrid: copies of the second turn for the first, which waits for the gather": (
        "turns",
        "drain",
        "hybrid",
        False,
    ),
    "hybrid: the drain's end for copies of other turns": ("drain", "turns", "hybrid", False),
    "copy_engine: copies of the second turn for the first": ("turns", "transfer", "copy_engine", False),
    "copy_engine: the transfer's end for copies of other turns": (
        "transfer",
        "turns",
        "copy_engine",
        False,
    ),
    "fenced_kernel: the kernel for the forward": ("transfer", "forward", "fenced_kernel", False),
    "fenced_kernel: the next forward for the kernel": ("forward", "transfer", "fenced_kernel", False),
}


@pytest.mark.parametrize("fence", FENCES)
def test_each_fence_is_needed_and_there(driver: Any, fence: str) -> None:
    waiting, recorded, backend, larger = FENCES[fence]
    pools = large("mha", "page_first") if larger else Pools("mha", "page_first", 16)
    upstream_stand_in(pools)

    def right(seed: int, leave_out: tuple[str, str] | None) -> bool:
        next_forward = waiting == "forward"
        world = World(
            seed,
            backend,
            [pools],
            pages=None if larger else 10,
            forwards_wait=next_forward,
            leave_out=leave_out,
        )
        completion = world.write()
        if next_forward:
            world.run_forward()
        world.wait(completion)
        return world.is_right()

    # As many as it takes to miss one: with few, a fence that is gone from the product would stay unseen.
    assert all(right(seed, None) for seed in MANY_SEEDS)
    assert not all(right(seed, (waiting, recorded)) for seed in MANY_SEEDS), "left out, it is not missed"


class TestCompletion:
    """The event that SGLang holds."""

    def world(self, seed: int = 0) -> World:
        """A write of which parts are left for later: forwards wait, and the ring is too small."""
        world = World(seed, "hybrid", [large("mha", "page_first")], forwards_wait=True)
        # No gather has begun, so no memory can have become free.
        world.forward.held = True
        return world

    @pytest.mark.parametrize("forwards_wait", [False, True])
    @pytest.mark.parametrize("backend", ["hybrid", "copy_engine"])
    def test_is_not_complete_while_the_link_is_busy(
        self, driver: Any, backend: str, forwards_wait: bool
    ) -> None:
        for seed in SEEDS:
            world = World(
                seed, backend, [Pools("mha", "page_first", 16)], pages=4, forwards_wait=forwards_wait
            )
            drain = world.named("drain" if backend == "hybrid" else "transfer")
            drain.held = True
            completion = world.write()
            assert not any(completion.finish_event.query() for _ in range(200))
            drain.held = False
            world.wait(completion)
            world.assert_right()

    def test_polling_enqueues_the_rest(self, driver: Any) -> None:
        world = self.world()
        completion = world.write()
        assert not completion.finish_event.query()
        gathers = world.gpu.counts["gathers"]
        world.forward.held = False
        world.wait(completion)
        assert world.gpu.counts["gathers"] > gathers
        world.assert_right()

    def test_synchronize_enqueues_the_rest_and_waits(self, driver: Any) -> None:
        world = self.world()
        completion = world.write()
        world.forward.held = False
        completion.finish_event.synchronize()
        world.assert_right()

    def test_another_stream_can_wait_for_it(self, driver: Any) -> None:
        world = self.world()
        completion = world.write()
        world.forward.held = False
        other = Stream()
        other.wait_event(completion.finish_event)
        other.synchronize()
        world.assert_right()

    def test_measures_the_whole_write(self, driver: Any) -> None:
        world = self.world()
        completion = world.write()
        assert completion.timing_enabled
        world.forward.held = False
        world.named("drain").held = True
        other = Stream()
        for _ in range(50):
            launch(other, lambda: None)
        other.synchronize()
        world.named("drain").held = False
        world.wait(completion)
        assert completion.start_event.elapsed_time(completion.finish_event) > 50

    def test_after_a_reset_nothing_more_is_enqueued(self, driver: Any) -> None:
        world = self.world()
        completion = world.write()
        gathers, copies = world.gpu.counts["gathers"], world.gpu.counts["copies"]
        world.writeback.abandon()
        world.forward.held = False
        world.wait(completion, each=world.run_other_forward)
        assert (world.gpu.counts["gathers"], world.gpu.counts["copies"]) == (gathers, copies)
        assert not world.is_right()
        # The next write is a whole one.
        world.pools[0].host.kv_buffer.view(torch.uint8).fill_(POISON)
        world.wait(world.write())
        world.assert_right()

    def test_after_a_reset_it_is_complete_when_what_was_enqueued_is(self, driver: Any) -> None:
        """SGLang gives the slots to others then."""
        world = self.world()
        world.named("drain").held = True
        completion = world.write()
        world.writeback.abandon()
        world.forward.held = False
        for _ in range(20):
            world.run_other_forward().synchronize()
        assert world.gpu.counts["copies"] > 0
        assert not any(completion.finish_event.query() for _ in range(200))
        world.named("drain").held = False
        world.wait(completion)


def back_up(world: World) -> Any:
    """SGLang's ``UnifiedRadixCache.backup_kv_cache`` (0.5.21 and later) on a world's pool.

    It submits past ``start_writing`` and its fence, and waits. A server that has a host pool for retraction
    only has no ``write_fence_stream`` at all.
    """
    from sglang.srt.managers.cache_controller import HiCacheController
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    (pools,), (transfer,) = world.pools, world.transfers
    controller = SimpleNamespace(
        mem_pool_host=pools.host,
        mem_pool_device=pools.device,
        io_backend=world.engine.io_backend,
        device="cpu",
        allocate_host_transfers=lambda *args, **named: (transfer.host_indices, None),
        l2_transfer_engine=SimpleNamespace(submit_device_to_host=world.submit),
    )
    controller.move_indices = lambda host, device: (host, device)
    controller._l2_transfers = lambda *moved: HiCacheController._l2_transfers(controller, *moved)
    controller._move_write_operation = lambda operation: world.writeback.move_write_operation(
        HiCacheController._move_write_operation, controller, operation
    )
    cache = SimpleNamespace(
        cache_controller=controller,
        _retraction_device_transfers=lambda request: (transfer.device_indices, []),
        _reclaim_retraction_host=lambda tokens: 0,
    )
    return UnifiedRadixCache.backup_kv_cache(cache, SimpleNamespace(seqlen=2))


RETRACTIONS = {
    # The fence of a forward that makes the rows, by backend.
    "hybrid": ("gather", "forward"),
    "copy_engine": ("transfer", "forward"),
    "fenced_kernel": ("transfer", "forward"),
}


@pytest.mark.parametrize("backend", RETRACTIONS)
def test_a_backup_for_retraction_is_fenced_and_whole(driver: Any, backend: str) -> None:
    # hybrid leaves a part of it for later.
    pools = large("mha", "page_first") if backend == "hybrid" else Pools("mha", "page_first", 16)
    upstream_stand_in(pools)

    def right(seed: int, leave_out: tuple[str, str] | None) -> bool:
        pages = None if backend == "hybrid" else 10
        world = World(seed, backend, [pools], pages=pages, forwards_wait=True, leave_out=leave_out)
        assert back_up(world) is not None
        # SGLang frees the device rows now.
        return world.is_right()

    assert all(right(seed, None) for seed in SEEDS)
    assert not all(right(seed, RETRACTIONS[backend]) for seed in MANY_SEEDS), "without the fence it is not"


def test_forwards_wait_for_the_link_from_a_writes_second_gap_on_and_not_before(driver: Any) -> None:
    for seed in SEEDS:
        world = World(seed, "hybrid", [large("mha", "page_first")], forwards_wait=True)
        drain = world.named("drain")
        drain.held = True
        completion = world.write()
        world.run_other_forward().synchronize()
        assert world.writeback.counters.forward_fences > 0
        # What did not fit goes behind it, and the next forward behind that.
        second = world.run_other_forward()
        assert not any(second.query() for _ in range(200))
        assert not completion.finish_event.query()
        drain.held = False
        second.synchronize()
        world.wait(completion, each=world.run_other_forward)
        world.assert_right()


@pytest.mark.parametrize("told", [False, True])
def test_indices_are_read_behind_the_work_that_makes_them(driver: Any, told: bool) -> None:
    for seed in SEEDS:
        gpu = virtual_cuda.reset(seed)
        device = CudaDevice()
        values = torch.arange(1, 100)
        indices = torch.zeros_like(values).as_subclass(emulation.DeviceTensor)
        launch(gpu.default, lambda to=indices, new=values: to.copy_(new))
        made = device.record(device.current_stream()) if told else None
        assert device.host_values(indices, made).tolist() == values.tolist()


class Strided(emulation.DeviceTensor):
    """Indices that lie apart: packing them is work on the stream that is current."""

    def is_contiguous(self, *_: Any) -> bool:
        return False

    def contiguous(self, *_: Any) -> Any:
        packed = torch.zeros(self.shape, dtype=self.dtype).as_subclass(emulation.DeviceTensor)
        values = self.as_subclass(torch.Tensor)
        launch(virtual_cuda.current_stream(), lambda: packed.copy_(values))
        return packed


@pytest.mark.parametrize("told", [False, True])
def test_strided_indices_are_packed_where_they_are_read(driver: Any, told: bool) -> None:
    for seed in range(10):
        virtual_cuda.reset(seed)
        device = CudaDevice()
        indices = torch.arange(1, 100).as_subclass(Strided)
        made = device.record(device.current_stream()) if told else None
        assert device.host_values(indices, made).tolist() == list(range(1, 100))


def test_more_indices_than_the_buffer_takes(driver: Any) -> None:
    virtual_cuda.reset(0)
    device = CudaDevice()
    for count in (100, 140_000, 300_000, 100):
        values = torch.arange(count).flip(0)
        assert device.host_values(values.as_subclass(emulation.DeviceTensor)).tolist() == values.tolist()


def test_staging_is_no_other_tensors_any_more(driver: Any) -> None:
    """Its memory may have been another tensor's, in work that is still queued."""
    for seed in SEEDS:
        gpu = virtual_cuda.reset(seed)
        device = CudaDevice()
        done: list[int] = []
        for nth in range(100):
            launch(gpu.default, lambda to=done, nth=nth: to.append(nth))
        staging = device.allocate_staging(1000)
        assert len(done) == 100
        assert staging.address % 256 == 0


def test_a_gather_is_not_captured_in_a_graph(driver: Any) -> None:
    """Replayed, it would read what its indices' memory holds by then."""
    world = World(0, "hybrid", [Pools("mha", "page_first", 16)], pages=4)
    prepared = world.gpu.counts["gathers"]
    driver.set("capturing", 1)
    with pytest.raises(CopyRefusedError, match="graph is being captured"):
        world.write()
    assert world.gpu.counts["gathers"] == prepared


def test_the_host_waits_for_indices_only_and_for_no_forward(driver: Any) -> None:
    for backend, waits in {"hybrid": 0, "copy_engine": 1, "fenced_kernel": 0}.items():
        pools = Pools("mha", "page_first", 16)
        upstream_stand_in(pools)
        world = World(0, backend, [pools], pages=4)
        world.forward.held = True
        before = world.gpu.counts["host waits"]
        completion = world.write()
        assert world.gpu.counts["host waits"] - before == waits
        world.forward.held = False
        world.wait(completion)
        world.assert_right()


def test_host_memory_registered_in_pieces(driver: Any) -> None:
    pools = large("mha", "layer_first")
    buffer = pools.host.kv_buffer
    start, nbytes = buffer.data_ptr(), buffer.numel() * buffer.element_size()
    assert buffer._sglang_cuda_host_registered_ranges == [(start, nbytes)], "SGLang registered it"
    driver.reset()
    # Not a multiple of a row, so that entries cross.
    step = 99_996
    buffer._sglang_cuda_host_registered_ranges = [
        (start + at, min(step, nbytes - at)) for at in range(0, nbytes, step)
    ]
    for piece in buffer._sglang_cuda_host_registered_ranges:
        driver.register(*piece)
    for backend in ("hybrid", "copy_engine"):
        check(World(0, backend, [pools]))


def test_a_driver_without_batches(driver: Any) -> None:
    driver.set("version", 12_040)
    for seed in SEEDS:
        check(World(seed, "hybrid", [Pools("mha", "page_first", 16)], pages=4))
