"""What is asked of the CUDA driver, against a stand-in library that moves bytes for real.

Run by test_driver.py in a process that loads the stand-in as libcuda.so.1.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pools import MemoryPool, make_pool
from strategies import pools, writes

from sglang_hicache.io_backends import CopyBatch, direct_copies
from sglang_hicache.io_backends.device.base import DeviceUnavailableError
from sglang_hicache.io_backends.device.copy_interleaving import InterleavedCopies
from sglang_hicache.io_backends.device.driver import CopyRefusedError, Driver, DriverError
from sglang_hicache.io_backends.device.host_memory import UnknownHostMemoryError

STREAM = 0x5EED
BATCH, SINGLE = 1, 2
STREAM_ORDER = 1
PREFER_OVERLAP = 1


class Call(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "kind",
            "stream",
            "count",
            "order",
            "attribute_count",
            "attribute_index",
            "flags",
            "nbytes",
        )
    )


class Fake:
    """The stand-in's controls and its record."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.fake_calls.restype = ctypes.POINTER(Call)
        self._library.fake_register.argtypes = (ctypes.c_uint64,) * 3
        self._library.fake_set.argtypes = (ctypes.c_char_p, ctypes.c_longlong)

    def reset(self) -> None:
        self._library.fake_reset()
        self._streams = self._library.fake_stream_count()

    def set(self, **values: int) -> None:
        for key, value in values.items():
            assert self._library.fake_set(key.encode(), value) == 0, key

    def register(self, start: int, nbytes: int, shift: int = 0) -> None:
        self._library.fake_register(start, nbytes, shift)

    @property
    def priorities(self) -> list[int]:
        """Of the streams made since the reset."""
        library = self._library
        return [
            library.fake_stream_priority(nth) for nth in range(self._streams, library.fake_stream_count())
        ]

    @property
    def calls(self) -> list[Call]:
        return list(self._library.fake_calls()[: self._library.fake_call_count()])


@pytest.fixture
def fake() -> Iterator[Fake]:
    fake = Fake()
    fake.reset()
    yield fake
    fake.reset()


def rows(count: int, nbytes: int = 8) -> tuple[np.ndarray, np.ndarray, CopyBatch]:
    """(source, destination, batch): ``count`` copies that reverse the rows' order."""
    source = np.random.default_rng(count).integers(0, 256, (count, nbytes), dtype=np.uint8)
    target = np.zeros_like(source)
    step = np.arange(count, dtype=np.uint64) * np.uint64(nbytes)
    batch = CopyBatch(
        dst=np.uint64(target.ctypes.data) + step[::-1],
        src=np.uint64(source.ctypes.data) + step,
        nbytes=np.full(count, nbytes, dtype=np.uint64),
    )
    return source, target, batch


