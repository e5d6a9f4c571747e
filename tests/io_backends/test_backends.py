"""Each backend on its own: the right bytes, only enqueued, and the fences its contract names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import MemoryPool, make_pool
from strategies import pools, writes

from sglang_hicache.io_backends import Backend, Transfer, get_backend
from sglang_hicache.io_backends.device.cpu import CpuDevice
from sglang_hicache.io_backends.registry import OWN_NAMES

LAYOUTS_OF_ALL = ("layer_first", "page_first", "page_first_direct")


@dataclass(frozen=True)
class NamedEvent:
    stream: str
    index: int


@dataclass
class RecordingDevice(CpuDevice):
    """Moves bytes like the CPU engine and writes down what was enqueued where."""

    log: list[tuple[Any, ...]] = field(default_factory=list)
    name: str = "cpu"

    def __post_init__(self) -> None:
        super().__init__()
        self.streams = 0

    def new_stream(self) -> str:  # type: ignore[override]
        self.streams += 1
        return f"background{self.streams}"

    def record(self, stream: Any) -> NamedEvent:  # type: ignore[override]
        event = NamedEvent(stream, len(self.log))
        self.log.append(("record", stream, event))
        return event

    def wait(self, stream: Any, event: Any) -> None:
        self.log.append(("wait", stream, event))

    def gather(self, staged: Any, device_slots: Any, first_slot: int, stream: Any, ctas: int) -> None:
        self.log.append(("gather", stream, len(device_slots)))
        super().gather(staged, device_slots, first_slot, stream, ctas)

    def copy(self, batch: Any, stream: Any) -> None:
        self.log.append(("copy", stream, len(batch)))
        super().copy(batch, stream)

    def on(self, stream: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self.log if entry[1] == stream]


def transfer_of(pool: MemoryPool, host: np.ndarray, device: np.ndarray, ready: tuple[Any, ...]) -> Transfer:
    return Transfer(pool.geometry, host, device, ready, upstream_copy=lambda: pytest.fail("not on the CPU"))


def make(name: str, device: RecordingDevice, **options: Any) -> Backend:
    backend = get_backend(name)(device, options)
    assert isinstance(backend, Backend)
    return backend


@pytest.mark.parametrize("name", OWN_NAMES)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_moves_exactly_these_rows(name: str, data: st.DataObject) -> None:
    pool = data.draw(pools(LAYOUTS_OF_ALL))
    host, rows = data.draw(writes(pool))
    backend = make(name, RecordingDevice(), staging_mb=1)
    assert backend.supports(pool.geometry) is None
    backend.prepare(pool.geometry)
    expected = pool.expected(host, rows)
    done = backend.submit(transfer_of(pool, host, rows, ()), "d2h")
    assert done.nbytes == len(host) * pool.geometry.bytes_per_token
    for got, want in zip(pool.host, expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", OWN_NAMES)
def test_one_backend_serves_several_pools_in_turn(name: str) -> None:
    first = make_pool("page_first", layers=2, page_size=4, row_bytes=(16, 16), seed=1)
    second = make_pool("layer_first", layers=3, page_size=4, row_bytes=(24,), seed=2)
    backend = make(name, RecordingDevice(), staging_mb=1)
    for pool in (first, second, first):
        backend.prepare(pool.geometry)
        rows = np.arange(8)[::-1].copy()
        expected = pool.expected(np.arange(8), rows)
        backend.submit(transfer_of(pool, np.arange(8), rows, ()), "d2h")
        for got, want in zip(pool.host, expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_copy_engine_has_no_sm_work_and_copies_on_the_given_stream() -> None:
    device = RecordingDevice()
    pool = make_pool("layer_first", layers=2, page_size=4, row_bytes=(16, 16))
    done = make("copy_engine", device).submit(transfer_of(pool, np.arange(8), np.arange(8), ()), "d2h")
    assert done.sm_done is None
    assert device.log == [("copy", "d2h", 4)]
    assert done.copies == 4


def test_fenced_kernel_calls_sglangs_kernel_and_records_its_end_after_it() -> None:
    device = RecordingDevice(name="cuda")
    pool = make_pool("layer_first", layers=2, page_size=4, row_bytes=(16, 16))
    transfer = Transfer(
        pool.geometry,
        np.arange(8),
        np.arange(8),
        (),
        upstream_copy=lambda: device.log.append(("kernel", "d2h", 1)),
    )
    done = make("fenced_kernel", device).submit(transfer, "d2h")
    assert device.log == [("kernel", "d2h", 1), ("record", "d2h", done.sm_done)]


class TestHybridFences:
    """gather stream: after the producer; drain stream: after its gather; ring: after its drain."""

    def submit(self, tokens: int) -> tuple[RecordingDevice, Any]:
        device = RecordingDevice()
        # 64 KiB a token: a half of a 2 MiB ring holds 15, its alignment padding taken off.
        pool = make_pool(
            "page_first", layers=4, page_size=1, row_bytes=(8192, 8192), pages=64, device_slots=64
        )
        backend = make("hybrid", device, staging_mb=2)
        backend.prepare(pool.geometry)
        ready = (NamedEvent("forward", -1), NamedEvent("schedule", -2))
        rows = np.random.default_rng(0).permutation(64)[:tokens]
        expected = pool.expected(np.arange(tokens), rows)
        done = backend.submit(transfer_of(pool, np.arange(tokens), rows, ready), "d2h")
        for got, want in zip(pool.host, expected, strict=True):
            np.testing.assert_array_equal(got, want)
        return device, done

    def test_the_gather_waits_for_the_producer_and_for_nothing_else(self) -> None:
        device, _ = self.submit(8)
        gather, _drain = "background1", "background2"
        assert [entry[0] for entry in device.on(gather)] == ["wait", "wait", "gather", "record"]
        assert [entry[2].stream for entry in device.on(gather)[:2]] == ["forward", "schedule"]

    def test_the_forward_fence_is_after_the_last_gather_not_after_the_drain(self) -> None:
        device, done = self.submit(64)
        gathers = [i for i, entry in enumerate(device.log) if entry[0] == "gather"]
        assert len(gathers) == 5
        assert done.sm_done.stream == "background1"
        assert device.log.index(("record", "background1", done.sm_done)) == gathers[-1] + 1

    def test_every_drain_waits_for_its_gather(self) -> None:
        device, _ = self.submit(64)
        drain = device.on("background2")
        copies = [i for i, entry in enumerate(drain) if entry[0] == "copy"]
        assert len(copies) == 5
        for position in copies:
            assert drain[position - 1][0] == "wait"
            assert drain[position - 1][2].stream == "background1"

    def test_a_half_is_filled_again_only_after_its_drain(self) -> None:
        device, _ = self.submit(64)
        drained = [entry[2] for entry in device.on("background2") if entry[0] == "record"]
        waits = [entry[2] for entry in device.on("background1") if entry[0] == "wait"]
        # Two producer events, then the drains of chunks 0, 1 and 2 before chunks 2, 3 and 4.
        assert waits[2:] == drained[:3]

    def test_the_transfer_stream_waits_for_the_last_drain(self) -> None:
        device, _ = self.submit(64)
        assert device.log[-1][:2] == ("wait", "d2h")
        assert device.log[-1][2].stream == "background2"
        last_copy = max(i for i, entry in enumerate(device.log) if entry[0] == "copy")
        assert device.log[-1][2].index > last_copy

    def test_nothing_to_copy_enqueues_no_work(self) -> None:
        device, done = self.submit(0)
        assert done.sm_done is None
        assert not [entry for entry in device.log if entry[0] in ("gather", "copy")]


@pytest.mark.parametrize("name", ["copy_engine", "fenced_kernel"])
def test_page_head_is_refused_with_a_reason(name: str) -> None:
    pool = make_pool("page_head", layers=2, page_size=4, row_bytes=(16, 16), heads=2)
    assert "page_head" in (make(name, RecordingDevice()).supports(pool.geometry) or "")


def test_hybrid_says_when_a_page_does_not_fit_its_ring() -> None:
    pool = make_pool("page_first_direct", layers=4, page_size=64, row_bytes=(8192, 8192))
    reason = make("hybrid", RecordingDevice(), staging_mb=1).supports(pool.geometry)
    assert reason is not None
    assert "raise staging_mb" in reason
