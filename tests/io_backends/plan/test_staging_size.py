"""The ring that takes a step's rows in each gap, wherever in it the last gap ended."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import MemoryPool, make_pool
from strategies import pools

from sglang_hicache.bench.measure.cases import MODELS, Case, pool_of
from sglang_hicache.io_backends.device.cpu import CpuDevice
from sglang_hicache.io_backends.hybrid import HybridBackend
from sglang_hicache.io_backends.interface import OptionsError
from sglang_hicache.io_backends.plan.chunks import (
    LEAD_BYTES,
    RingRoom,
    gap_chunk,
    least_chunk,
    ring_units,
    staged,
    staged_bytes,
    staged_units,
)
from sglang_hicache.io_backends.plan.ring import Ring
from sglang_hicache.io_backends.plan.ring_size import DEFAULT_STAGING_MB, FREE_SHARE, staging_size
from sglang_hicache.io_backends.plan.staged_write import WritePlan, units_in_gap

MIB = 2**20


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_chunk_in_a_gap_takes_what_is_drained_or_waits_for_no_more_than_it_must(
    data: st.DataObject,
) -> None:
    ring, lead = data.draw(st.integers(2, 3_000)), data.draw(st.integers(1, 2_000))
    left, idle = data.draw(st.integers(1, 10_000)), data.draw(st.booleans())
    least = least_chunk(left, ring, lead)
    assert 1 <= least <= min(left, ring // 2)
    # The ring's contract: it was asked for the least, and has it.
    most = data.draw(st.integers(least, max(least, ring)))
    free = data.draw(st.integers(0, most))
    room = RingRoom(free, data.draw(st.integers(free, most)), most)
    units = gap_chunk(left, ring, lead, room, idle=idle)
    assert 1 <= units <= min(left, most, ring // 2), "two neighbours fit the ring"
    if idle and left >= lead:
        assert units <= max(1, left // 8), "a link that idles waits for a short gather"
    if free >= least:
        assert units <= free, "nothing to wait for"
        if not idle or left < lead:
            assert units == min(left, free, ring // 2)
    else:
        assert units <= max(least, room.first), "no second drain, unless for the least"
        if not idle or left < lead:
            assert units >= least


@settings(max_examples=200, deadline=None)
@given(pool=pools(), units=st.integers(1, 300), more=st.integers(0, 300_000))
def test_a_chunk_is_known_to_be_as_long_in_staging_as_it_is_laid_out(
    pool: MemoryPool, units: int, more: int
) -> None:
    """With its padding, which is many units where these are tiny."""
    geometry = pool.geometry
    nbytes = staged_bytes(geometry, units)
    assert nbytes == staged(geometry, units * geometry.unit_slots).nbytes
    assert staged_units(geometry, nbytes - 1) < units <= staged_units(geometry, nbytes)
    longest = staged_units(geometry, more)
    assert staged_bytes(geometry, longest) <= more < staged_bytes(geometry, longest + 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_gap_takes_a_steps_rows_of_every_pool(data: st.DataObject) -> None:
    """Nothing ever drains as far as the host sees, and memory of the same gap is never given out again."""
    shapes = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(sorted(MODELS)),
                st.sampled_from([("page_first", 1), ("layer_first", 16), ("page_first_direct", 64)]),
            ),
            min_size=1,
            max_size=3,
        )
    )
    pools = [pool_of(Case(model, layout, page, 16384, True)) for model, (layout, page) in shapes]
    pages = data.draw(st.integers(1, 256))
    size = staging_size(pools, 64 * pages, None)
    ring = Ring(size.nbytes, lambda event: False)
    for gap in range(8):
        for pool in pools:
            # A step's rows come in one write, or in a few.
            cuts = data.draw(st.lists(st.integers(0, pages), max_size=2))
            edges = [0, *sorted(cuts), pages]
            for start, stop in pairwise(edges):
                plan = WritePlan(pool, np.arange((stop - start) * 64))
                while plan.left:
                    units = units_in_gap(pool, plan.left, ring, before=gap, first=not len(plan))
                    assert units, (gap, size)
                    taken = ring.take(plan.cut(units).room, gap=gap, before=gap)
                    assert taken is not None
                    taken[0].drained = object()
                assert sum(each.chunk.tokens for each in plan) == (stop - start) * 64


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_step_is_a_few_chunks(data: st.DataObject) -> None:
    """Each costs the scheduler's thread: a short one for a link that idles, one to the ring's end, and two
    from its beginning, as none is longer than half of it."""
    model = data.draw(st.sampled_from(sorted(MODELS)))
    pool = pool_of(Case(model, "page_first", 64, 16384, True))
    ring = Ring(staging_size([pool], 8192, None).nbytes, lambda event: event in drained)
    drained: set[int] = {0}
    at_once = data.draw(st.booleans())  # done before the next chunk is cut, as on the CPU engine
    for gap in range(1, 12):
        plan = WritePlan(pool, np.arange(64 * data.draw(st.integers(1, 128))))
        while plan.left:
            units = units_in_gap(pool, plan.left, ring, before=gap, first=not len(plan))
            taken = ring.take(plan.cut(units).room, gap=gap, before=gap)
            assert taken is not None
            taken[0].drained = 0 if at_once else gap
        assert len(plan) <= 4
        # It is drained before the next one begins, or while that is gathered: a forward lies between.
        drained |= set(range(gap + data.draw(st.integers(0, 1))))


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(1, 2**26), free=st.integers(0, 2**37))
def test_it_takes_its_share_of_what_is_free_at_most_and_two_units_at_least(tokens: int, free: int) -> None:
    pool = make_pool("page_first_direct", layers=2, page_size=4, row_bytes=(16, 16)).geometry
    unbounded, bounded = staging_size([pool], tokens, None), staging_size([pool], tokens, free)
    assert unbounded.nbytes >= max(DEFAULT_STAGING_MB * MIB, tokens * pool.bytes_per_token)
    assert bounded.nbytes <= unbounded.nbytes
    assert bounded.nbytes <= max(-(-(free // FREE_SHARE) // MIB) * MIB, LEAD_BYTES)
    assert ring_units(pool, bounded.nbytes) >= 2
    assert ("held to an eighth" in bounded.because) == (bounded.nbytes < unbounded.nbytes)


@pytest.mark.parametrize(("layout", "page"), [("page_first", 1), ("page_first_direct", 4)])
@pytest.mark.parametrize("components", [1, 2])
def test_two_units_fit_however_large_they_are_and_little_is_free(
    layout: str, page: int, components: int
) -> None:
    """Else no write of the pool could go through a ring that nobody chose the size of."""
    small = make_pool(layout, layers=2, page_size=page, row_bytes=(16,) * components).geometry
    row = 64 * MIB // small.layers // page // components  # 64 MiB a unit: no byte to spare for padding
    wide = tuple(replace(each, row_bytes=row, device_row_stride=row) for each in small.components)
    pool = replace(small, components=wide)
    for free in (0, 256 * MIB, 2**30):
        assert ring_units(pool, staging_size([pool], 8192, free).nbytes) >= 2


def test_qwen3_8b_and_chunks_of_8192_tokens() -> None:
    size = staging_size([pool_of(Case("Qwen3-8B", "page_first", 1, 8192, True))], 8192, 12 * 2**30)
    assert size.nbytes == 1381 * MIB  # 1,152 MiB of rows, a seventh, and 64 MiB
    assert size.because == "the rows of a step of 8,192 tokens, 147,456 bytes each"
    held = staging_size([pool_of(Case("Qwen3-8B", "page_first", 1, 8192, True))], 8192, 2 * 2**30)
    assert held.nbytes == 256 * MIB
    shared = staging_size([pool_of(Case("Qwen3-8B", "page_first", 1, 8192, True))], 8192, 2 * 2**30, 2)
    assert shared.nbytes == 128 * MIB
    assert "held to an eighth of the 2,048 MiB that were free" in held.because


class Free(CpuDevice):
    """A device that counts its memory."""

    def memory_free(self) -> int:  # type: ignore[override]
        return 2**30


def test_several_indices_of_one_row_are_one_row_of_a_step() -> None:
    """DeepSeek-V4: pages of 256 tokens, 37,440 bytes in each of 21 layers."""
    pool = make_pool("page_first", layers=21, page_size=1, row_bytes=(37_440,), pages=2).geometry
    pages = replace(pool, index_step=256)
    assert staging_size([pages], 256 * 4096, None).nbytes == staging_size([pool], 4096, None).nbytes > 2**31
    assert staging_size([pages], 8192, None).nbytes == DEFAULT_STAGING_MB * MIB
    assert "8,192 tokens, 3,071 bytes each" in staging_size([pages], 8192, None).because


@pytest.mark.parametrize(
    ("options", "forwards_wait", "megabytes"),
    [
        ({}, True, 128),
        ({"staging_mb": "auto"}, True, 128),
        ({}, False, DEFAULT_STAGING_MB),
        ({"staging_mb": 3}, True, 3),
    ],
)
def test_the_ring_is_allocated_once_when_serving_starts(
    options: dict[str, object], forwards_wait: bool, megabytes: int
) -> None:
    idle = HybridBackend(Free(), options)
    assert idle.start(step_tokens=8192, forwards_wait=forwards_wait) is None, "no pool is served"
    backend = HybridBackend(Free(), options)
    for geometry in (make_pool("page_first", layers=2, page_size=1, row_bytes=(2**16, 2**16)).geometry,) * 2:
        backend.prepare(geometry)
    line = backend.start(step_tokens=8192, forwards_wait=forwards_wait)
    assert backend.staging_bytes == (0, megabytes * MIB)
    assert line is not None
    assert line.startswith(f"hybrid stages {megabytes} MiB in GPU memory: ")
    staging = backend._staging
    assert staging is not None
    backend.start(step_tokens=1, forwards_wait=forwards_wait)
    assert backend._staging is staging


def test_a_pool_that_is_seen_later_finds_staging_before_its_first_write() -> None:
    """Allocating waits for the device: not while requests are served."""
    backend = HybridBackend(Free(), {})
    backend.start(step_tokens=8192, forwards_wait=True)
    backend.prepare(make_pool("page_first", layers=2, page_size=1, row_bytes=(16, 16)).geometry)
    assert backend._staging is not None
    assert backend.staging_bytes == (0, DEFAULT_STAGING_MB * MIB)


class Full(Free):
    """A device whose largest free piece is small."""

    largest = 100 * MIB

    def allocate_staging(self, nbytes: int) -> Any:
        if nbytes > self.largest:
            raise RuntimeError("CUDA out of memory")
        return super().allocate_staging(nbytes)


def test_where_memory_is_short_it_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang must not run out of it, nor a server fail to start for the sake of pace."""
    pool = make_pool("page_first", layers=2, page_size=1, row_bytes=(2**16, 2**16)).geometry
    backend = HybridBackend(Full(), {})
    backend.prepare(pool)
    line = backend.start(step_tokens=8192, forwards_wait=True)
    assert backend.staging_bytes == (0, 64 * MIB)
    assert line is not None
    assert line.endswith(", cut from 128 MiB for want of memory")
    monkeypatch.setattr(Full, "largest", 10 * MIB)
    backend = HybridBackend(Full(), {})
    backend.prepare(pool)
    with pytest.raises(OptionsError, match=r"no GPU memory is left .* --mem-fraction-static"):
        backend.start(step_tokens=8192, forwards_wait=True)


def test_a_write_gives_no_chunk_of_what_it_does_not_have() -> None:
    plan = WritePlan(pool_of(Case("Qwen3-8B", "page_first", 64, 16384, True)), np.arange(128))
    total = plan.left
    for units in (0, -1, total + 1):
        with pytest.raises(ValueError, match="chunk of"):
            plan.cut(units)
    assert plan.cut(total).chunk == (0, 128)
    with pytest.raises(ValueError, match="0 are left"):
        plan.cut(1)
    assert len(plan) == 1


def test_what_is_in_no_chunk_yet_counts_as_one() -> None:
    plan = WritePlan(pool_of(Case("Qwen3-8B", "page_first", 64, 16384, True)), np.arange(128))
    whole = plan.copies()
    assert whole > 0
    plan.cut(1)
    assert plan.copies() == 2 * whole
    plan.cut(plan.left)
    assert plan.copies() == 2 * whole
