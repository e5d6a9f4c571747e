"""The backends on the virtual device: right bytes in any order with their fences, reports without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import MemoryPool, indices_of, make_pool
from strategies import stepped_pools, whole_writes, writes

from sglang_hicache.io_backends import Transfer, get_backend
from sglang_hicache.io_backends.device.base import Device
from sglang_hicache.io_backends.device.driver import CopyRefusedError
from sglang_hicache.io_backends.interface import Submission
from sglang_hicache.io_backends.plan.copies import CopyBatch
from sglang_hicache.io_backends.virtual import gpu as cuda
from sglang_hicache.io_backends.virtual.device import VirtualDevice
from sglang_hicache.io_backends.virtual.gpu import Stream
from sglang_hicache.io_backends.virtual.operations import Operation
from sglang_hicache.io_backends.virtual.races import Race
from sglang_hicache.io_backends.virtual.ranges import ByteRanges

SEEDS = range(40)


@dataclass
class Written:
    """A write, from the forward that makes its rows to the host's last look."""

    right: bool
    races: list[Race]

    @property
    def kinds(self) -> set[str]:
        return {race.kind for race in self.races}


class World:
    """A forward that makes rows, and a backend that writes them to the host."""

    def __init__(
        self, seed: int, backend: str, pool: MemoryPool, leave_out: tuple[str, str] | None = None
    ) -> None:
        self.pool = pool
        self.gpu = cuda.reset(seed)
        self.gpu.leave_out = lambda waiting, recorded_on, site: (waiting.name, recorded_on.name) == leave_out
        self.device: Device = VirtualDevice()
        self.forward, self.transfer = Stream(), Stream()
        self.forward.name, self.transfer.name = "forward", "transfer"
        self.backend = get_backend(backend)(self.device, {"staging_mb": 1})
        self.backend.prepare(pool.geometry)
        for host in pool.host:
            host[...] = 0

    def launch_forward(self, slots: np.ndarray) -> None:
        """It makes the rows of ``slots`` from what they hold now; until then they hold something else."""
        part_rows = [rows for part in self.pool.device for rows in part]
        made = [rows[slots].copy() for rows in part_rows]
        where = []
        for part in self.pool.geometry.components:
            for address in part.device_rows:
                where.append(ByteRanges.rows(address, part.device_row_stride, part.row_bytes, slots))
        for rows in part_rows:
            rows[slots] = 0x77

        def make(nth: int) -> None:
            part_rows[nth][slots] = made[nth]

        self.forward.launch(
            Operation(
                "forward",
                [lambda nth=nth: make(nth) for nth in range(len(part_rows))],
                writes=ByteRanges.union(where),
                exclusive_sms=True,
            )
        )

    def submit(self, host: np.ndarray, slots: np.ndarray) -> Submission:
        ready = self.device.record(self.forward)
        self.device.wait(self.transfer, ready)
        indices_ready = self.device.record(self.device.current_stream())
        transfer = Transfer(
            geometry=self.pool.geometry,
            host_slots=host,
            device_slots=indices_of(self.pool.geometry, slots),
            ready=(ready, indices_ready),
            indices_ready=indices_ready,
            forwards_wait=False,
            upstream_copy=lambda: pytest.fail("not here"),
        )
        with self.device.use_stream(self.transfer):
            return self.backend.submit(transfer, self.transfer)

    def write(self, host: np.ndarray, slots: np.ndarray) -> Written:
        expected = self.pool.expected(host, slots)
        self.launch_forward(slots)
        submission = self.submit(host, slots)
        done = self.device.record(self.transfer)
        while not self.device.query(done):
            pass
        del submission
        self.gpu.host_access("read the host pool", reads=ByteRanges.union(map(whole, self.pool.host)))
        right = all((got == want).all() for got, want in zip(self.pool.host, expected, strict=True))
        return Written(right, self.gpu.races())


def whole(memory: np.ndarray) -> ByteRanges:
    return ByteRanges.at(memory.ctypes.data, memory.nbytes)


def small_pool(step: int = 1) -> MemoryPool:
    pool = make_pool("page_first", layers=3, page_size=4, row_bytes=(16, 16), pages=6, seed=1)
    geometry = replace(pool.geometry, index_step=step, index_offset=step - 1)
    return replace(pool, geometry=geometry)


SLOTS = np.arange(16)[::-1].copy()


@pytest.mark.parametrize("backend", ["hybrid", "copy_engine"])
@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(0, 1000))
def test_fenced_every_byte_is_right_in_any_order(backend: str, data: st.DataObject, seed: int) -> None:
    pool = data.draw(stepped_pools(("layer_first", "page_first", "page_first_direct")))
    host, slots = data.draw((whole_writes if backend == "hybrid" else writes)(pool))
    written = World(seed, backend, pool).write(host, slots)
    assert written.right
    assert written.races == []


