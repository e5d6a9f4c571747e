"""Batches as the driver takes them, and (in a process of their own) the driver's calls."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from own_process import fake_driver, run_cases
from pools import make_pool

from sglang_hicache.io_backends import CopyBatch
from sglang_hicache.io_backends.device.host_memory import (
    HostRange,
    HostRanges,
    UnknownHostMemoryError,
    drop_empty,
    host_extents,
    split_at,
)


def test_driver_calls_against_a_stand_in_library(subtests: pytest.Subtests, tmp_path: Path) -> None:
    run_cases(subtests, Path(__file__).with_name("driver_cases.py"), fake_driver(tmp_path))


def batch_of(entries: list[tuple[int, int, int]]) -> CopyBatch:
    dst, src, nbytes = (np.array(column, dtype=np.uint64) for column in zip(*entries, strict=True))
    return CopyBatch(dst=dst, src=src, nbytes=nbytes)


def per_byte(batch: CopyBatch) -> list[tuple[int, int]]:
    """(destination, source) of every byte, in order."""
    return [
        (dst + i, src + i)
        for dst, src, nbytes in zip(
            batch.dst.tolist(), batch.src.tolist(), batch.nbytes.tolist(), strict=True
        )
        for i in range(nbytes)
    ]


addresses = st.integers(1000, 1200)
entries = st.lists(st.tuples(addresses, st.integers(2**47, 2**47 + 500), st.integers(1, 90)), min_size=1)


class TestSplit:
    @settings(max_examples=300, deadline=None)
    @given(entries, st.lists(addresses, unique=True).map(sorted))
    def test_moves_the_same_bytes_in_pieces_that_cross_nothing(
        self, copies: list[tuple[int, int, int]], boundaries: list[int]
    ) -> None:
        batch = batch_of(copies)
        cut = split_at(batch, boundaries)
        assert per_byte(cut) == per_byte(batch)
        assert np.all(cut.nbytes > 0)
        for dst, nbytes in zip(cut.dst.tolist(), cut.nbytes.tolist(), strict=True):
            assert not [b for b in boundaries if dst < b < dst + nbytes]
        crossings = sum(dst < b < dst + nbytes for dst, _, nbytes in copies for b in boundaries)
        assert len(cut) == len(batch) + crossings, "cut more than it had to"

    def test_nothing_to_cut_is_the_same_batch(self) -> None:
        batch = batch_of([(1000, 0, 10), (1010, 50, 10)])
        assert split_at(batch, [990, 1000, 1010, 1020]) is batch
        assert split_at(batch, []) is batch

    def test_addresses_keep_all_their_bits(self) -> None:
        top = 2**57 - 3
        cut = split_at(batch_of([(top, 2**63 + 1, 8)]), [top + 1])
        assert (cut.dst.tolist(), cut.src.tolist()) == ([top, top + 1], [2**63 + 1, 2**63 + 2])


def test_empty_entries_go_and_a_batch_without_them_stays() -> None:
    batch = batch_of([(1, 2, 0), (3, 4, 5), (6, 7, 0)])
    assert per_byte(drop_empty(batch)) == per_byte(batch)
    assert len(drop_empty(batch)) == 1
    full = batch_of([(3, 4, 5)])
    assert drop_empty(full) is full


class TestRanges:
    def test_entries_are_cut_and_shifted_each_by_its_own_range(self) -> None:
        ranges = HostRanges()
        ranges.add([HostRange(1000, 100, shift=5000), HostRange(1100, 100, shift=-500)])
        placed = ranges.place(batch_of([(1090, 0, 20), (1150, 40, 10)]))
        assert placed.dst.tolist() == [6090, 600, 650]
        assert placed.src.tolist() == [0, 10, 40]
        assert placed.nbytes.tolist() == [10, 10, 10]

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(1000, 1290), st.integers(2**47, 2**47 + 500), st.integers(0, 10)),
            min_size=1,
            max_size=40,
        ),
        st.lists(st.integers(1001, 1299), unique=True, max_size=4).map(sorted),
        st.sampled_from([0, 0, 7000]),
    )
    def test_a_short_batch_is_placed_as_a_long_one_is(
        self, copies: list[tuple[int, int, int]], inner: list[int], shift: int
    ) -> None:
        """Python checks short batches, numpy long ones: the same bytes and entries."""
        ranges = HostRanges()
        edges = [1000, *inner, 1300]
        ranges.add([HostRange(a, b - a, shift) for a, b in pairwise(edges)])
        batch = batch_of(copies)
        long = batch_of([*copies, *[(1000, 0, 1)] * 20])
        placed, reference = drop_empty(ranges.place(batch)), drop_empty(ranges.place(long))
        assert per_byte(placed) == per_byte(reference)[:-20]
        assert len(placed) == len(reference) - 20
        for dst, nbytes in zip(placed.dst.tolist(), placed.nbytes.tolist(), strict=True):
            assert not [edge for edge in edges if dst - shift < edge < dst - shift + nbytes]

    @pytest.mark.parametrize("entry", [(990, 0, 20), (1095, 0, 10), (1150, 0, 4), (10, 0, 1)])
    def test_a_gap_between_ranges_is_not_writable(self, entry: tuple[int, int, int]) -> None:
        ranges = HostRanges()
        ranges.add([HostRange(1000, 100), HostRange(1200, 100)])
        with pytest.raises(UnknownHostMemoryError, match="prepare_copies"):
            ranges.place(batch_of([(1010, 0, 10), entry]))

    def test_memory_that_was_given_back_and_registered_anew_is_the_new_range(self) -> None:
        ranges = HostRanges()
        ranges.add([HostRange(1000, 100), HostRange(2000, 100)])
        ranges.add([HostRange(1050, 100)])
        assert not ranges.covers([(1000, 100)])
        assert ranges.covers([(1050, 100), (2000, 100)])

    def test_coverage_may_take_several_ranges(self) -> None:
        ranges = HostRanges()
        ranges.add([HostRange(1000, 100), HostRange(1100, 100), HostRange(1201, 100)])
        assert ranges.covers([(1000, 200)])
        assert not ranges.covers([(1000, 201)])


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct", "page_head"])
def test_a_pools_extents_are_its_buffers(layout: str) -> None:
    pool = make_pool(layout, layers=3, page_size=4, row_bytes=(32, 16), heads=2)
    buffers = sorted((int(buffer.ctypes.data), buffer.nbytes) for buffer in pool.host)
    assert sum(nbytes for _, nbytes in host_extents(pool.geometry)) == sum(n for _, n in buffers)
    assert host_extents(pool.geometry)[0][0] == buffers[0][0]
