"""The copy plan, byte for byte: what it moves, what it leaves alone, how few entries it needs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import POISON, MemoryPool, make_pool
from strategies import LAYOUTS, pools, writes

from sglang_hicache.io_backends import CopyBatch, direct_copies
from sglang_hicache.io_backends.device.cpu import CpuDevice
from sglang_hicache.io_backends.plan.chunks import (
    STAGING_ALIGNMENT,
    Chunk,
    Staged,
    chunk_lengths,
    chunk_slots,
    chunk_units,
    chunks,
    staged,
)
from sglang_hicache.io_backends.plan.staged_write import (
    drain_copies,
    drain_entries,
    plan_write,
    whole_pages,
)

DEVICE = CpuDevice()


def run(batch: CopyBatch) -> None:
    assert np.all(batch.nbytes > 0), "an empty entry: cuMemcpyBatchAsync rejects those"
    DEVICE.copy(batch, DEVICE.current_stream())


def assert_host(pool: MemoryPool, expected: list[np.ndarray]) -> None:
    for part, got, want in zip(pool.geometry.components, pool.host, expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=part.name)


def through_staging(pool: MemoryPool, host: np.ndarray, device: np.ndarray, capacity: int) -> int:
    """Copy through a staging buffer of ``capacity`` bytes with guards around it; the entries used."""
    guard = 64
    buffer = np.full(capacity + 2 * guard, POISON, dtype=np.uint8)
    entries = 0
    base, stream = int(buffer.ctypes.data) + guard, DEVICE.current_stream()
    plan = plan_write(pool.geometry, host, capacity)
    for chunk, place, _, planned in plan:
        DEVICE.gather(place, base, device, chunk, stream, ctas=1)
        drain = planned(base)
        run(drain)
        entries += len(drain)
    assert entries == plan.copies()
    assert np.all(buffer[:guard] == POISON), "wrote before the staging buffer"
    assert np.all(buffer[-guard:] == POISON), "wrote behind the staging buffer"
    return entries


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
    host, device = data.draw(writes(pool))
    expected = pool.expected(host, device)
    capacity = ring_of(pool, data.draw(st.integers(2, 9)))
    through_staging(pool, host, device, capacity)
    assert_host(pool, expected)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_entries_are_known_before_the_plan(data: st.DataObject) -> None:
    pool = data.draw(pools())
    host, _ = data.draw(writes(pool))
    g = pool.geometry
    planned = plan_write(g, host, 4 * max(1, len(host)) * 2**20).copies()
    counted = drain_entries(g, host)
    if g.paged and whole_pages(host, g.page_size) is None:
        assert counted >= planned
    else:
        assert counted == planned


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_chunks_cover_the_transfer_once_and_in_order(data: st.DataObject) -> None:
    pool = data.draw(pools())
    g = pool.geometry
    host, _ = data.draw(writes(pool))
    capacity = ring_of(pool, data.draw(st.integers(2, 9)))
    position = 0
    for chunk in chunks(g, host, capacity):
        assert chunk.start == position
        assert chunk.stop > chunk.start
        assert 0 <= chunk.first_slot < g.page_size
        if g.paged:
            offsets = (chunk.first_slot + np.arange(chunk.tokens)) % g.page_size
            np.testing.assert_array_equal(offsets, host[chunk.start : chunk.stop] % g.page_size)
        position = chunk.stop
    assert position == len(host)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_neighbouring_chunks_fit_the_ring_together(data: st.DataObject) -> None:
    pool = data.draw(pools())
    host, _ = data.draw(writes(pool))
    capacity = ring_of(pool, data.draw(st.integers(2, 9)))
    planned = plan_write(pool.geometry, host, capacity)
    for each in planned:
        assert each.staged.nbytes <= each.room <= capacity
        drain = each.drain(0)
        assert int((drain.src + drain.nbytes).max()) <= each.staged.nbytes
    for one, next_one in pairwise(planned):
        assert one.room + next_one.room <= capacity
    units = not pool.geometry.paged or whole_pages(host, pool.geometry.page_size) is not None
    if units and sum(each.room for each in planned) > capacity:
        assert planned[0].room == planned[2].room


def loose(pool: MemoryPool, host: np.ndarray, capacity: int) -> list[tuple[Chunk, Staged, CopyBatch]]:
    """The general path, which takes whole pages for loose tokens too."""
    planned = []
    for chunk in chunks(pool.geometry, host, capacity):
        place = staged(pool.geometry, chunk_slots(pool.geometry, chunk))
        planned.append((chunk, place, drain_copies(pool.geometry, place, chunk, host)))
    return planned


def rows_of(batch: CopyBatch) -> set[tuple[int, int, int]]:
    return set(zip(batch.dst.tolist(), batch.src.tolist(), batch.nbytes.tolist(), strict=True))


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_units_are_planned_as_loose_tokens_are(data: st.DataObject) -> None:
    pool = data.draw(pools())
    host, _ = data.draw(writes(pool))
    capacity = ring_of(pool, data.draw(st.integers(2, 9)))
    planned, general = plan_write(pool.geometry, host, capacity), loose(pool, host, capacity)
    for got, (chunk, place, want) in zip(planned, general, strict=True):
        assert (got.chunk, got.staged) == (chunk, place)
        drain = got.drain(0)
        assert len(drain) == len(want)
        assert rows_of(drain) == rows_of(want)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_copies_are_in_the_order_of_host_memory(data: st.DataObject) -> None:
    pool = data.draw(pools())
    g = pool.geometry
    host, device = data.draw(writes(pool))
    batches = [direct_copies(g, host, device)] if g.layout == "layer_first" else []
    if not g.paged or whole_pages(host, g.page_size) is not None:
        # Loose tokens of pages that are written in part come after the whole ones.
        planned = plan_write(g, host, ring_of(pool, data.draw(st.integers(2, 9))))
        batches += [each.drain(0) for each in planned]
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
    # Whole pages, not whole ones, and more than one run.
    for host in (np.arange(8), np.arange(1, 8), np.array([4, 5, 6, 7, 0, 1, 2, 3])):
        for layout in ("page_first", "page_first_direct"):
            pool = make_pool(layout, layers=2, page_size=4, row_bytes=(8, 8))
            want = rows_of(plan_write(pool.geometry, host, 2**20)[0].drain(0))
            given_slots = host.astype(np.int64)
            plan = plan_write(pool.geometry, given_slots, 2**20)
            assert plan.copies() == len(want)
            given_slots[:] = 9
            assert rows_of(plan[0].drain(0)) == want


@given(st.lists(st.integers(0, 8), max_size=4), st.integers(1, 4), st.data())
def test_whole_pages_are_told_from_anything_else(numbers: list[int], page: int, data: st.DataObject) -> None:
    slots = (np.array(numbers, dtype=np.int64)[:, None] * page + np.arange(page)).reshape(-1)
    assert whole_pages(slots, page).tolist() == numbers  # type: ignore[union-attr]
    if len(slots):
        where = data.draw(st.integers(0, len(slots) - 1))
        changed = slots.copy()
        changed[where] += data.draw(st.sampled_from([-1, 1]))
        if page > 1:
            assert whole_pages(changed, page) is None
            assert whole_pages(slots[1:], page) is None


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
        planned = plan_write(g, np.arange(8192), 256 * 2**20)
        assert planned.copies() == sum(len(each.drain(0)) for each in planned) == 18
        assert planned[0].chunk == Chunk(0, 912, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_staging_below_two_units_is_refused(layout: str) -> None:
    pool = make_pool(layout, layers=2, page_size=4, row_bytes=(16, 16))
    with pytest.raises(ValueError, match="raise staging_mb"):
        plan_write(pool.geometry, np.arange(4), ring_of(pool, 2) - 1)
    assert plan_write(pool.geometry, np.arange(4), ring_of(pool, 2))


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

    def test_staged_partial_page_costs_a_copy_per_layer(self) -> None:
        pool = make_pool("page_first_direct", layers=3, page_size=16, row_bytes=(16, 16))
        host = np.arange(5, 16 + 7)  # the end of one page, the start of the next
        assert through_staging(pool, host, np.arange(len(host)), 2**20) == 2 * 3 * 2


class TestBadIndices:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("bad", [-1, 32, 2**40])
    @pytest.mark.parametrize("shape", ["loose", "whole pages"])
    def test_no_way_through_staging_takes_a_host_index_out_of_range(
        self, layout: str, bad: int, shape: str
    ) -> None:
        pool = make_pool(layout, layers=1, page_size=4, row_bytes=(8, 8))
        host = np.array([0, 1, 2, 3, bad]) if shape == "loose" else np.arange(4) + bad // 4 * 4
        for ask in (lambda plan: plan.copies(), lambda plan: plan[0].drain(0)):
            with pytest.raises(ValueError, match="host index"):
                ask(plan_write(pool.geometry, host, 2**20))

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
