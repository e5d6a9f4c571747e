"""How the gather is launched; what its kernel moves is in gather_cases.py, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_process import run_cases
from pools import make_pool, on_the_host
from strategies import pools

from sglang_hicache.io_backends.device.gather_plan import access_width, block_units, plan


def test_kernel_in_tritons_interpreter(subtests: pytest.Subtests) -> None:
    pytest.importorskip("triton", reason="the gather needs Triton")
    run_cases(subtests, Path(__file__).with_name("gather_cases.py"), {"TRITON_INTERPRET": "1"})


@given(st.lists(st.integers(0, 2**48), min_size=1))
def test_the_width_divides_everything_and_is_the_widest(values: list[int]) -> None:
    width = access_width(*values)
    assert all(value % width == 0 for value in values)
    assert width == 16 or any(value % (2 * width) for value in values)


@pytest.mark.parametrize(
    ("units", "block"),
    # 2048-byte rows, MLA's 1152, one head of 128 bf16, 24 bytes, rows longer than a tile's.
    [(128, 128), (72, 16), (16, 16), (3, 4), (1, 1), (9, 16), (257, 32), (1000, 256)],
)
def test_tile_rows_waste_few_lanes(units: int, block: int) -> None:
    assert block_units(units) == block


@given(st.integers(1, 5000))
def test_tile_rows_are_powers_of_two_that_mask_off_little(units: int) -> None:
    block = block_units(units)
    assert block & (block - 1) == 0
    padded = -(-units // block) * block
    assert padded < 2 * units + 8
    assert padded * 8 <= 9 * min(-(-units // size) * size for size in (8, 16, 32, 64, 128, 256)) or units < 8


def test_k_and_v_of_one_width_are_one_launch() -> None:
    pool = make_pool("layer_first", layers=3, page_size=4, row_bytes=(32, 32))
    (launch,) = plan(on_the_host(pool.geometry), 0)
    k, v = pool.geometry.components
    assert launch.rows.addresses == (*k.device_rows, *v.device_rows)
    assert launch.strides["part_stride"] == v.host.base - k.host.base
    assert launch.constants["PARTS"] == 2


def test_k_and_v_of_two_widths_are_a_launch_each() -> None:
    pool = make_pool("layer_first", layers=3, page_size=4, row_bytes=(64, 32))
    assert [launch.constants["PIECE_BYTES"] for launch in plan(on_the_host(pool.geometry), 0)] == [64, 32]


@given(st.data(), st.integers(1, 10_000))
def test_tiles_cover_every_access_of_every_row(data: st.DataObject, tokens: int) -> None:
    pool = data.draw(pools())
    for launch in plan(on_the_host(pool.geometry), 0):
        c = launch.constants
        assert c["SEGMENTS"] * c["BLOCK_UNITS"] * c["WIDTH"] >= c["PIECE_BYTES"]
        assert c["PIECE_BYTES"] % c["WIDTH"] == 0
        blocks = launch.tiles(tokens) // launch.tiles_per_block
        assert (blocks - 1) * c["BLOCK_TOKENS"] < tokens <= blocks * c["BLOCK_TOKENS"]
