"""Pools of pages and states in plans: whole records only, and a ring that is sized by what a step writes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pools import indices_of, make_pool

from sglang_hicache.io_backends.plan.chunks import LEAD_BYTES
from sglang_hicache.io_backends.plan.copies import direct_copies
from sglang_hicache.io_backends.plan.geometry import PoolGeometry
from sglang_hicache.io_backends.plan.ring_size import DEFAULT_STAGING_MB, staging_size
from sglang_hicache.io_backends.plan.staged_write import count_runs, is_whole
from sglang_hicache.io_backends.routes import write_facts

MIB = 2**20


def of_pages(layout: str, page: int = 4) -> PoolGeometry:
    made = make_pool(layout, layers=2, page_size=page, row_bytes=(12,))
    return dataclasses.replace(made.geometry, kv_kind="index", record_slots=page)


@given(
    pages=st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True),
    cut=st.integers(1, 3),
    layout=st.sampled_from(["layer_first", "page_first_direct"]),
)
def test_a_write_is_of_whole_records(pages: list[int], cut: int, layout: str) -> None:
    geometry = of_pages(layout)
    slots = (np.array(pages)[:, None] * 4 + np.arange(4)).ravel()
    assert is_whole(geometry, slots)
    assert not is_whole(geometry, slots[:-cut])
    assert not is_whole(geometry, np.roll(slots, cut))
    assert is_whole(dataclasses.replace(geometry, record_slots=1), slots[:-cut]) == (layout == "layer_first")


@given(
    rows=st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True),
    step=st.integers(2, 5),
    data=st.data(),
)
def test_a_write_is_of_all_indices_of_a_row(rows: list[int], step: int, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, step - 1))
    made = make_pool("layer_first", layers=2, page_size=4, row_bytes=(12,))
    geometry = dataclasses.replace(made.geometry, index_step=step, index_offset=offset)
    indices = indices_of(geometry, np.array(rows))
    assert geometry.slots_of(indices).tolist() == rows
    assert is_whole(geometry, indices)
    cut = data.draw(st.integers(1, step - 1))
    assert not is_whole(geometry, indices[:-cut])
    assert not is_whole(geometry, np.roll(indices, cut))
    assert not is_whole(geometry, indices + cut)
    paged = make_pool("page_first_direct", layers=2, page_size=4, row_bytes=(12,)).geometry
    paged = dataclasses.replace(paged, index_step=step, index_offset=offset)
    of_rows = dataclasses.replace(paged, index_step=1, index_offset=0)
    assert is_whole(paged, indices) == is_whole(of_rows, np.array(rows))
    facts = write_facts(geometry, indices)
    assert (facts.tokens, facts.nbytes) == (len(indices), len(rows) * geometry.bytes_per_token)
    assert (facts.entries, facts.runs) == (count_runs(np.array(rows)) * 2, count_runs(np.array(rows)))


def test_the_row_is_that_of_one_of_its_indices_as_in_sglang() -> None:
    """``maybe_dcp_kernel_indices`` looks at a rank's own; in what is written all of a group say the same."""
    made = make_pool("layer_first", layers=2, page_size=4, row_bytes=(12,)).geometry
    for offset, rows in ((0, [0, 3]), (1, [10, 4]), (2, [30, 1])):
        geometry = dataclasses.replace(made, index_step=3, index_offset=offset)
        assert geometry.slots_of(np.array([0, 30, 90, 9, 12, 3])).tolist() == rows


def test_an_index_that_stands_for_no_row_is_no_pool() -> None:
    made = make_pool("layer_first", layers=2, page_size=4, row_bytes=(12,)).geometry
    for step, offset in ((0, 0), (2, 2), (2, -1)):
        with pytest.raises(ValueError, match="is not among them"):
            dataclasses.replace(made, index_step=step, index_offset=offset)


@given(pages=st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True), data=st.data())
@pytest.mark.parametrize("layout", ["layer_first", "page_first_direct"])
def test_a_record_is_never_cut_by_a_copy(layout: str, pages: list[int], data: st.DataObject) -> None:
    """Its bytes are one copy a layer, or part of a longer one: never two."""
    geometry = of_pages(layout)
    device_pages = data.draw(st.permutations(range(16)).map(lambda p: p[: len(pages)]))
    host = (np.array(pages)[:, None] * 4 + np.arange(4)).ravel()
    device = (np.array(device_pages)[:, None] * 4 + np.arange(4)).ravel()
    batch = direct_copies(geometry, host, device)
    assert not (batch.nbytes % 48).any()
    assert batch.total_bytes == len(pages) * 48 * geometry.layers


def test_a_state_takes_the_room_of_two_and_not_of_a_step() -> None:
    rows = make_pool("page_first", layers=2, page_size=1, row_bytes=(1024,)).geometry
    states = dataclasses.replace(
        make_pool(
            "page_first", layers=2, page_size=1, row_bytes=(4 * MIB,), pages=2, device_slots=2
        ).geometry,
        kv_kind="state",
    )
    alone = staging_size([rows], 8192, None)
    both = staging_size([rows, states], 8192, None)
    assert alone.nbytes == DEFAULT_STAGING_MB * MIB == both.nbytes
    many = staging_size([rows, states], 10**6, None).nbytes
    step = 10**6 * rows.bytes_per_token + 2 * states.unit_bytes
    assert many == -(-(step + step // 7 + LEAD_BYTES) // MIB) * MIB
    assert "bytes of states" in both.because
    assert "bytes of states" not in alone.because