class TestBatch:
    def test_one_call_with_one_attribute_in_stream_order(self, fake: Fake) -> None:
        source, target, batch = rows(32)
        Driver().copy(batch, STREAM)
        np.testing.assert_array_equal(target, source[::-1])
        (call,) = fake.calls
        assert (call.kind, call.stream, call.count) == (BATCH, STREAM, 32)
        assert (call.order, call.attribute_count, call.attribute_index) == (STREAM_ORDER, 1, 0)
        assert call.flags == PREFER_OVERLAP
        fake.reset()
        Driver(prefer_overlap=False).copy(batch, STREAM)
        assert fake.calls[0].flags == 0

    @pytest.mark.parametrize("version", [12_080, 12_090, 13_000, 13_010])
    def test_the_same_form_of_the_call_on_cuda_12_and_13(self, fake: Fake, version: int) -> None:
        fake.set(version=version)
        _, _, batch = rows(3)
        driver = Driver()
        assert driver.batched
        driver.copy(batch, STREAM)
        assert [call.kind for call in fake.calls] == [BATCH]

    @pytest.mark.parametrize("count", [1, 16, 17, 32, 33])
    def test_a_call_takes_no_more_than_the_cap(self, fake: Fake, count: int) -> None:
        source, target, batch = rows(count)
        Driver(max_copies_per_call=16).copy(batch, STREAM)
        np.testing.assert_array_equal(target, source[::-1])
        sizes = [call.count for call in fake.calls]
        assert sum(sizes) == count
        assert max(sizes) <= 16

    def test_by_default_a_call_is_short_enough_for_the_engine_to_start_early(self, fake: Fake) -> None:
        source, target, batch = rows(60_000)
        Driver().copy(batch, STREAM)
        np.testing.assert_array_equal(target, source[::-1])
        sizes = [call.count for call in fake.calls]
        assert sizes[:5] == [32, 64, 128, 256, 256]
        assert set(sizes[4:-1]) == {256}

    def test_threads_do_not_share_what_the_driver_reads(self, fake: Fake) -> None:
        """A call lets other threads run."""
        driver = Driver()
        with ThreadPoolExecutor(1) as other:
            theirs = other.submit(lambda: driver._scratch.addresses).result()
            assert not set(theirs) & set(driver._scratch.addresses)

    def test_empty_entries_are_left_out(self, fake: Fake) -> None:
        source, target, batch = rows(10)
        batch.nbytes[::2] = 0
        Driver().copy(batch, STREAM)
        np.testing.assert_array_equal(target[::-1][1::2], source[1::2])
        assert not target[::-1][::2].any()
        assert [call.count for call in fake.calls] == [5]

    @pytest.mark.parametrize("count", [0, 4])
    def test_nothing_to_copy_calls_nothing(self, fake: Fake, count: int) -> None:
        _, _, batch = rows(count)
        batch.nbytes[:] = 0
        Driver().copy(batch, 0)
        assert fake.calls == []

    def test_arrays_with_gaps_are_read_right(self, fake: Fake) -> None:
        source, target, batch = rows(10)
        Driver().copy(CopyBatch(batch.dst[::2], batch.src[::2], batch.nbytes[::2]), STREAM)
        np.testing.assert_array_equal(target[::-1][::2], source[::2])
        assert not target[::-1][1::2].any()

    def test_read_only_arrays_are_read_right(self, fake: Fake) -> None:
        source, target, batch = rows(10)
        for array in (batch.dst, batch.src, batch.nbytes):
            array.flags.writeable = False
        Driver().copy(batch, STREAM)
        np.testing.assert_array_equal(target, source[::-1])


class TestRefusals:
    @pytest.mark.parametrize("stream", [0, 1])
    @pytest.mark.parametrize("version", [12_040, 13_000])
    def test_the_legacy_null_stream(self, fake: Fake, stream: int, version: int) -> None:
        fake.set(version=version)
        _, target, batch = rows(3)
        with pytest.raises(CopyRefusedError, match="NULL stream"):
            Driver().copy(batch, stream)
        assert fake.calls == []
        assert not target.any()

    @pytest.mark.parametrize("status", [1, 2], ids=["active", "invalidated"])
    @pytest.mark.parametrize("version", [12_040, 13_000])
    def test_graph_capture_before_anything_is_enqueued(self, fake: Fake, status: int, version: int) -> None:
        fake.set(capturing=status, version=version)
        _, target, batch = rows(3)
        with pytest.raises(CopyRefusedError, match="graph is being captured"):
            Driver(max_copies_per_call=1).copy(batch, STREAM)
        assert fake.calls == []
        assert not target.any()

    def test_a_cap_below_one(self, fake: Fake) -> None:
        with pytest.raises(ValueError, match="max_copies_per_call must be at least 1, not 0"):
            Driver(max_copies_per_call=0)

    def test_a_driver_that_does_not_start(self, fake: Fake) -> None:
        fake.set(init=100)
        with pytest.raises(DeviceUnavailableError, match=r"cuInit failed with 100 \(CUDA_ERROR_NO_DEVICE\)"):
            Driver()