FENCES = {
    "hybrid: the gather for the forward": (
        "hybrid",
        ("gather", "forward"),
        {"read_before_write", "sm_overlap"},
    ),
    "hybrid: the drain for its gather": ("hybrid", ("drain", "gather"), {"read_before_write"}),
    "hybrid: the transfer's end for the drain": ("hybrid", ("transfer", "drain"), {"read_before_write"}),
    "copy_engine: the copies for the forward": (
        "copy_engine",
        ("transfer", "forward"),
        {"read_before_write"},
    ),
}


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("fence", FENCES)
def test_without_a_fence_bytes_go_wrong_and_every_seed_reports_it(fence: str, step: int) -> None:
    """Also where several indices stand for one row: none of them is in the pool's range."""
    backend, left_out, kinds = FENCES[fence]
    pools = [small_pool(step) for _ in SEEDS]
    slots = SLOTS + 4
    results = [
        World(seed, backend, pool, left_out).write(np.arange(16), slots)
        for seed, pool in zip(SEEDS, pools, strict=True)
    ]
    assert not all(result.right for result in results)
    for result in results:
        # With the drain's end unknown, the index tensor goes too early as well.
        assert kinds <= result.kinds <= kinds | {"use_after_free"}


def test_forwards_that_do_not_wait_for_the_gather_overlap_it() -> None:
    for seed in SEEDS:
        world = World(seed, "hybrid", small_pool())
        world.launch_forward(SLOTS)
        submission = world.submit(np.arange(16), SLOTS)
        assert submission.sm_done is not None
        world.forward.wait_event(submission.sm_done)
        world.launch_forward(np.array([20, 21]))
        assert world.gpu.races() == []
        later = world.submit(np.arange(16), SLOTS)
        world.launch_forward(np.array([20, 21]))
        assert later.sm_done is not None
        assert [race.kind for race in world.gpu.races()] == ["sm_overlap"]


@pytest.mark.parametrize("backend", ["hybrid", "copy_engine"])
def test_a_submission_makes_the_host_wait_for_no_forward(backend: str) -> None:
    world = World(0, backend, small_pool())
    world.forward.held = True
    world.launch_forward(SLOTS)
    world.submit(np.arange(16), SLOTS)
    assert all((rows[SLOTS] == 0x77).all() for part in world.pool.device for rows in part)


def test_host_values_wait_for_the_indices_and_for_no_forward() -> None:
    gpu = cuda.reset(0)
    device = VirtualDevice()
    forward = Stream()
    forward.held = True
    forward.launch(Operation("forward"))
    indices = np.zeros(4, dtype=np.int32)
    gpu.default.held = True
    gpu.default.launch(
        Operation(
            "make indices", (lambda: indices.__setitem__(slice(None), [4, 3, 2, 1]),), writes=whole(indices)
        )
    )
    ready = device.record(gpu.default)
    gpu.default.held = False
    before = gpu.counts["host waits"]
    assert device.host_values(indices, ready).tolist() == [4, 3, 2, 1]
    assert gpu.counts["host waits"] == before + 1
    assert gpu.races() == []
    assert device.host_values(indices).dtype == np.int64


@pytest.mark.parametrize("fence", [True, False])
def test_indices_that_are_still_being_made(fence: bool) -> None:
    gpu = cuda.reset(0)
    device = VirtualDevice()
    indices = np.zeros(4, dtype=np.int64)
    maker = Stream()
    maker.launch(Operation("make indices", writes=whole(indices)))
    device.host_values(indices, device.record(maker if fence else Stream()))
    assert [race.kind for race in gpu.races()] == ([] if fence else ["read_before_write"])


class TestLifetimes:
    """Who must keep index tensors and staging, and until when."""

    def written_after(self, seed: int, drop: str) -> Written:
        world = World(seed, "hybrid", small_pool())
        expected = world.pool.expected(np.arange(16), SLOTS)
        world.launch_forward(SLOTS)
        submission: Any = world.submit(np.arange(16), SLOTS)
        if drop == "index tensor":
            submission = replace(submission, keep=())
        if drop == "staging":
            world.backend._staging = None  # type: ignore[attr-defined]
        world.transfer.synchronize()
        right = all((got == want).all() for got, want in zip(world.pool.host, expected, strict=True))
        return Written(right, world.gpu.races())

    def test_kept_all_is_right(self) -> None:
        assert all(self.written_after(seed, "nothing") == Written(True, []) for seed in SEEDS)

    @pytest.mark.parametrize("drop", ["index tensor", "staging"])
    def test_dropped_too_early(self, drop: str) -> None:
        results = [self.written_after(seed, drop) for seed in SEEDS]
        assert not all(result.right for result in results)
        for result in results:
            assert result.kinds == {"use_after_free"}
            assert {race.second.operation for race in result.races} == {f"free {drop}"}

    def test_staging_belongs_to_the_drain_as_well(self) -> None:
        for seed in SEEDS:
            world = World(seed, "hybrid", small_pool())
            world.launch_forward(SLOTS)
            submission: Any = world.submit(np.arange(16), SLOTS)
            submission.sm_done.synchronize()
            world.backend._staging = None  # type: ignore[attr-defined]
            (race,) = world.gpu.races()
            assert (race.kind, race.first.operation) == ("use_after_free", "drain")


def test_copies_are_refused_on_the_legacy_stream() -> None:
    gpu = cuda.reset(0)
    batch = CopyBatch(*np.ones((3, 1), dtype=np.uint64))
    with pytest.raises(CopyRefusedError):
        VirtualDevice().copy(batch, gpu.default)


def test_streams_have_names_for_reports() -> None:
    cuda.reset(0)
    device = VirtualDevice()
    names: Iterator[str] = (device.new_stream().name for _ in range(3))
    assert list(names) == ["gather", "drain", "background"]
