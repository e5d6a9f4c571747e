"""SGLang's own copy kernels: which one a pool gets, and how many thread blocks it may take."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ...plan.geometry import PoolGeometry

_ALL_LAYER_KERNELS = (
    "jit_transfer_hicache_all_layer",
    "jit_transfer_hicache_all_layer_mla",
    "jit_transfer_hicache_all_layer_staged_lf_pf",
    "jit_transfer_hicache_all_layer_mla_staged_lf_pf",
)
"""As SGLang's pool modules call them (0.5.18 to 0.5.23): the D2H ones; loads use ``..._one_layer``."""


ORDER_BELOW_BYTES = 16 * 1024
"""Runs of host rows of a layer that are shorter on average are worth an order. (``order`` of
bench/results/2026-11-25-h100/profile.json: runs of 2 KiB, 8 KiB and 32 KiB.)"""

ORDER_FROM_BYTES = 128 * 2**20
"""Bytes of a write from which sorting is small beside it: where the order changed nothing it took 0.05 to
0.14 ms longer (the same file), and this takes 2.4 ms at 55 GB/s."""

ORDER_SPAN_BYTES = 2**30
"""Bytes of host memory between the first and the last slot of a write from which the order matters. (The same
file: writes over 2.4 GiB and more gained, writes over 0.6 GiB and less lost what sorting takes.)"""

_SORTED_AT_ONCE = (4096, 32768)
"""Lengths of which torch sorts the one and the other by different kernels."""


def kernel_of(host_pool: Any, io_backend: str) -> str:
    """What SGLang's write-back of this pool runs, for the log."""
    if io_backend == "direct":
        return "direct copies"
    with without_staging(host_pool):
        packed = getattr(host_pool, "device_rows_packed", True)
        if not getattr(host_pool, "can_use_jit", False) or (packed and host_pool.layout == "page_first"):
            return "AOT kernel of sglang-kernel"
        return "TMA kernel (JIT)" if _uses_tma(host_pool) else "register kernel (JIT)"


@contextlib.contextmanager
def without_staging(host_pool: Any) -> Iterator[None]:
    """Inside, SGLang writes this pool back by an SM kernel in ``page_first`` too.

    SGLang's default there is its staged path, which copies page by page after a relayout in GPU memory; with
    pages of 1, that is two copies a token. From 0.5.22 on it takes its JIT kernels rather than its AOT kernel
    where device rows are strided: packed ones are strided by their own width.
    """
    staged, strided = "can_use_write_back_jit", "_strided_device_row_bytes"
    wanted: dict[str, Any] = {}
    if host_pool.layout == "page_first" and getattr(host_pool, staged, False):
        wanted[staged] = False
        # Pools whose K and V differ in width have no single stride, and take no JIT kernel.
        row = getattr(host_pool, "token_stride_size", None)
        if row is not None and getattr(host_pool, "can_use_jit", False) and hasattr(host_pool, strided):
            wanted[strided] = getattr(host_pool, strided) or row
    before = {name: getattr(host_pool, name) for name in wanted}
    for name, value in wanted.items():
        setattr(host_pool, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(host_pool, name, value)


def host_order_pays(geometry: PoolGeometry, host_indices: Any) -> bool:
    """Whether SGLang's SM kernel writes these rows faster by ascending host slot than in the order given.

    Its thread blocks write rows that follow each other in the index arrays at about the same time, layer by
    layer. Where those are short and all over a large host pool, each needs another translation of its
    address, and the link waits for that. In ``page_first`` a token's layers lie together in one run.

    Args:
        geometry: the pool.
        host_indices: int64 [n] on the host.
    """
    slots = np.asarray(host_indices, dtype=np.int64)
    if (
        geometry.index_step > 1
        or geometry.layout != "layer_first"
        or slots.size * geometry.bytes_per_token < ORDER_FROM_BYTES
    ):
        return False
    steps = slots[1:] - slots[:-1]
    runs = 1 + np.count_nonzero(steps != 1)
    row = max(part.row_bytes for part in geometry.components)
    if row * slots.size >= ORDER_BELOW_BYTES * runs or not np.count_nonzero(steps < 0):
        return False
    span = int(np.maximum.reduce(slots)) - int(np.minimum.reduce(slots)) + 1
    return span * geometry.bytes_per_token >= ORDER_SPAN_BYTES


def in_host_order(host_indices: Any, device_indices: Any) -> tuple[Any, Any]:
    """The same pairs by ascending host slot; whole pages stay whole. As they are where memory is short.

    Sorts on the current stream: that is work on the SMs, of which SGLang's kernel is next. Does not wait for
    the GPU once its kernels are loaded (:func:`prepare_order`).

    Args:
        host_indices: int64 tensor [n] on the device where SGLang's kernel wants it.
        device_indices: int64 tensor [n] on the same device.
    """
    import torch

    try:
        ordered, order = host_indices.sort()
        return ordered, device_indices.index_select(0, order)
    except torch.OutOfMemoryError:  # the write is right in any order
        return host_indices, device_indices


def prepare_order(host_pool: Any) -> None:
    """Load what sorts this pool's indices, before serving: CUDA may stop everything to load a kernel."""
    rows = getattr(host_pool, "device_k_buffers", None) or getattr(host_pool, "device_kv_buffers", None)
    if host_pool.layout == "layer_first" and rows:
        import torch

        for length in _SORTED_AT_ONCE:
            indices = torch.arange(length, device=rows[0].device)
            in_host_order(indices, indices)


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


def build_limited(host_pool: Any, quota: int) -> bool:
    """Compile the JIT kernel of this pool for ``quota`` thread blocks now, not under the first write.

    Returns:
        False if the pool has no JIT kernel, or it cannot be built (SGLang's log says why).
    """
    # K and V of different width have no single row, and take the AOT kernel whatever the flag says.
    if not getattr(host_pool, "can_use_jit", False) or not hasattr(host_pool, "token_stride_size"):
        return False
    from sglang.kernels.ops.kvcache.hicache import can_use_hicache_jit_kernel

    shape = {
        "element_size": host_pool.token_stride_size,
        "block_quota": quota,
        "page_size": host_pool.page_size,
    }
    known = inspect.signature(can_use_hicache_jit_kernel).parameters
    # Before the TMA kernel (0.5.21) the page size did not matter.
    return bool(can_use_hicache_jit_kernel(**{name: shape[name] for name in shape if name in known}))


_quota: int | None = None


@contextlib.contextmanager
def limited_to(quota: int | None) -> Iterator[None]:
    """Inside, SGLang's JIT write-back kernels take at most ``quota`` thread blocks; None: SGLang's number.

    The AOT kernels of sglang-kernel have no such parameter in their pools' calls and keep their grid.
    """
    global _quota
    if quota is not None:
        _let_kernels_be_limited()
    before, _quota = _quota, quota
    try:
        yield
    finally:
        _quota = before


@functools.cache
def _let_kernels_be_limited() -> None:
    """Once: SGLang's modules call the kernels with the quota that is in force."""
    from sglang.srt.mem_cache.pool_host import mha, mla

    for module in (mha, mla):
        for name in _ALL_LAYER_KERNELS:
            kernel = getattr(module, name, None)
            if kernel is not None:
                setattr(module, name, _limited(kernel))


def _limited(kernel: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def call(*args: Any, **named: Any) -> Any:
        return kernel(*args, **named) if _quota is None else kernel(*args, **named, block_quota=_quota)

    return call
