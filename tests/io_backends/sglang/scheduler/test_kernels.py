"""Which of SGLang's kernels serves a pool, and the limit on its thread blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hicache.io_backends.plan.geometry import Component, PoolGeometry, host_strides
from sglang_hicache.io_backends.sglang.scheduler import kernels
from sglang_hicache.io_backends.sglang.scheduler.kernels import (
    ORDER_BELOW_BYTES,
    ORDER_FROM_BYTES,
    ORDER_SPAN_BYTES,
    build_limited,
    host_order_pays,
    in_host_order,
    kernel_of,
)

pytestmark = pytest.mark.usefixtures("cpu_sglang")


# How 0.5.22 and later say that rows are packed.
ROWS = {"_strided_device_row_bytes": None}


class Pool(SimpleNamespace):
    @property
    def device_rows_packed(self) -> bool:
        return getattr(self, "_strided_device_row_bytes", None) is None


def pool(**values: Any) -> SimpleNamespace:
    base = {
        "can_use_write_back_jit": False,
        "can_use_jit": True,
        "layout": "layer_first",
        "token_stride_size": 2048,
        "page_size": 64,
    }
    return Pool(**{**base, **values})


@pytest.mark.parametrize(
    ("io_backend", "values", "expected"),
    [
        ("direct", {}, "direct"),
        ("kernel", {"can_use_write_back_jit": True, "layout": "page_first"}, "AOT"),
        ("kernel", {"can_use_write_back_jit": True, "layout": "page_first", **ROWS}, "register"),
        ("kernel", {"can_use_jit": False, "layout": "page_first", **ROWS}, "AOT"),
        ("kernel", {"can_use_write_back_jit": True}, "register"),
        ("kernel", {"can_use_jit": False}, "AOT"),
    ],
)
def test_the_kernel_is_named(
    monkeypatch: pytest.MonkeyPatch, io_backend: str, values: dict[str, Any], expected: str
) -> None:
    from sglang.kernels.ops.kvcache import hicache

    monkeypatch.setattr(hicache, "use_hicache_tma_kernel", lambda **_: False)
    assert expected in kernel_of(pool(**values), io_backend)


def test_the_tma_kernel_is_asked_for_with_the_pools_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.kernels.ops.kvcache import hicache

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(hicache, "use_hicache_tma_kernel", lambda **given: asked.append(given) or True)
    assert kernel_of(pool(), "kernel") == "TMA kernel (JIT)"
    assert (asked[0]["element_size"], asked[0]["page_size"]) == (2048, 64)


def test_the_limit_reaches_the_write_back_kernels_and_not_the_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache.pool_host import mha, mla

    calls: list[tuple[str, Any]] = []
    names = {
        mha: ("jit_transfer_hicache_all_layer", "jit_transfer_hicache_all_layer_staged_lf_pf"),
        mla: ("jit_transfer_hicache_all_layer_mla", "jit_transfer_hicache_all_layer_mla_staged_lf_pf"),
    }
    for module, wanted in names.items():
        for name in (*wanted, "jit_transfer_hicache_one_layer"):
            if hasattr(module, name):
                monkeypatch.setattr(
                    module, name, lambda name=name, **given: calls.append((name, given.get("block_quota")))
                )
    kernels._let_kernels_be_limited.cache_clear()

    def write() -> list[Any]:
        calls.clear()
        for module, wanted in names.items():
            for name in wanted:
                getattr(module, name)(page_size=1)
        mha.jit_transfer_hicache_one_layer(page_size=1)
        assert calls[-1] == ("jit_transfer_hicache_one_layer", None)
        return [quota for _, quota in calls[:-1]]

    with kernels.limited_to(7):
        assert write() == [7] * 4
        with kernels.limited_to(None):
            assert write() == [None] * 4
    # Another write's, and a pool's that SGLang copies itself, are not limited by it.
    assert write() == [None] * 4
    with kernels.limited_to(3):
        assert write() == [3] * 4
    kernels._let_kernels_be_limited.cache_clear()


def test_a_limited_kernel_is_built_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.kernels.ops.kvcache import hicache

    asked: list[dict[str, Any]] = []

    def build(*, element_size: int, block_quota: int, page_size: int | None = None) -> bool:
        asked.append({"element_size": element_size, "block_quota": block_quota, "page_size": page_size})
        return True

    def build_before_tma(*, element_size: int, block_quota: int) -> bool:
        return build(element_size=element_size, block_quota=block_quota)

    monkeypatch.setattr(hicache, "can_use_hicache_jit_kernel", build)
    assert build_limited(pool(), 3)
    monkeypatch.setattr(hicache, "can_use_hicache_jit_kernel", build_before_tma)
    assert build_limited(pool(), 3)
    assert not build_limited(pool(can_use_jit=False), 3)
    wide_k = pool()
    del wide_k.token_stride_size
    assert not build_limited(wide_k, 3), "K and V of different width"
    assert asked == [
        {"element_size": 2048, "block_quota": 3, "page_size": 64},
        {"element_size": 2048, "block_quota": 3, "page_size": None},
    ]


ROW, LAYERS = 2048, 32
TOKEN = ROW * LAYERS * 2
ENOUGH = ORDER_FROM_BYTES // TOKEN
SPAN = ORDER_SPAN_BYTES // TOKEN


def geometry(layout: str, page_size: int = 1) -> PoolGeometry:
    slots = 2 * SPAN
    shape = {"layers": LAYERS, "page_size": page_size, "slots": slots, "row_bytes": ROW, "heads": 1}
    parts = tuple(
        Component(name, ROW, tuple(range(LAYERS)), ROW, host_strides(layout, base=0, **shape))
        for name in "kv"
    )
    return PoolGeometry("kv", "mha", layout, "bf16", 1, LAYERS, page_size, slots, slots, parts)


def shuffled(run: int, tokens: int = ENOUGH, span: int = SPAN) -> np.ndarray:
    """Host slots in runs of this length, in random order, evenly spread over ``span`` slots."""
    starts = np.random.default_rng(0).permutation(np.linspace(0, span - run, tokens // run).astype(np.int64))
    return (starts[:, None] + np.arange(run)).reshape(-1)


@pytest.mark.parametrize(
    ("layout", "slots", "pays"),
    [
        ("layer_first", shuffled(1), True),
        ("layer_first", shuffled(4), True),
        ("layer_first", shuffled(ORDER_BELOW_BYTES // ROW), False),  # long runs
        ("layer_first", shuffled(1, ENOUGH - 1), False),  # too short
        ("layer_first", shuffled(1, span=SPAN - 1), False),  # too close to each other
        ("layer_first", np.sort(shuffled(1)), False),  # in order already
        ("layer_first", np.arange(SPAN), False),
        ("page_first", shuffled(1), False),  # a token's layers lie together
        ("page_first_direct", shuffled(4), False),
        ("layer_first", np.empty(0, dtype=np.int64), False),
    ],
)
def test_when_sglangs_kernel_gets_rows_by_host_slot(layout: str, slots: np.ndarray, pays: bool) -> None:
    assert host_order_pays(geometry(layout, 4 if layout == "page_first_direct" else 1), slots) is pays


@given(st.permutations(range(12)), st.permutations(range(12)), st.sampled_from([1, 2, 4]))
def test_pairs_stay_pairs_and_pages_whole(host: list[int], rows: list[int], page: int) -> None:
    torch = pytest.importorskip("torch")

    def slots(pages: list[int]) -> Any:
        return torch.tensor(pages)[:, None].mul(page).add(torch.arange(page)).reshape(-1)

    ordered, device = in_host_order(slots(host), slots(rows))
    assert ordered.tolist() == list(range(12 * page))
    assert dict(zip(ordered.tolist(), device.tolist(), strict=True)) == dict(
        zip(slots(host).tolist(), slots(rows).tolist(), strict=True)
    )
    # SGLang's TMA kernel moves a page's rows as one piece, on both sides.
    assert (device.view(-1, page) == device.view(-1, page)[:, :1] + torch.arange(page)).all()


def test_pairs_stay_as_they_are_where_memory_is_short() -> None:
    torch = pytest.importorskip("torch")

    class Full:
        def sort(self) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    host, rows = Full(), object()
    assert in_host_order(host, rows) == (host, rows)


@pytest.mark.parametrize(("layout", "lengths"), [("layer_first", [4096, 32768]), ("page_first", [])])
def test_sorting_is_loaded_before_serving(
    monkeypatch: pytest.MonkeyPatch, layout: str, lengths: list[int]
) -> None:
    torch = pytest.importorskip("torch")
    rows = [torch.empty(1)]
    sorted_ones: list[int] = []
    monkeypatch.setattr(kernels, "in_host_order", lambda host, _: sorted_ones.append(len(host)))
    for name in ("device_k_buffers", "device_kv_buffers"):
        kernels.prepare_order(SimpleNamespace(layout=layout, **{name: rows}))
    assert sorted_ones == 2 * lengths
