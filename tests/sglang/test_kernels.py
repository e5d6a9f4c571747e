"""Which of SGLang's kernels serves a pool, and the limit on its thread blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_hicache.io_backends.sglang.kernels import kernel_of, limit_blocks

pytestmark = pytest.mark.usefixtures("cpu_sglang")


def pool(**values: Any) -> SimpleNamespace:
    base = {
        "can_use_write_back_jit": False,
        "can_use_jit": True,
        "layout": "layer_first",
        "token_stride_size": 2048,
        "page_size": 64,
    }
    return SimpleNamespace(**{**base, **values})


@pytest.mark.parametrize(
    ("io_backend", "values", "expected"),
    [
        ("direct", {}, "direct"),
        ("kernel", {"can_use_write_back_jit": True, "layout": "page_first"}, "staged"),
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
