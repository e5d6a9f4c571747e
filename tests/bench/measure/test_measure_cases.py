"""What is written: the grid, the slots, the memory, and that a wrong byte anywhere is seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hicache.bench.measure.cases import LAYOUTS, MODELS, Case, entry_bytes, grid, pool_of, slots_of
from sglang_hicache.bench.measure.devices import TimedCpu
from sglang_hicache.bench.measure.memory import POISON, KvBuffers
from sglang_hicache.io_backends.plan.copies import direct_copies


def test_bytes_of_named_models() -> None:
    # 36 layers of K and V, 8 heads of 128 in bf16; 80 layers, one head a GPU; 61 layers of 512 + 64.
    assert MODELS["Qwen3-8B"].bytes_per_token == 36 * 2 * 8 * 128 * 2
    assert MODELS["Llama-3-70B-TP8"].bytes_per_token == 80 * 2 * 128 * 2
    assert MODELS["DeepSeek-V3"].bytes_per_token == 61 * 576 * 2


def test_the_grid_is_every_combination_and_leaves_out_writes_shorter_than_a_page() -> None:
    found = list(grid(["Qwen3-8B"], LAYOUTS, (1, 64), (32, 100), (False, True), ("fa3",)))
    assert len(found) == len(set(found)) == 3 * 2 * 3  # 32 tokens go with pages of 1 only
    assert {case.tokens for case in found if case.page_size == 64} == {64}  # whole pages


@given(
    page=st.integers(1, 130),
    pages=st.integers(1, 40),
    fragmented=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_slots_are_whole_pages_within_the_pool_each_once(
    page: int, pages: int, fragmented: bool, seed: int
) -> None:
    case = Case("Qwen3-8B", "page_first", page, page * pages, fragmented)
    assert case.pool_slots % page == 0
    for slots in slots_of(case, seed):
        assert len(slots) == len(np.unique(slots)) == case.tokens
        assert 0 <= slots.min() <= slots.max() < case.pool_slots
        by_page = slots.reshape(-1, page)
        assert (by_page == by_page[:, :1] + np.arange(page)).all()
        assert (by_page[:, 0] % page == 0).all()
        if not fragmented:
            assert (np.diff(slots) == 1).all()


def test_entry_bytes_of_one_page_and_of_one_run() -> None:
    row = MODELS["Qwen3-8B"].components[0]
    assert entry_bytes(Case("Qwen3-8B", "layer_first", 16, 16, True)) == 16 * row
    assert entry_bytes(Case("Qwen3-8B", "page_first", 16, 16, True)) == 16 * 36 * row
    assert entry_bytes(Case("Qwen3-8B", "layer_first", 16, 4096, False)) == 4096 * row
    assert entry_bytes(Case("Qwen3-8B", "page_first", 16, 4096, False)) == 4096 * 36 * row


@pytest.mark.parametrize("model", ["tiny", "tiny-mla"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "page_head"])
def test_every_byte_counts(tiny: object, model: str, layout: str) -> None:
    case = Case(model, layout, 4, 32, True)
    memory = KvBuffers(MODELS[model], 2 * case.pool_slots, TimedCpu()).part(case.pool_slots)
    geometry = memory.geometry(layout, 4)
    host, rows = slots_of(case)
    memory.refill()
    memory.poison()
    assert memory.wrong_bytes(geometry, host, rows) is not None  # nothing written yet
    memory.device.copy(direct_copies(geometry, host, rows), memory.device.current_stream())
    assert memory.wrong_bytes(geometry, host, rows) is None
    batch = direct_copies(geometry, host, rows)
    written = {int(batch.dst[0]), int(batch.dst[-1] + batch.nbytes[-1] - 1)}
    start = memory.pinned.data_ptr()
    for address in written:
        memory.pinned[address - start] ^= 1
        assert "rows differ" in str(memory.wrong_bytes(geometry, host, rows))
        memory.pinned[address - start] ^= 1
    # A byte that no row of the write covers.
    strays = (memory.pinned == POISON).nonzero()
    unused = next(int(n) for n in strays if not _covered(batch, start + int(n)))
    memory.pinned[unused] = POISON ^ 1
    assert "outside the rows" in str(memory.wrong_bytes(geometry, host, rows))


def _covered(batch: object, address: int) -> bool:
    dst, nbytes = batch.dst.astype(np.int64), batch.nbytes.astype(np.int64)  # type: ignore[attr-defined]
    return bool(((dst <= address) & (address < dst + nbytes)).any())


def test_the_rows_are_fresh_each_time(tiny: object) -> None:
    memory = KvBuffers(MODELS["tiny"], 64, TimedCpu())
    memory.refill()
    before = [layer.clone() for layers in memory.rows for layer in layers]
    memory.refill()
    after = [layer for layers in memory.rows for layer in layers]
    assert not any((a == b).all() for a, b in zip(before, after, strict=True))


def test_a_pool_at_addresses_nobody_reads_has_the_shape_of_the_measured_one(tiny: object) -> None:
    case = Case("tiny", "page_first", 4, 32, True)
    real = KvBuffers(MODELS["tiny"], case.pool_slots, TimedCpu()).geometry(case.layout, case.page_size)
    made = pool_of(case)
    for a, b in zip(real.components, made.components, strict=True):
        assert (a.row_bytes, a.host.page, a.host.token, a.host.layer) == (
            b.row_bytes,
            b.host.page,
            b.host.token,
            b.host.layer,
        )