class TestErrors:
    def test_the_message_names_call_code_and_entry(self, fake: Fake) -> None:
        fake.set(fail_call=2, fail_code=700, fail_entry=1)
        _, _, batch = rows(10)
        with pytest.raises(DriverError) as caught:
            Driver(max_copies_per_call=4).copy(batch, STREAM)
        error = caught.value
        assert (error.call, error.code, error.index) == ("cuMemcpyBatchAsync", 700, 5)
        assert error.name == "CUDA_ERROR_ILLEGAL_ADDRESS"
        assert "failed with 700 (CUDA_ERROR_ILLEGAL_ADDRESS) at copy 5 of 10: 8 bytes from 0x" in str(error)
        assert f"{int(batch.dst[5]):#x}" in str(error)
        assert len(fake.calls) == 2, "went on after a call that failed"

    def test_an_error_of_no_entry_in_particular(self, fake: Fake) -> None:
        fake.set(fail_call=1, fail_code=999)
        _, _, batch = rows(10)
        with pytest.raises(DriverError, match=r"999 \(CUDA_ERROR_UNKNOWN\), one of 10 copies") as caught:
            Driver().copy(batch, STREAM)
        assert caught.value.index is None

    def test_a_code_that_is_not_in_cuda_python(self, fake: Fake) -> None:
        fake.set(fail_call=1, fail_code=123_456)
        with pytest.raises(DriverError, match=r"123456 \(a code that this cuda-python does not know\)"):
            Driver().copy(rows(1)[2], STREAM)

    def test_a_single_copy_that_fails(self, fake: Fake) -> None:
        fake.set(version=12_040, fail_call=3, fail_code=1)
        with pytest.raises(DriverError, match=r"cuMemcpyAsync failed with 1 .* at copy 2 of 10"):
            Driver().copy(rows(10)[2], STREAM)
        assert len(fake.calls) == 3

    def test_the_capture_query_itself(self, fake: Fake) -> None:
        fake.set(status_code=201)
        with pytest.raises(DriverError, match=r"cuStreamIsCapturing .* 201 \(CUDA_ERROR_INVALID_CONTEXT\)"):
            Driver().copy(rows(1)[2], STREAM)
        assert fake.calls == []

    def test_an_entry_across_two_registrations_fails_unless_cut(self, fake: Fake) -> None:
        """As the real driver does; CudaDevice cuts it."""
        _, target, batch = rows(1, nbytes=64)
        fake.register(target.ctypes.data, 24)
        fake.register(target.ctypes.data + 24, 40)
        with pytest.raises(DriverError, match="at copy 0 of 1"):
            Driver().copy(batch, STREAM)


class TestOldDriver:
    def test_copies_one_by_one_and_says_so_once(self, fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
        fake.set(version=12_040)
        source, target, batch = rows(20)
        batch.nbytes[3] = 0
        with caplog.at_level(logging.WARNING):
            driver = Driver()
            driver.copy(batch, STREAM)
            driver.copy(batch, STREAM)
        assert not driver.batched
        (message,) = [record.getMessage() for record in caplog.records]
        assert "driver for CUDA 12.4 has no cuMemcpyBatchAsync" in message
        assert [(call.kind, call.stream) for call in fake.calls] == [(SINGLE, STREAM)] * 38
        expected = source[::-1].copy()
        expected[-4] = 0
        np.testing.assert_array_equal(target, expected)


class FakeTorch:
    """As much of torch as CudaDevice touches without a tensor; writes down what it is asked for.

    Attributes:
        failing_waits: streams that cannot be made to wait.
        free: bytes of GPU memory.
        synchronized: streams that the host waited for.
        times: between timed events, ms.
        waits: (who waits, for whom, driver calls that came before the wait, and before the event).
        here: the current stream.
    """

    def __init__(self, *, available: bool = True, cuda: str | None = "13.0") -> None:
        self.version = SimpleNamespace(cuda=cuda)
        self.waits: list[tuple[int, int, int, int]] = []
        self.calls_so_far: Callable[[], int] = lambda: 0
        self.failing_waits: set[int] = set()
        self.synchronized: list[int] = []
        self.times = itertools.repeat(0.3)
        self.free = 2**40
        self.uint8 = np.uint8
        self.empty = self._empty
        torch = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.timed = enable_timing

            def record(self, stream: Any) -> None:
                self.at = (stream.cuda_stream, torch.calls_so_far())

            def synchronize(self) -> None:
                assert self.at

            def elapsed_time(self, later: Event) -> float:
                assert self.timed
                assert later.timed
                return next(torch.times)

        class Stream:
            def __init__(self, handle: int) -> None:
                self.cuda_stream = handle

            @staticmethod
            def priority_range() -> tuple[int, int]:
                return 0, -5

            def query(self) -> bool:
                return True

            def synchronize(self) -> None:
                torch.synchronized.append(self.cuda_stream)

            def wait_event(self, event: Event) -> None:
                if self.cuda_stream in torch.failing_waits:
                    raise RuntimeError("no wait")
                recorded_on, before = event.at
                torch.waits.append((self.cuda_stream, recorded_on, torch.calls_so_far(), before))

        self.here = Stream(STREAM)
        self.cuda = SimpleNamespace(
            is_available=lambda: available,
            current_device=lambda: 0,
            current_stream=lambda: self.here,
            stream=lambda stream: nullcontext(stream),
            Stream=Stream,
            ExternalStream=Stream,
            Event=Event,
        )

    def _empty(self, size: int, dtype: Any, pin_memory: bool = False, device: str = "cpu") -> Any:
        if device == "cuda" and size > self.free:
            raise RuntimeError("CUDA out of memory")
        memory = np.empty(size, dtype=dtype)
        if pin_memory:
            Fake().register(int(memory.ctypes.data), memory.nbytes)
        return SimpleNamespace(numpy=lambda: memory, data_ptr=lambda: int(memory.ctypes.data))


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    torch = FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type]
    return torch


