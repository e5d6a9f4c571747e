"""Each backend on its own: the right bytes, only enqueued, and the fences its contract names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import MemoryPool, indices_of, make_pool
from strategies import stepped_pools, whole_writes, writes

from sglang_hicache.io_backends import Backend, Transfer, get_backend
from sglang_hicache.io_backends.device.cpu import CpuDevice
from sglang_hicache.io_backends.interface import OptionsError
from sglang_hicache.io_backends.plan.chunks import STAGING_ALIGNMENT, RingRoom
from sglang_hicache.io_backends.plan.ring import ANY_GAP, Ring
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
    done: set[Any] | None = None
    """Events that are complete; None: all."""

    def __post_init__(self) -> None:
        super().__init__()
        self.streams = 0
        self.filled: list[tuple[int, int]] = []
        self.ctas: list[int] = []

    def new_stream(self) -> str:  # type: ignore[override]
        self.streams += 1
        return f"background{self.streams}"

    def record(self, stream: Any) -> NamedEvent:  # type: ignore[override]
        event = NamedEvent(stream, len(self.log))
        self.log.append(("record", stream, event))
        return event

    def wait(self, stream: Any, event: Any) -> None:
        self.log.append(("wait", stream, event))

    def query(self, event: Any) -> bool:
        return self.done is None or event in self.done

    def gather(self, staged: Any, base: int, slots: Any, chunk: Any, stream: Any, ctas: int) -> None:
        self.log.append(("gather", stream, chunk.tokens))
        self.filled.append((base, base + staged.nbytes))
        self.ctas.append(ctas)
        super().gather(staged, base, slots, chunk, stream, ctas)

    def copy(self, batch: Any, stream: Any) -> None:
        self.log.append(("copy", stream, len(batch)))
        super().copy(batch, stream)

    def on(self, stream: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self.log if entry[1] == stream]


def transfer_of(
    pool: MemoryPool, host: np.ndarray, device: np.ndarray, ready: tuple[Any, ...], *, wait: bool = False
) -> Transfer:
    return Transfer(
        geometry=pool.geometry,
        host_slots=host,
        device_slots=indices_of(pool.geometry, device),
        ready=ready,
        indices_ready=None,
        forwards_wait=wait,
        upstream_copy=lambda: pytest.fail("not on the CPU"),
    )


def make(name: str, device: RecordingDevice, **options: Any) -> Backend:
    backend = get_backend(name)(device, options)
    assert isinstance(backend, Backend)
    return backend


@pytest.mark.parametrize("name", OWN_NAMES)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_moves_exactly_these_rows(name: str, data: st.DataObject) -> None:
    pool = data.draw(stepped_pools(LAYOUTS_OF_ALL))
    host, rows = data.draw((whole_writes if name == "hybrid" else writes)(pool))
    backend = make(name, RecordingDevice(), staging_mb=1)
    assert backend.supports(pool.geometry) is None
    backend.prepare(pool.geometry)
    expected = pool.expected(host, rows)
    done = backend.submit(transfer_of(pool, host, rows, ()), "d2h")
    assert done.nbytes == len(host) * pool.geometry.bytes_per_token
    for got, want in zip(pool.host, expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("options", "wait", "ctas"), [({}, False, 64), ({}, True, 192), ({"gather_ctas": 8}, True, 8)]
)
def test_a_gather_that_forwards_wait_for_has_all_sms(options: dict[str, int], wait: bool, ctas: int) -> None:
    pool = make_pool("page_first", layers=2, page_size=4, row_bytes=(16, 16))
    device = RecordingDevice()
    backend = make("hybrid", device, staging_mb=1, **options)
    backend.prepare(pool.geometry)
    rows = np.arange(4)
    backend.submit(transfer_of(pool, rows, rows, (), wait=wait), "d2h")
    assert set(device.ctas) == {ctas}


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
    assert device.log == [("copy", "d2h", 2), ("copy", "d2h", 2)], "K is on its way while V is planned"
    assert done.copies == 4
    assert done.nbytes == 8 * pool.geometry.bytes_per_token


@pytest.mark.parametrize("name", ["copy_engine", "hybrid"])
def test_max_copies_per_batch_cuts_batches_and_loses_nothing(name: str) -> None:
    device = RecordingDevice()
    pool = make_pool("layer_first", layers=5, page_size=4, row_bytes=(16, 16))
    backend = make(name, device, staging_mb=1, max_copies_per_batch=3)
    backend.prepare(pool.geometry)
    expected = pool.expected(np.arange(8), np.arange(8))
    assert backend.submit(transfer_of(pool, np.arange(8), np.arange(8), ()), "d2h").copies == 10
    sizes = {"copy_engine": [3, 2, 3, 2], "hybrid": [3, 3, 3, 1]}  # K and V apart, and together
    assert [entry[2] for entry in device.log if entry[0] == "copy"] == sizes[name]
    for got, want in zip(pool.host, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_fenced_kernel_calls_sglangs_kernel_and_records_its_end_after_it() -> None:
    device = RecordingDevice(name="cuda")
    pool = make_pool("layer_first", layers=2, page_size=4, row_bytes=(16, 16))
    transfer = replace(
        transfer_of(pool, np.arange(8), np.arange(8), ()),
        upstream_copy=lambda: device.log.append(("kernel", "d2h", 1)),
    )
    done = make("fenced_kernel", device).submit(transfer, "d2h")
    assert device.log == [("kernel", "d2h", 1), ("record", "d2h", done.sm_done)]


def test_fenced_kernel_takes_no_more_blocks_than_its_option_says() -> None:
    pool = make_pool("layer_first", layers=2, page_size=4, row_bytes=(16, 16))
    asked: list[dict[str, int]] = []
    transfer = replace(
        transfer_of(pool, np.arange(8), np.arange(8), ()), upstream_copy=lambda **limits: asked.append(limits)
    )
    for options in ({"block_quota": 4}, {}):
        make("fenced_kernel", RecordingDevice(name="cuda"), **options).submit(transfer, "d2h")
    assert asked == [{"block_quota": 4}, {}]


FORWARD, SCHEDULE = NamedEvent("forward", -1), NamedEvent("schedule", -2)
LATER = NamedEvent("forward", -3)
"""Recorded when another forward has been launched."""
GATHER, DRAIN = "background1", "background2"


class Hybrid:
    """A hybrid backend whose ring of 2 MiB takes chunks of 16 and 15 tokens; nothing drains by itself."""

    def __init__(self) -> None:
        self.device = RecordingDevice()
        self.device.done = set()
        # 64 KiB a token: two chunks hold 31 together, their alignment padding taken off.
        self.pool = make_pool(
            "page_first", layers=4, page_size=1, row_bytes=(8192, 8192), pages=64, device_slots=64
        )
        self.backend = make("hybrid", self.device, staging_mb=2)
        self.backend.prepare(self.pool.geometry)

    def submit(self, tokens: int, *, wait: bool) -> Any:
        self.rows = np.random.default_rng(0).permutation(64)[:tokens]
        self.expected = self.pool.expected(np.arange(tokens), self.rows)
        transfer = transfer_of(self.pool, np.arange(tokens), self.rows, (FORWARD, SCHEDULE), wait=wait)
        return self.backend.submit(transfer, "d2h")

    def drain_all(self) -> None:
        assert self.device.done is not None
        self.device.done |= {entry[2] for entry in self.device.on(DRAIN) if entry[0] == "record"}

    def gathers(self) -> int:
        return sum(entry[0] == "gather" for entry in self.device.log)

    def assert_copied(self) -> None:
        for got, want in zip(self.pool.host, self.expected, strict=True):
            np.testing.assert_array_equal(got, want)


class TestHybridFences:
    """gather stream: after the producer; drain stream: after its gather; ring: after its drain."""

    def test_the_gather_waits_for_the_producer_and_for_nothing_else(self) -> None:
        hybrid = Hybrid()
        hybrid.submit(16, wait=False)
        assert [entry[0] for entry in hybrid.device.on(GATHER)] == ["wait", "wait", "gather", "record"]
        assert [entry[2] for entry in hybrid.device.on(GATHER)[:2]] == [FORWARD, SCHEDULE]

    @pytest.mark.parametrize(("tokens", "wait", "gathers"), [(47, False, 3), (30, True, 2)])
    def test_the_forward_fence_is_after_the_last_gather_not_after_the_drain(
        self, tokens: int, wait: bool, gathers: int
    ) -> None:
        hybrid = Hybrid()
        done = hybrid.submit(tokens, wait=wait)
        log = hybrid.device.log
        assert hybrid.gathers() == gathers
        last = max(i for i, entry in enumerate(log) if entry[0] == "gather")
        assert done.sm_done.stream == GATHER
        assert log.index(("record", GATHER, done.sm_done)) == last + 1

    def test_every_drain_waits_for_its_gather(self) -> None:
        hybrid = Hybrid()
        hybrid.submit(64, wait=False)
        drain = hybrid.device.on(DRAIN)
        copies = [i for i, entry in enumerate(drain) if entry[0] == "copy"]
        assert len(copies) == 5
        for position in copies:
            assert drain[position - 1][0] == "wait"
            assert drain[position - 1][2].stream == GATHER

    def test_the_transfer_stream_waits_for_the_last_drain(self) -> None:
        hybrid = Hybrid()
        hybrid.submit(31, wait=False)
        log = hybrid.device.log
        assert log[-1][:2] == ("wait", "d2h")
        assert log[-1][2].stream == DRAIN
        assert log[-1][2].index > max(i for i, entry in enumerate(log) if entry[0] == "copy")

    def test_nothing_to_copy_enqueues_no_work(self) -> None:
        hybrid = Hybrid()
        done = hybrid.submit(0, wait=False)
        assert done.sm_done is None
        assert done.pending is None
        assert not [entry for entry in hybrid.device.log if entry[0] in ("gather", "copy")]


class TestWriteLargerThanTheRing:
    """64 tokens are 5 chunks; the ring takes 2."""

    def test_where_no_forward_waits_a_gather_waits_for_the_drain_of_its_memory(self) -> None:
        hybrid = Hybrid()
        done = hybrid.submit(64, wait=False)
        assert done.pending is None
        assert hybrid.gathers() == 5
        waits = [entry[2] for entry in hybrid.device.on(GATHER) if entry[0] == "wait"]
        drained = [
            entry[2] for entry in hybrid.device.on(DRAIN) if entry[0] == "record" and entry[2] in waits
        ]
        assert waits[2:] == drained
        assert len(drained) == 3
        hybrid.assert_copied()

    @pytest.mark.parametrize("tokens", [31, 47, 48, 50, 64])
    def test_memory_is_filled_again_only_behind_its_drain(self, tokens: int) -> None:
        """Also where neighbouring chunks are not of one size."""
        hybrid = Hybrid()
        hybrid.submit(tokens, wait=False)
        log, filled = hybrid.device.log, hybrid.device.filled
        gathers = [i for i, entry in enumerate(log) if entry[0] == "gather"]
        copies = [i for i, entry in enumerate(log) if entry[0] == "copy"]
        for later, (start, stop) in enumerate(filled):
            waited = [
                entry[2].index
                for entry in log[: gathers[later]]
                if entry[:2] == ("wait", GATHER) and entry[2].stream == DRAIN
            ]
            for earlier, (begin, end) in enumerate(filled[:later]):
                if begin < stop and start < end:
                    assert max(waited, default=-1) > copies[earlier]
        hybrid.assert_copied()

    def test_where_forwards_wait_nothing_that_they_wait_for_waits_for_the_link(self) -> None:
        hybrid = Hybrid()
        done = hybrid.submit(64, wait=True)
        assert hybrid.gathers() == 2
        assert {entry[2].stream for entry in hybrid.device.on(GATHER) if entry[0] == "wait"} == {
            "forward",
            "schedule",
        }
        assert not done.pending.enqueued()
        # The transfer stream is not told to wait for a part: its completion would come too early.
        assert not hybrid.device.on("d2h")

    @pytest.mark.parametrize("how", ["drained", "launched"])
    def test_later_gaps_take_the_rest_of_drained_memory_and_of_what_had_a_forwards_time(
        self, how: str
    ) -> None:
        hybrid = Hybrid()
        done = hybrid.submit(64, wait=True)
        finished: list[int] = []
        done.pending.then(lambda: finished.append(hybrid.gathers()))
        later = NamedEvent("forward", -3)
        assert not done.pending.can_advance()
        assert done.pending.advance((later,)) is None
        assert hybrid.gathers() == 2
        # A poll that finds no memory leaves nothing on the streams: there may be thousands of them.
        assert ("wait", GATHER, later) not in hybrid.device.log

        def free() -> None:
            if how == "drained":
                hybrid.drain_all()
            else:
                hybrid.backend.launched()  # type: ignore[attr-defined]

        free()
        assert done.pending.can_advance()
        gathered = done.pending.advance((later,))
        assert hybrid.gathers() == 4
        assert gathered.stream == GATHER
        assert ("wait", GATHER, later) in hybrid.device.log
        assert finished == []
        free()
        done.pending.advance((later,))
        assert hybrid.gathers() == 5
        assert finished == [5]
        assert done.pending.enqueued()
        assert hybrid.device.log[-1][:2] == ("wait", "d2h")
        assert not done.pending.can_advance()
        assert done.pending.advance((later,)) is None
        waits = [entry[2] for entry in hybrid.device.on(GATHER) if entry[0] == "wait"]
        assert any(event.stream == DRAIN for event in waits) == (how == "launched")
        hybrid.assert_copied()

    def test_host_slots_are_the_callers_again_after_the_submission(self) -> None:
        """Also where nothing of the write was enqueued yet."""
        hybrid = Hybrid()
        rows = np.random.default_rng(0).permutation(64)
        hosts = [np.roll(np.arange(32), 1) + first for first in (32, 0)]  # of two runs each
        hybrid.expected = hybrid.pool.expected(np.concatenate(hosts), rows)
        for host, part in zip(hosts, (rows[:32], rows[32:]), strict=True):
            transfer = transfer_of(hybrid.pool, host, part, (FORWARD,), wait=True)
            done = hybrid.backend.submit(transfer, "d2h")
            host[:] = 0
        assert hybrid.gathers() == 3, "the second write found no room in the ring"
        done.pending.advance((LATER,), wait=True)
        hybrid.assert_copied()

    def test_a_host_index_out_of_range_is_refused_at_once_also_when_the_ring_is_full(self) -> None:
        hybrid = Hybrid()
        first = hybrid.submit(64, wait=True)
        transfer = transfer_of(hybrid.pool, np.array([3, 64]), np.arange(2), (FORWARD,), wait=True)
        with pytest.raises(ValueError, match=r"host index 64 .* outside 0\.\.63"):
            hybrid.backend.submit(transfer, "d2h")
        first.pending.advance((LATER,), wait=True)
        hybrid.assert_copied()
        assert first.pending.enqueued()

    def test_a_refused_write_gives_its_staging_back(self) -> None:
        hybrid = Hybrid()
        transfer = transfer_of(hybrid.pool, np.array([3, 64]), np.arange(2), (FORWARD,), wait=True)
        with pytest.raises(ValueError, match="host index 64"):
            hybrid.backend.submit(transfer, "d2h")
        assert not any(entry[0] == "copy" for entry in hybrid.device.log)
        hybrid.drain_all()
        assert hybrid.submit(31, wait=True).pending is None
        hybrid.assert_copied()

    def test_whoever_waits_has_the_rest_enqueued_at_once_behind_the_forward_of_now(self) -> None:
        hybrid = Hybrid()
        done = hybrid.submit(64, wait=True)
        before = len(hybrid.device.log)
        done.pending.advance((LATER,), wait=True)
        assert done.pending.enqueued()
        assert hybrid.gathers() == 5
        hybrid.assert_copied()
        later = [entry for entry in hybrid.device.log[before:] if entry[1] == GATHER]
        assert later[0] == ("wait", GATHER, LATER)

    def test_what_waits_is_what_is_not_enqueued(self) -> None:
        hybrid = Hybrid()
        backend: Any = hybrid.backend
        first, second = hybrid.submit(64, wait=True), hybrid.submit(7, wait=True)
        gathered = sum(entry[2] for entry in hybrid.device.log if entry[0] == "gather")
        assert 0 < gathered < 64
        assert backend.waiting_bytes == (64 - gathered + 7) * hybrid.pool.geometry.bytes_per_token
        first.pending.advance((LATER,), wait=True)
        assert backend.waiting_bytes == 7 * hybrid.pool.geometry.bytes_per_token
        second.pending.advance((LATER,), wait=True)
        assert backend.waiting_bytes == 0

    def test_a_second_write_queues_behind_the_first(self) -> None:
        hybrid = Hybrid()
        first = hybrid.submit(64, wait=True)
        second = hybrid.submit(7, wait=True)
        assert second.sm_done is None
        assert second.pending is not None
        second.pending.advance((LATER,), wait=True)
        assert first.pending.enqueued()
        assert hybrid.gathers() == 6

    def test_it_stops_behind_the_write_that_somebody_waits_for_and_gives_its_gather(self) -> None:
        hybrid = Hybrid()
        first = hybrid.submit(64, wait=True)
        second = hybrid.submit(7, wait=True)
        gathered = first.pending.advance((LATER,), wait=True)
        assert first.pending.enqueued()
        assert not second.pending.enqueued()
        assert gathered.stream == GATHER
        assert first.pending.advance((LATER,), wait=True) is None

    def test_a_write_that_failed_half_way_never_reads_as_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hybrid = Hybrid()
        first = hybrid.submit(64, wait=True)

        def fail(batch: Any, stream: Any) -> None:
            raise RuntimeError("cuMemcpyBatchAsync failed")

        hybrid.drain_all()
        with monkeypatch.context() as patch:
            patch.setattr(hybrid.device, "copy", fail)
            with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync"):
                hybrid.submit(7, wait=True)
        for ask in (
            first.pending.enqueued,
            lambda: first.pending.advance((LATER,)),
            lambda: first.pending.advance((LATER,), wait=True),
        ):
            with pytest.raises(RuntimeError, match="failed half-way"):
                ask()
        # Nor is the write whose submission raised left to write into slots that were freed.
        hybrid.drain_all()
        gathers = hybrid.gathers()
        assert hybrid.submit(31, wait=True).pending is None
        assert hybrid.gathers() == gathers + 3

    @pytest.mark.parametrize("how", ["its last wait", "giving it up too"])
    def test_nor_does_one_whose_stream_cannot_wait_any_more(
        self, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """Whatever fails, and in whosever call: what SGLang records on that stream would come too early."""
        hybrid = Hybrid()
        first, second = hybrid.submit(64, wait=True), hybrid.submit(7, wait=True)
        wait = hybrid.device.wait

        def fail(*_: Any) -> None:
            raise RuntimeError("CUDA error")

        with monkeypatch.context() as patch:
            patch.setattr(
                hybrid.device,
                "wait",
                lambda stream, event: fail() if stream == "d2h" else wait(stream, event),
            )
            if how == "giving it up too":
                patch.setattr(hybrid.device, "copy", fail)
            with pytest.raises(RuntimeError, match="CUDA error"):
                second.pending.advance((LATER,), wait=True)
        with pytest.raises(RuntimeError, match="failed half-way"):
            first.pending.enqueued()

    def test_abandon_leaves_nothing_behind(self) -> None:
        hybrid = Hybrid()
        done = hybrid.submit(64, wait=True)
        finished: list[bool] = []
        done.pending.then(lambda: finished.append(done.pending.enqueued()))
        done.pending.abandon()
        assert finished == [True]
        hybrid.drain_all()
        assert done.pending.enqueued()
        assert done.pending.advance((LATER,)) is None
        assert hybrid.gathers() == 2
        # And the ring is whole again: it takes a write of its size at once.
        assert hybrid.submit(31, wait=True).pending is None
        assert hybrid.gathers() == 5

    @pytest.mark.parametrize("wait", [False, True])
    def test_a_write_that_failed_is_waited_for_as_far_as_it_came(
        self, wait: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SGLang waits for the transfer stream then, and gives the slots to others."""
        hybrid = Hybrid()
        copy = hybrid.device.copy

        def fail_second(batch: Any, stream: Any) -> None:
            if sum(entry[0] == "copy" for entry in hybrid.device.log):
                raise RuntimeError("cuMemcpyBatchAsync failed")
            copy(batch, stream)

        monkeypatch.setattr(hybrid.device, "copy", fail_second)
        with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync"):
            hybrid.submit(64, wait=wait)
        last = {
            stream: max(i for i, entry in enumerate(hybrid.device.log) if entry[:2] == (kind, stream))
            for kind, stream in (("gather", GATHER), ("copy", DRAIN))
        }
        for stream, position in last.items():
            waited = [e[2] for e in hybrid.device.on("d2h") if e[0] == "wait" and e[2].stream == stream]
            assert waited
            assert max(event.index for event in waited) > position
        assert not hybrid.backend._waiting  # type: ignore[attr-defined]

    def test_an_abandoned_write_is_waited_for_as_far_as_it_came(self) -> None:
        hybrid = Hybrid()
        done = hybrid.submit(64, wait=True)
        done.pending.abandon()
        assert done.pending.enqueued()
        assert {entry[2].stream for entry in hybrid.device.on("d2h") if entry[0] == "wait"} == {GATHER, DRAIN}
        hybrid.drain_all()
        assert not done.pending.can_advance()
        assert hybrid.submit(31, wait=True).pending is None

    def test_the_next_write_is_gathered_while_the_rest_of_one_drains(self) -> None:
        """Where forwards wait a chunk needs memory that is free: so none takes more than half of the ring."""
        hybrid = Hybrid()
        assert hybrid.submit(31, wait=True).pending is None
        first = next(entry[2] for entry in hybrid.device.on(DRAIN) if entry[0] == "record")
        pending = hybrid.submit(31, wait=True).pending
        assert pending is not None
        assert hybrid.gathers() == 3
        assert hybrid.device.done is not None
        hybrid.device.done.add(first)
        pending.advance((LATER,))
        assert hybrid.gathers() == 4

    def test_after_a_failed_copy_the_ring_still_works(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hybrid = Hybrid()

        def fail(batch: Any, stream: Any) -> None:
            raise RuntimeError("cuMemcpyBatchAsync failed")

        with monkeypatch.context() as patch:
            patch.setattr(hybrid.device, "copy", fail)
            with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync"):
                hybrid.submit(7, wait=True)
        hybrid.drain_all()
        for _ in range(3):
            hybrid.submit(31, wait=True)
            hybrid.assert_copied()
            hybrid.drain_all()


@pytest.mark.parametrize("name", ["copy_engine", "fenced_kernel"])
def test_page_head_is_refused_with_a_reason(name: str) -> None:
    pool = make_pool("page_head", layers=2, page_size=4, row_bytes=(16, 16), heads=2)
    assert "page_head" in (make(name, RecordingDevice()).supports(pool.geometry) or "")


def test_hybrid_says_when_a_page_does_not_fit_its_ring() -> None:
    """By default such a pool is SGLang's to copy; a size that was asked for is refused at start."""
    pool = make_pool("page_first_direct", layers=4, page_size=64, row_bytes=(8192, 8192))
    row = 2**19
    wide = tuple(replace(each, row_bytes=row, device_row_stride=row) for each in pool.geometry.components)
    large = replace(pool.geometry, components=wide)
    assert "raise staging_mb" in (make("hybrid", RecordingDevice()).supports(large) or "")
    backend = make("hybrid", RecordingDevice(), staging_mb=1)
    assert backend.supports(pool.geometry) is None
    with pytest.raises(
        OptionsError, match=r"pool kv: two pages of 4194304 bytes do not fit .* raise staging_mb"
    ):
        backend.prepare(pool.geometry)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_ring_memory_is_given_out_behind_everything_that_drains_from_it(data: st.DataObject) -> None:
    """Against every unit's own last drain. Drains are done in order, as on one stream, and regions are filled
    on one: what one writer has waited for, the later ones have.
    """
    alignment, units = STAGING_ALIGNMENT, 8
    done: set[int] = set()
    ring = Ring(units * alignment, done.__contains__)
    drain_of: dict[int, int] = {}  # by unit of the ring
    gap_of: dict[int, int] = {}  # by drain
    waited, gap = -1, 0
    for drain in range(data.draw(st.integers(1, 12))):
        done |= set(range(data.draw(st.integers(0, drain))))
        gap += data.draw(st.integers(0, 1))
        size, before = data.draw(st.integers(1, units)), data.draw(st.sampled_from((0, gap, ANY_GAP)))
        room = ring.room(size * alignment, before=before)
        short = data.draw(st.integers(0, alignment - 1))
        taken = ring.take(size * alignment - short, gap=gap, before=before)
        assert (room is None) == (taken is None)
        if room is None or taken is None:
            assert before <= gap
            continue
        region, events = taken
        behind = [drain_of.get(unit, -1) for unit in range(region.start // alignment, units)]
        busy = [nth for nth, each in enumerate(behind) if each > waited and each not in done]
        free = busy[0] if busy else len(behind)
        first = free + behind.count(behind[free]) if busy else free
        most = next((nth for nth in busy if gap_of[behind[nth]] >= before), len(behind))
        assert room == RingRoom(free * alignment, first * alignment, most * alignment)
        assert all(gap_of[event] < before for event in events)
        mine = range(region.start // alignment, region.stop // alignment)
        assert len(mine) == size
        assert 0 <= region.start < region.stop <= ring.nbytes
        still = {drain_of[unit] for unit in mine if unit in drain_of} - done
        waited = max((waited, *events))
        assert max(still, default=-1) <= waited
        region.drained = drain
        gap_of[drain] = gap
        drain_of |= dict.fromkeys(mine, drain)
