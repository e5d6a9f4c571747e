"""SGLang's own copy kernels: which one a pool gets, and how many thread blocks it may take."""

from __future__ import annotations

import functools
from typing import Any

_ALL_LAYER_KERNELS = (
    "jit_transfer_hicache_all_layer",
    "jit_transfer_hicache_all_layer_mla",
    "jit_transfer_hicache_all_layer_staged_lf_pf",
    "jit_transfer_hicache_all_layer_mla_staged_lf_pf",
)
"""As SGLang's pool modules call them (0.5.18 to 0.5.23): the D2H ones; loads use ``..._one_layer``."""


def kernel_of(host_pool: Any, io_backend: str) -> str:
    """What SGLang's write-back of this pool runs, for the log."""
    if io_backend == "direct":
        return "direct copies"
    if host_pool.can_use_write_back_jit and host_pool.layout == "page_first":
        return "staged kernel (relayout in GPU memory, then copies)"
    if not getattr(host_pool, "can_use_jit", False):
        return "AOT kernel of sglang-kernel"
    return "TMA kernel (JIT)" if _uses_tma(host_pool) else "register kernel (JIT)"


def _uses_tma(host_pool: Any) -> bool:
    try:
        from sglang.kernels.ops.kvcache.hicache import TMA_BLOCK_QUOTA, use_hicache_tma_kernel
    except ImportError:  # before 0.5.21
        return False
    return bool(
        use_hicache_tma_kernel(
            element_size=host_pool.token_stride_size,
            block_quota=TMA_BLOCK_QUOTA,
            page_size=host_pool.page_size,
        )
    )


def limit_blocks(quota: int) -> None:
    """Let SGLang's JIT write-back kernels of this process take at most ``quota`` thread blocks.

    The AOT kernels of sglang-kernel have no such parameter in their pools' calls and keep their grid.
    """
    from sglang.srt.mem_cache.pool_host import mha, mla

    for module in (mha, mla):
        for name in _ALL_LAYER_KERNELS:
            kernel = getattr(module, name, None)
            if kernel is not None:
                # Not a second layer when called again.
                original = getattr(kernel, "func", kernel)
                setattr(module, name, functools.partial(original, block_quota=quota))
