"""Sets of bytes against sets of integers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_hicache.io_backends.virtual.ranges import NOTHING, ByteRanges

PAIRS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8)


def bytes_of(pairs: list[tuple[int, int]]) -> set[int]:
    return {byte for start, stop in pairs for byte in range(start, stop)}


def held(ranges: ByteRanges) -> set[int]:
    return bytes_of([tuple(span) for span in ranges.spans.tolist()])


@given(PAIRS)
def test_they_hold_these_bytes_sorted_and_as_few_as_can_be(pairs: list[tuple[int, int]]) -> None:
    ranges = ByteRanges.of(pairs)
    assert held(ranges) == bytes_of(pairs)
    assert ranges.nbytes == len(bytes_of(pairs))
    assert (ranges.spans[:, 0] < ranges.spans[:, 1]).all()
    assert (ranges.spans[1:, 0] > ranges.spans[:-1, 1]).all()


@given(PAIRS, PAIRS)
def test_union(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    union = ByteRanges.union([ByteRanges.of(a), NOTHING, ByteRanges.of(b)])
    assert held(union) == bytes_of(a) | bytes_of(b)


def test_rows_of_a_pool_are_neighbours_where_slots_are() -> None:
    rows = ByteRanges.rows(1000, stride=64, nbytes=64, slots=np.array([7, 3, 2]))
    assert rows.spans.tolist() == [[1000 + 2 * 64, 1000 + 4 * 64], [1000 + 7 * 64, 1000 + 8 * 64]]
    padded = ByteRanges.rows(1000, stride=64, nbytes=48, slots=np.array([3, 2]))
    assert padded.spans.tolist() == [[1128, 1176], [1192, 1240]]
