"""The copy plan, byte for byte: what it moves, what it leaves alone, how few entries it needs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pools import POISON, MemoryPool, make_pool
from reference_plan import Piece, reference_plan
from strategies import LAYOUTS, pools, whole_writes, writes

from sglang_hicache.io_backends import CopyBatch, direct_copies
from sglang_hicache.io_backends.device.cpu import CpuDevice, rows_view, strided_rows
from sglang_hicache.io_backends.plan.chunks import (
    STAGING_ALIGNMENT,
    Chunk,
    chunk_lengths,
    chunk_units,
)
from sglang_hicache.io_backends.plan.staged_write import WritePlan, copies_to_drain, is_whole

DEVICE = CpuDevice()


def run(batch: CopyBatch) -> None:
    assert np.all(batch.nbytes > 0), "an empty copy: cuMemcpyBatchAsync rejects those"
    DEVICE.copy(batch, DEVICE.current_stream())


def assert_host(pool: MemoryPool, expected: list[np.ndarray]) -> None:
    for part, got, want in zip(pool.geometry.components, pool.host, expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=part.name)


def through_staging(pool: MemoryPool, host: np.ndarray, device: np.ndarray, capacity: int) -> int:
    """Copy through a staging buffer of ``capacity`` bytes with guards around it; how many copies it took."""
    guard = 64
    buffer = np.full(capacity + 2 * guard, POISON, dtype=np.uint8)
    copies = 0
    base, stream = int(buffer.ctypes.data) + guard, DEVICE.current_stream()
    plan = WritePlan(pool.geometry, host, capacity)
    for planned in plan:
        DEVICE.gather(planned.staged, base, device, planned.chunk, stream, ctas=1)
        drain = plan.drain(planned, base)
        run(drain)
        copies += len(drain)
    assert copies == plan.copies()
    assert np.all(buffer[:guard] == POISON), "wrote before the staging buffer"
    assert np.all(buffer[-guard:] == POISON), "wrote behind the staging buffer"
    return copies


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_direct_copies_move_exactly_these_rows(data: st.DataObject) -> None:
    pool = data.draw(pools())
    host, device = data.draw(writes(pool))
    expected = pool.expected(host, device)
    batch = direct_copies(pool.geometry, host, device)
    assert batch.total_bytes == len(host) * pool.geometry.bytes_per_token
    run(batch)
    assert_host(pool, expected)


def ring_of(pool: MemoryPool, units: int) -> int:
    """Bytes of a ring whose two chunks hold ``units`` tokens (or pages) together."""
    g = pool.geometry
    unit = g.bytes_per_token * (g.page_size if g.paged else 1)
    return unit * units + 2 * STAGING_ALIGNMENT * len(g.components)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_gather_and_drain_move_exactly_these_rows(data: st.DataObject) -> None:
    pool = data.draw(pools())
    host, device = data.draw(whole_writes(pool))
    expected = pool.expected(host, device)
    capacity = ring_of(pool, data.draw(st.integers(2, 9)))
    through_staging(pool, host, device, capacity)
    assert_host(pool, expected)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_copies_are_counted_before_the_plan(data: st.DataObject) -> None:
    pool = data.draw(pools())
    host, _ = data.draw(writes(pool))
    g = pool.geometry
    ring = 4 * max(1, len(host)) * 2**20
    counted = copies_to_drain(g, host)
    if is_whole(g, host):
        assert counted == WritePlan(g, host, ring).copies()
    else:
        assert counted >= sum(len(drain) for _, _, drain in reference_plan(g, host, ring))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_chunks_cover_the_transfer_once_and_in_order(data: st.DataObject) -> None:
    pool = data.draw(pools())
    g = pool.geometry
    host, _ = data.draw(whole_writes(pool))
    position = 0
    for chunk, place, _ in WritePlan(g, host, ring_of(pool, data.draw(st.integers(2, 9)))):
        assert chunk.start == position
        assert chunk.tokens == place.slots > 0
        assert chunk.tokens % g.unit_slots == 0
        position = chunk.stop
    assert position == len(host)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_neighbouring_chunks_fit_the_ring_together(data: st.DataObject) -> None:
    pool = data.draw(pools())
    host, _ = data.draw(whole_writes(pool))
    capacity = ring_of(pool, data.draw(st.integers(2, 9)))
    planned = WritePlan(pool.geometry, host, capacity)
    for each in planned:
        assert each.staged.nbytes <= each.room <= capacity
        drain = planned.drain(each, 0)
        assert int((drain.src + drain.nbytes).max()) <= each.staged.nbytes
    for one, next_one in pairwise(planned):
        assert one.room + next_one.room <= capacity
    if sum(each.room for each in planned) > capacity:
        assert planned[0].room == planned[2].room


def rows_of(batch: CopyBatch) -> set[tuple[int, int, int]]:
    return set(zip(batch.dst.tolist(), batch.src.tolist(), batch.nbytes.tolist(), strict=True))


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_runs_are_planned_as_the_reference_plans_tokens(data: st.DataObject) -> None:
    pool = data.draw(pools())
    host, _ = data.draw(whole_writes(pool))
    capacity = ring_of(pool, data.draw(st.integers(2, 9)))
    plan = WritePlan(pool.geometry, host, capacity)
    for got, (piece, place, want) in zip(plan, reference_plan(pool.geometry, host, capacity), strict=True):
        assert Piece(*got.chunk, 0) == piece
        assert got.staged == place
        drain = plan.drain(got, 0)
        assert len(drain) == len(want)
        assert rows_of(drain) == rows_of(want)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_reference_moves_exactly_these_rows_of_pages_in_part_too(data: st.DataObject) -> None:
    pool = data.draw(pools())
    g = pool.geometry
    host, device = data.draw(writes(pool))
    expected = pool.expected(host, device)
    capacity = ring_of(pool, data.draw(st.integers(2, 9)))
    staging = np.full(capacity, POISON, dtype=np.uint8)
    base = int(staging.ctypes.data)
    for piece, place, drain in reference_plan(g, host, capacity):
        rows = device[piece.start : piece.stop]
        page, offset = np.divmod(piece.first_slot + np.arange(len(rows)), g.page_size)
        for part, to in zip(g.components, place.parts, strict=True):
            to = replace(to, base=base + to.base)
            for layer, nth in itertools.product(range(g.layers), range(to.pieces)):
                there = strided_rows(to, place.slots, g.page_size, part.piece_bytes, layer, nth)
                there[page, offset] = rows_view(g, part, layer, nth)[rows]
        run(replace(drain, src=drain.src + np.uint64(base)))
    assert_host(pool, expected)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_copies_are_in_the_order_of_host_memory(data: st.DataObject) -> None:
    pool = data.draw(pools())
    g = pool.geometry
    host, device = data.draw(whole_writes(pool))
    batches = [direct_copies(g, host, device)] if g.layout == "layer_first" else []
    plan = WritePlan(g, host, ring_of(pool, data.draw(st.integers(2, 9))))
    batches += [plan.drain(each, 0) for each in plan]
    for batch in batches:
        for memory in pool.host:
            start = int(memory.ctypes.data)
            dst = batch.dst[(batch.dst >= start) & (batch.dst < start + memory.nbytes)]
            assert np.all(dst[1:] > dst[:-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_whose_ends_look_like_one_run_are_looked_at_in_between(layout: str) -> None:
    pool = make_pool(layout, layers=2, page_size=4, row_bytes=(8, 8))
    for units in ([0, 2, 1, 3], [1, 1, 3], [2, 4, 3, 5, 6]):  # the second writes one twice, the same bytes
        pages = np.repeat(units, 4) * 4 + np.tile(np.arange(4), len(units))
        host = pages if pool.geometry.paged else np.array(units)
        rows = host % pool.geometry.device_slots
        expected = pool.expected(host, rows)
        through_staging(pool, host, rows, 2**20)
        for got, want in zip(pool.host, expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_chunk_is_planned_from_what_the_slots_were_then() -> None:
    # One run, and more than one.
    for host in (np.arange(8), np.array([4, 5, 6, 7, 0, 1, 2, 3])):
        for layout in ("page_first", "page_first_direct"):
            pool = make_pool(layout, layers=2, page_size=4, row_bytes=(8, 8))
            fresh = WritePlan(pool.geometry, host, 2**20)
            want = rows_of(fresh.drain(fresh[0], 0))
            given_slots = host.astype(np.int64)
            plan = WritePlan(pool.geometry, given_slots, 2**20)
            assert plan.copies() == len(want)
            given_slots[:] = 9
            assert rows_of(plan.drain(plan[0], 0)) == want


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whole_pages_are_told_from_anything_else(data: st.DataObject) -> None:
    pool = data.draw(pools())
    g = pool.geometry
    host, _ = data.draw(writes(pool))
    page = g.unit_slots
    by_hand = len(host) % page == 0 and all(
        first % page == 0 and host[at : at + page].tolist() == list(range(first, first + page))
        for at, first in ((at, int(host[at])) for at in range(0, len(host), page))
    )
    assert is_whole(g, host) == by_hand
    if by_hand and page > 1 and len(host):
        where = data.draw(st.integers(0, len(host) - 1))
        changed = host.copy()
        changed[where] += data.draw(st.sampled_from([-1, 1, page]))
        assert not is_whole(g, changed)
        assert not is_whole(g, host[1:])
        assert is_whole(g, host + page)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_write_that_is_not_whole_pages_is_refused_before_any_copy(data: st.DataObject) -> None:
    pool = data.draw(pools(("page_first_direct", "page_head")))
    host, _ = data.draw(writes(pool))
    assume(not is_whole(pool.geometry, host))

    def count(plan: WritePlan) -> int:
        return plan.copies()

    def first(plan: WritePlan) -> CopyBatch:
        return plan.drain(plan[0], 0)

    for ask in (count, first):
        with pytest.raises(ValueError, match="must be whole pages of"):
            ask(WritePlan(pool.geometry, host, 2**30))


class TestChunkSizes:
    @given(st.integers(1, 5000), st.integers(2, 300))
    def test_two_fill_the_ring_and_neither_is_small(self, total: int, ring: int) -> None:
        first, second = chunk_units(total, ring)
        assert first + second == ring
        assert 1 <= second <= first
        assert first <= max(ring * 5 // 8, ring - ring // 2)

    @given(st.integers(1, 5000), st.integers(2, 300))
    def test_moving_them_apart_never_costs_a_chunk(self, total: int, ring: int) -> None:
        def count(first: int, second: int) -> int:
            rest = total % ring
            return total // ring * 2 + (rest > 0) + (rest > first)

        half = ring - ring // 2
        assert count(*chunk_units(total, ring)) <= count(half, ring - half)

    @given(st.integers(1, 5000), st.integers(2, 300), st.integers(1, 300))
    def test_the_first_chunk_is_the_short_one(self, total: int, ring: int, lead: int) -> None:
        lengths = chunk_lengths(total, ring, lead)
        assert sum(lengths) == total
        assert min(lengths) >= 1
        assert all(one + other <= ring for one, other in pairwise(lengths))
        if len(lengths) > 2:
            assert lengths[0] <= lengths[2]
        if total <= ring:
            assert max(lengths) <= ring - ring // 2
        else:
            assert len({*lengths[1::2]}) == 1, "of the others, every second one is alike"
            assert len({*lengths[2::2]}) == 1

    def test_a_write_that_fits_the_ring(self) -> None:
        assert chunk_lengths(99, 200, 100) == [99]
        assert chunk_lengths(100, 200, 100) == [12, 88]
        assert chunk_lengths(200, 200, 100) == [25, 88, 87]
        assert chunk_lengths(101, 200, 300) == [51, 50]
        assert chunk_lengths(7, 200, 1) == [7]

    def test_a_write_that_does_not(self) -> None:
        assert chunk_lengths(250, 200, 100) == [50, 100, 100]
        assert chunk_lengths(400, 200, 100) == [100, 100, 100, 100]

    def test_qwen3_8b_by_default(self) -> None:
        """8,192 tokens are 1,152 MiB: halves of 256 MiB would be 10 chunks, the last one of 2 tokens."""
        k_and_v = (2048, 2048)
        pool = make_pool("page_first", layers=36, page_size=1, row_bytes=k_and_v, pages=1, device_slots=1)
        g = replace(pool.geometry, host_slots=8192)
        planned = WritePlan(g, np.arange(8192), 256 * 2**20)
        assert planned.copies() == sum(len(planned.drain(each, 0)) for each in planned) == 18
        assert planned[0].chunk == Chunk(0, 912)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_staging_below_two_units_is_refused(layout: str) -> None:
    pool = make_pool(layout, layers=2, page_size=4, row_bytes=(16, 16))
    with pytest.raises(ValueError, match="raise staging_mb"):
        WritePlan(pool.geometry, np.arange(4), ring_of(pool, 2) - 1)
    assert WritePlan(pool.geometry, np.arange(4), ring_of(pool, 2))


@pytest.mark.parametrize(
    ("host", "rows"),
    [
        ([4, 5, 6, 7], [1, 2, 3, 4]),
        ([4, 6, 5, 7], [1, 2, 3, 4]),
        ([4, 5, 6, 7], [1, 3, 2, 4]),
        ([4, 5, 6, 7], [1, 2, 3, 9]),
        ([9], [2]),
        ([], []),
    ],
)
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_one_run_is_told_from_what_has_its_ends(layout: str, host: list[int], rows: list[int]) -> None:
    pool = make_pool(layout, layers=2, page_size=4, row_bytes=(8, 8), pages=4, device_slots=16)
    slots = np.array(host, dtype=np.int64)
    expected = pool.expected(slots, np.array(rows))
    batch = direct_copies(pool.geometry, slots, np.array(rows, dtype=np.int64))
    run(batch)
    assert_host(pool, expected)
    if layout == "layer_first" and len(host):
        one = (host == [4, 5, 6, 7] and rows == [1, 2, 3, 4]) or len(host) == 1
        assert (len(batch) == 2 * 2) == one


class TestEntries:
    """How many copies a write costs: the point of choosing a layout."""

    def entries(self, layout: str, page_size: int, host: np.ndarray, device: np.ndarray) -> int:
        pool = make_pool(
            layout,
            layers=3,
            page_size=page_size,
            row_bytes=(16, 16),
            heads=2,
            pages=4096 // page_size,
            device_slots=4096,
        )
        return len(direct_copies(pool.geometry, host, device))

    def test_layer_first_is_one_entry_per_run_layer_and_component(self) -> None:
        tokens = np.arange(256)
        assert self.entries("layer_first", 16, tokens, tokens + 64) == 3 * 2

    def test_scattered_device_pages_split_the_runs(self) -> None:
        host = np.arange(256)
        device = (np.arange(16)[::-1, None] * 16 + np.arange(16)).reshape(-1)
        assert self.entries("layer_first", 16, host, device) == 16 * 3 * 2

    def test_page_first_direct_is_one_entry_per_page(self) -> None:
        tokens = np.arange(256)
        assert self.entries("page_first_direct", 16, tokens, tokens) == 16 * 3 * 2

    def test_page_first_cannot_merge_tokens(self) -> None:
        tokens = np.arange(256)
        assert self.entries("page_first", 16, tokens, tokens) == 256 * 3 * 2

    def test_page_head_is_one_entry_per_token_layer_and_head(self) -> None:
        tokens = np.arange(32)
        assert self.entries("page_head", 16, tokens, tokens) == 32 * 3 * 2 * 2

    @pytest.mark.parametrize(
        ("layout", "expected"),
        # layer_first: a copy per layer and component; the others: one per component and chunk.
        [("layer_first", 6), ("page_first", 2), ("page_first_direct", 2), ("page_head", 2)],
    )
    @pytest.mark.parametrize("page_size", [1, 16, 64])
    def test_staged_with_contiguous_host_slots(self, layout: str, expected: int, page_size: int) -> None:
        pool = make_pool(
            layout,
            layers=3,
            page_size=page_size,
            row_bytes=(16, 16),
            heads=2,
            pages=4096 // page_size,
            device_slots=4096,
        )
        device = np.random.default_rng(0).permutation(4096)
        assert through_staging(pool, np.arange(4096), device, 2**20) == expected


class TestBadIndices:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("bad", [-4, 32, 2**40])
    @pytest.mark.parametrize("shape", ["one run", "more"])
    def test_no_way_through_staging_takes_a_host_index_out_of_range(
        self, layout: str, bad: int, shape: str
    ) -> None:
        pool = make_pool(layout, layers=1, page_size=4, row_bytes=(8, 8))
        page = np.arange(4) + bad
        host = page if shape == "one run" else np.concatenate([np.arange(4), page, np.arange(8, 12)])
        for ask in (lambda plan: plan.copies(), lambda plan: plan.drain(plan[0], 0)):
            with pytest.raises(ValueError, match="host index"):
                ask(WritePlan(pool.geometry, host, 2**20))

    def test_a_host_index_out_of_range_is_refused(self) -> None:
        pool = make_pool("page_first", layers=1, page_size=4, row_bytes=(8, 8))
        beyond = np.array([pool.geometry.host_slots])
        with pytest.raises(ValueError, match=r"host index 32 .* outside 0\.\.31"):
            direct_copies(pool.geometry, beyond, np.array([0]))

    def test_a_negative_device_index_is_refused(self) -> None:
        pool = make_pool("page_first", layers=1, page_size=4, row_bytes=(8, 8))
        with pytest.raises(ValueError, match="device index"):
            direct_copies(pool.geometry, np.array([0]), np.array([-1]))

    def test_vectors_of_different_length_are_refused(self) -> None:
        pool = make_pool("page_first", layers=1, page_size=4, row_bytes=(8, 8))
        with pytest.raises(ValueError, match="2 host indices for 1 device indices"):
            direct_copies(pool.geometry, np.array([0, 1]), np.array([0]))


class TestGeometry:
    def test_unknown_layout(self) -> None:
        from sglang_hicache.io_backends import host_strides

        with pytest.raises(ValueError, match="unknown host layout 'page_last'"):
            host_strides("page_last", base=0, layers=1, page_size=1, slots=1, row_bytes=1)

    def test_page_head_needs_rows_that_split(self) -> None:
        from sglang_hicache.io_backends import host_strides

        with pytest.raises(ValueError, match="cannot split a row of 10 bytes into 4 heads"):
            host_strides("page_head", base=0, layers=1, page_size=1, slots=1, row_bytes=10, heads=4)

    def test_overlapping_device_rows_are_refused(self) -> None:
        pool = make_pool("layer_first", layers=1, page_size=1, row_bytes=(8, 8))
        k, v = pool.geometry.components
        with pytest.raises(ValueError, match="overlap"):
            replace(pool.geometry, components=(replace(k, device_row_stride=4), v))
