"""Which of SGLang's kernels serves a pool, and the limit on its thread blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_hicache.io_backends.sglang.kernels import build_limited, kernel_of, limit_blocks

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
    for module, kernels in names.items():
        for name in (*kernels, "jit_transfer_hicache_one_layer"):
            if hasattr(module, name):
                monkeypatch.setattr(
                    module, name, lambda name=name, **given: calls.append((name, given.get("block_quota")))
                )
    limit_blocks(7)
    limit_blocks(3)
    for module, kernels in names.items():
        for name in kernels:
            getattr(module, name)(page_size=1)
    mha.jit_transfer_hicache_one_layer(page_size=1)
    assert calls == [
        *[(name, 3) for kernels in names.values() for name in kernels],
        ("jit_transfer_hicache_one_layer", None),
    ]


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