def open_cuda() -> Any:
    from sglang_hicache.io_backends.device import open_device

    return open_device("cuda")


def turns_of(torch: FakeTorch, quantum_bytes: int, **options: int) -> InterleavedCopies:
    numbers = itertools.count(STREAM + 1)
    new_stream = lambda: torch.cuda.ExternalStream(next(numbers))  # noqa: E731
    return InterleavedCopies(torch.cuda.Event, Driver(**options), new_stream, quantum_bytes)


class TestTurns:
    """Copies of others to the host get the engine only where a stream waits for another's turn."""

    @pytest.fixture
    def torch(self, fake: Fake) -> FakeTorch:
        torch = FakeTorch()
        torch.calls_so_far = lambda: len(fake.calls)
        return torch

    @staticmethod
    def bytes_in_a_row(fake: Fake, torch: FakeTorch) -> list[int]:
        """Bytes of each turn; checks that turns follow each other, from STREAM back to STREAM."""
        now, before, turns = STREAM, 0, []
        for waiting, recorded_on, call, recorded in [
            *torch.waits,
            (0, STREAM, len(fake.calls), len(fake.calls)),
        ]:
            assert recorded_on == now, "who goes on does not wait for whose turn it was"
            assert recorded == call, "the event misses copies of the turn"
            assert {each.stream for each in fake.calls[before:call]} <= {now}
            turns.append(sum(each.nbytes for each in fake.calls[before:call]))
            now, before = waiting, call
        return turns

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        # Below and above 16 entries, where Python goes through them and where numpy does.
        st.lists(st.lists(st.integers(0, 50), max_size=40), min_size=1, max_size=4),
        st.integers(1, 120),
        st.sampled_from([12_040, 13_000]),
    )
    def test_the_same_bytes_and_never_more_than_a_turn_at_once(
        self, fake: Fake, writes: list[list[int]], most: int, version: int
    ) -> None:
        fake.reset()
        fake.set(version=version)
        torch = FakeTorch()
        torch.calls_so_far = lambda: len(fake.calls)
        turns = turns_of(torch, most)
        for sizes in writes:
            nbytes = np.array(sizes, dtype=np.uint64)
            ends = np.cumsum(nbytes, dtype=np.uint64)
            source = np.random.default_rng(len(sizes)).integers(1, 256, sum(sizes), dtype=np.uint8)
            target = np.zeros_like(source)
            begins = ends - nbytes
            turns.copy(
                CopyBatch(
                    np.uint64(target.ctypes.data) + begins, np.uint64(source.ctypes.data) + begins, nbytes
                ),
                torch.here,
            )
            np.testing.assert_array_equal(target, source)
            assert not torch.waits or torch.waits[-1][0] == STREAM, "the stream does not wait for all copies"
        found = self.bytes_in_a_row(fake, torch)
        assert max(found) <= most
        assert sum(found) == sum(map(sum, writes))

    def test_a_write_within_one_turn_costs_nothing(self, fake: Fake, torch: FakeTorch) -> None:
        turns = turns_of(torch, 800)
        turns.copy(rows(100)[2], torch.here)
        assert torch.waits == []
        turns.copy(rows(1)[2], torch.here)
        assert [waiting for waiting, *_ in torch.waits] == [STREAM + 1, STREAM], "turns go on over writes"

    def test_each_stream_has_turns_of_its_own(self, fake: Fake, torch: FakeTorch) -> None:
        turns = turns_of(torch, 400)
        other = torch.cuda.ExternalStream(STREAM + 9)
        turns.copy(rows(40)[2], torch.here)
        turns.copy(rows(40)[2], other)
        assert torch.waits == []

    @pytest.mark.parametrize("entries", [12, 100])
    def test_only_the_first_call_of_a_write_is_short(
        self, fake: Fake, torch: FakeTorch, entries: int
    ) -> None:
        """The engine is busy by the second turn."""
        turns_of(torch, 8 * entries // 2).copy(rows(entries)[2], torch.here)
        assert [call.count for call in fake.calls] == ([1] * 12 if entries == 12 else [32, 18, 50])

    @pytest.mark.parametrize("entries", [12, 100])
    @pytest.mark.parametrize("failing", [1, 2, 3, 5, 6, 9])
    def test_after_an_error_the_stream_waits_for_what_was_enqueued(
        self, fake: Fake, torch: FakeTorch, entries: int, failing: int
    ) -> None:
        turns = turns_of(torch, 8 * 4, max_copies_per_call=4)
        fake.set(fail_call=failing, fail_code=700)
        with pytest.raises(DriverError, match=r"8 bytes from 0x|one of"):
            turns.copy(rows(entries)[2], torch.here)
        self.bytes_in_a_row(fake, torch)
        assert not torch.waits or torch.waits[-1][0] == STREAM

    @pytest.mark.parametrize("failing", [7, 60])
    def test_an_old_driver_names_the_copy_of_the_write_that_it_refused(
        self, fake: Fake, torch: FakeTorch, failing: int
    ) -> None:
        """Whichever turn it was in."""
        fake.set(version=12_040)
        turns = turns_of(torch, 8 * 50)
        fake.set(fail_call=failing, fail_code=700)
        with pytest.raises(DriverError, match=f"at copy {failing - 1} of 100: 8 bytes"):
            turns.copy(rows(100)[2], torch.here)

    @pytest.mark.parametrize(("entries", "a_turn"), [(8, 5), (18, 12)])
    def test_where_the_stream_cannot_be_made_to_wait_the_host_does(
        self, fake: Fake, torch: FakeTorch, entries: int, a_turn: int
    ) -> None:
        turns = turns_of(torch, 8 * a_turn)
        torch.failing_waits = {STREAM}
        with pytest.raises(RuntimeError, match="no wait"):
            turns.copy(rows(entries)[2], torch.here)
        assert torch.synchronized == [STREAM + 1]
        torch.failing_waits, before = set(), len(torch.waits)
        calls = len(fake.calls)
        turns.copy(rows(entries)[2], torch.here)
        assert fake.calls[calls].stream == STREAM, "begins on a stream that waits for nothing"
        assert torch.waits[before:][-1][0] == STREAM

    def test_threads_take_their_turns_one_after_the_other(self, fake: Fake, torch: FakeTorch) -> None:
        """What one asks for is behind all that the stream was told before, whoever goes on when."""
        turns = turns_of(torch, 8)
        batches = [rows(count) for count in (60, 61, 62, 63)]
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda each: turns.copy(each[2], torch.here), batches))
        self.bytes_in_a_row(fake, torch)
        for source, target, _ in batches:
            np.testing.assert_array_equal(target, source[::-1])

    def test_a_refused_stream_is_left_alone(self, fake: Fake, torch: FakeTorch) -> None:
        turns = turns_of(torch, 8)
        fake.set(capturing=1)
        with pytest.raises(CopyRefusedError, match="graph is being captured"):
            turns.copy(rows(10)[2], torch.here)
        torch.here.cuda_stream = 0
        with pytest.raises(CopyRefusedError, match="NULL stream"):
            turns.copy(rows(10)[2], torch.here)
        assert (fake.calls, torch.waits) == ([], [])

    def test_a_turn_below_one_byte(self, torch: FakeTorch) -> None:
        with pytest.raises(ValueError, match="quantum_bytes must be at least 1, not 0"):
            turns_of(torch, 0)


def registrations(pool: MemoryPool, every: int) -> list[tuple[int, int]]:
    """The host buffers in pieces of ``every`` bytes, as SGLang registers them."""
    pieces = []
    for buffer in pool.host:
        for offset in range(0, buffer.nbytes, every):
            pieces.append((int(buffer.ctypes.data) + offset, min(every, buffer.nbytes - offset)))
    return pieces


class TestDevice:
    @pytest.mark.parametrize(
        ("options", "message"),
        [({"available": False}, "nvidia-smi"), ({"cuda": None}, "not built for CUDA")],
    )
    def test_no_gpu_is_one_sentence(
        self, fake: Fake, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", FakeTorch(**options))  # type: ignore[arg-type]
        with pytest.raises(DeviceUnavailableError, match=message):
            open_cuda()

    def test_background_streams_have_the_lowest_priority(self, fake: Fake, torch: FakeTorch) -> None:
        open_cuda().new_stream()
        assert fake.priorities == [0]

    def test_the_stream_that_the_host_waits_for_has_the_highest(self, fake: Fake, torch: FakeTorch) -> None:
        pool = make_pool("page_first", layers=2, page_size=4, row_bytes=(16,))
        for start, nbytes in registrations(pool, 2**30):
            fake.register(start, nbytes)
        open_cuda().prepare_copies(pool.geometry)
        assert fake.priorities[0] == -5

    def test_streams_are_nobody_elses(self, fake: Fake, torch: FakeTorch) -> None:
        """Not out of torch's pool, which hands out each of its streams again and again."""
        device = open_cuda()
        assert len({device.new_stream().cuda_stream for _ in range(100)}) == 100

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_moves_exactly_these_rows_whatever_was_registered(
        self, fake: Fake, torch: FakeTorch, data: st.DataObject
    ) -> None:
        fake.reset()
        pool = data.draw(pools())
        host, device_slots = data.draw(writes(pool))
        # WSL2: the GPU sees registered memory under another address.
        shift = data.draw(st.sampled_from([0, 1 << 40]))
        fake.set(host_pointers=int(not shift))
        smallest = max(1, max(buffer.nbytes for buffer in pool.host) // 20)
        pieces = registrations(pool, data.draw(st.integers(smallest, 20 * smallest)))
        for start, nbytes in pieces:
            fake.register(start, nbytes, shift)
        expected = pool.expected(host, device_slots)
        device = open_cuda()
        device.prepare_copies(pool.geometry, pieces)
        device.copy(direct_copies(pool.geometry, host, device_slots), torch.here)
        for got, want in zip(pool.host, expected, strict=True):
            np.testing.assert_array_equal(got, want)

    def test_without_registrations_a_buffer_is_taken_as_one(self, fake: Fake, torch: FakeTorch) -> None:
        pool = make_pool("page_first", layers=2, page_size=4, row_bytes=(16, 16))
        for start, nbytes in registrations(pool, 2**30):
            fake.register(start, nbytes)
        device = open_cuda()
        device.prepare_copies(pool.geometry)
        before = len(fake.calls)
        device.copy(direct_copies(pool.geometry, np.arange(4), np.arange(4)), torch.here)
        assert len(fake.calls) == before + 1

    @pytest.mark.parametrize(
        ("times", "free", "turn"),
        [
            ([1, 0.5, 0.3, 0.31, 0.4], 2**40, int(2**24 / 0.3e-3 * 0.6e-3)),
            ([1e-9] * 5, 2**40, 256 * 2**20),  # no clock is that good
            ([1000.0] * 5, 2**40, 8 * 2**20),
            ([], 2**20, 32 * 2**20),
        ],
        ids=["the fastest counts", "no time", "a link that is busy", "no memory"],
    )
    def test_turns_take_as_long_on_any_link(
        self, fake: Fake, torch: FakeTorch, times: list[float], free: int, turn: int
    ) -> None:
        torch.times, torch.free = iter(times), free
        pool = make_pool("page_first", layers=2, page_size=4, row_bytes=(16,))
        for start, nbytes in registrations(pool, 2**30):
            fake.register(start, nbytes)
        device = open_cuda()
        device.prepare_copies(pool.geometry)
        assert device.quantum_bytes == turn
        # Once: copies of the first pool may be under way by now.
        device.prepare_copies(pool.geometry)
        assert device.quantum_bytes == turn

    def test_pageable_memory_is_refused_before_serving(self, fake: Fake, torch: FakeTorch) -> None:
        pool = make_pool("page_first", layers=2, page_size=4, row_bytes=(16, 16))
        fake.register(int(pool.host[0].ctypes.data), pool.host[0].nbytes)
        with pytest.raises(DeviceUnavailableError, match=r"pool kv at 0x\w+ is pageable"):
            open_cuda().prepare_copies(pool.geometry)

    def test_a_buffer_registered_in_part_is_refused(self, fake: Fake, torch: FakeTorch) -> None:
        pool = make_pool("page_first", layers=2, page_size=4, row_bytes=(16,))
        pieces = registrations(pool, 64)
        for start, nbytes in pieces:
            fake.register(start, nbytes)
        with pytest.raises(DeviceUnavailableError, match="only partly registered"):
            open_cuda().prepare_copies(pool.geometry, [*pieces[:2], *pieces[3:]])

    def test_memory_nobody_spoke_of_is_refused_and_nothing_copied(self, fake: Fake, torch: FakeTorch) -> None:
        pool = make_pool("page_first", layers=2, page_size=4, row_bytes=(16,))
        with pytest.raises(UnknownHostMemoryError, match="prepare_copies"):
            open_cuda().copy(direct_copies(pool.geometry, np.arange(4), np.arange(4)), torch.here)
        assert fake.calls == []
