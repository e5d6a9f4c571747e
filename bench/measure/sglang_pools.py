"""SGLang's own write-back as contenders.

SGLang 0.5.23's host pool objects over the benchmark's device rows and pinned buffer; every submission moves
its indices first, as SGLang's cache controller does on the scheduler's thread, so that this counts as submit
time. SGLang itself runs its two JIT kernels on layer_first, and on page_first only where device rows are
strided (its unified pool); here, as under ``fenced_kernel``, they get packed rows of page_first through that
same route.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ...io_backends.sglang.scheduler import kernels
from .memory import KvBuffers

if TYPE_CHECKING:
    from .contenders import Task

SGLANG = "0.5.23"
MOST_CALLS = 300_000
"""Single copies that are still waited for: about a second (H200, bench/results/2026-11-23-h200)."""

DIRECT = "sglang_direct"
CONTENDERS = {
    "sglang_staged": "page_first as SGLang runs it by default: relayout in GPU memory, then copies",
    "sglang_kernel": "register kernel (JIT), as with SGLANG_HICACHE_TMA_TRANSFER=0",
    "sglang_kernel_tma": "TMA kernel (JIT), where page and row size allow it",
    "sglang_aot": "kernel of sglang-kernel: page_first before the staged path",
    DIRECT: "--hicache-io-backend direct",
}
"""Names, and what each is."""

_SERVES = {
    "page_first": ("sglang_staged", "sglang_kernel", "sglang_kernel_tma", "sglang_aot"),
    "layer_first": ("sglang_kernel", "sglang_kernel_tma", DIRECT),
    "page_first_direct": (DIRECT,),
}
_HICACHE = "sglang.kernels.ops.kvcache.hicache"


@functools.cache
def why_not() -> str | None:
    """Why SGLang's pools cannot be had here, or None."""
    try:
        from importlib.metadata import version

        if (found := version("sglang")) != SGLANG:
            return f"sglang {found} is installed; these contenders are written for {SGLANG}"
        use_cuda_home()
        for name in ("pool_host.mha", "pool_host.mla", "l2_transfer"):
            importlib.import_module(f"sglang.srt.mem_cache.{name}")
        importlib.import_module("sglang.srt.managers.cache_controller")
    except Exception as error:  # importing SGLang runs much code of many packages
        return f"SGLang cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return None


def use_cuda_home() -> None:
    """Tell SGLang's JIT where the CUDA toolkit is: it would look above an ``nvcc`` that is only a wrapper."""
    if os.environ.get("CUDA_HOME") or (nvcc := shutil.which("nvcc")) is None:
        return
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    if top is not None:
        os.environ["CUDA_HOME"] = str(Path(top[1].strip()).resolve())


def prepare(row_bytes: Iterable[int]) -> dict[str, Any]:
    """Compile SGLang's kernels for these rows; what took part, or why nothing did."""
    reason = why_not()
    if reason is not None:
        return {"sglang_missing": reason}
    # One warning for each of some hundred pools, about their size.
    logging.getLogger("sglang").setLevel(logging.ERROR)
    failed = compile_kernels(row_bytes)
    return {**notes(), **({"sglang_kernels_failed": failed} if failed else {})}


def compile_kernels(row_bytes: Iterable[int]) -> dict[str, str]:
    """Build SGLang's JIT kernels for these rows side by side; returns what failed and why."""
    hicache: Any = importlib.import_module(_HICACHE)
    tma = functools.partial(hicache._jit_hicache_tma_module, block_quota=hicache.TMA_BLOCK_QUOTA)
    wanted: dict[str, Callable[[], Any]] = {"TMA": tma}
    for row in sorted(set(row_bytes)):
        shape = {
            "element_size": row,
            "unroll": hicache._default_unroll(row),
            "block_quota": hicache.DEFAULT_BLOCK_QUOTA,
        }
        for name, build in (
            ("register", hicache._jit_hicache_module),
            ("staged", hicache._jit_hicache_staged_module),
        ):
            wanted[f"{name} {row}"] = functools.partial(build, **shape)
    failed = {}
    with ThreadPoolExecutor(max_workers=8) as threads:
        for name, future in [(name, threads.submit(build)) for name, build in wanted.items()]:
            try:
                future.result()
            except Exception as error:  # a kernel that does not build is a contender less, with a reason
                failed[name] = str(error).splitlines()[0]
    return failed


def notes() -> dict[str, Any]:
    """What of SGLang took part, for the results."""
    import ctypes

    try:
        import sgl_kernel

        loaded = getattr(sgl_kernel, "__version__", "?")
    except (ImportError, OSError) as error:
        loaded = f"no: {error}".splitlines()[0]
    return {
        "cuda_home": os.environ.get("CUDA_HOME"),
        # The staged path looks this up among the process's symbols, and copies page by page without it.
        "cudaMemcpyBatchAsync_visible": hasattr(ctypes.CDLL(None), "cudaMemcpyBatchAsync"),
        "sgl_kernel_loaded": loaded,
    }


def _missing(task: Task) -> str | None:
    if task.device.name == "cpu" or task.memory is None:
        return "SGLang's copy kernels have no CPU form"
    return why_not()


def upstream(task: Task) -> Callable[..., None] | str:
    """What ``fenced_kernel`` calls: SGLang's SM kernel for the layout, ``direct`` in page_first_direct."""
    reason = _missing(task)
    if reason is not None:
        return reason
    io_backend = "direct" if task.geometry.layout == "page_first_direct" else "kernel"
    if io_backend == "direct" and (reason := _too_many(task)):
        return reason
    pool = _pool(task, importlib.import_module(_HICACHE), tma=True)
    if isinstance(pool, str):
        return pool
    by_host = functools.partial(kernels.host_order_pays, task.geometry, task.host)
    write = _write(task, pool, io_backend, by_host if io_backend == "kernel" else None)

    def copy(*, block_quota: int | None = None) -> None:
        with kernels.without_staging(pool), kernels.limited_to(block_quota):
            write()

    return copy


def submission(task: Task, name: str, *, by_host: bool = False) -> Callable[[], None] | str:
    """A contender of :data:`CONTENDERS`: enqueues the write on the current stream. Or why it cannot.

    ``by_host`` sorts its indices by host slot first, which SGLang does not.
    """
    reason = _missing(task)
    if reason is not None:
        return reason
    if name not in _SERVES.get(task.geometry.layout, ()):
        return f"SGLang does not run this on layout {task.geometry.layout}"
    hicache: Any = importlib.import_module(_HICACHE)
    io_backend = "direct" if name == DIRECT else "kernel"
    tma = name in ("sglang_staged", "sglang_kernel_tma")
    if name == DIRECT and (reason := _too_many(task)):
        return reason
    if name == "sglang_kernel_tma" and (reason := _no_tma(hicache, task)):
        return reason
    pool = _pool(task, hicache, tma=tma)
    if isinstance(pool, str):
        return pool
    page_first = task.geometry.layout == "page_first"
    if page_first and name in ("sglang_kernel", "sglang_kernel_tma"):
        if not pool.can_use_jit:
            return f"SGLang has no JIT kernel for rows of {task.geometry.components[0].row_bytes} bytes"
        # As where the rows of the device pool are strided; these are as far apart as they are wide.
        pool._strided_device_row_bytes = pool.token_stride_size
    if name == "sglang_staged":
        if not pool.can_use_write_back_jit:
            return "SGLang's staged kernel is not to be had for this pool"
    elif page_first:
        pool.can_use_write_back_jit = False
    write = _write(task, pool, io_backend, (lambda: True) if by_host else None)

    def copy() -> None:
        with _tma(hicache, tma):
            write()

    return copy


def _pool(task: Task, hicache: Any, *, tma: bool) -> Any:
    assert task.memory is not None
    try:
        with _tma(hicache, tma):
            return host_pool(task.memory, task.geometry.layout, task.geometry.page_size)
    except (RuntimeError, ValueError, ImportError) as error:
        return f"SGLang's pool: {error}".splitlines()[0]


def _write(
    task: Task, pool: Any, io_backend: str, by_host: Callable[[], bool] | None = None
) -> Callable[[], None]:
    """SGLang's copy of the task; by ascending host slot where ``by_host`` says so, as in this project."""
    import torch
    from sglang.srt.managers.cache_controller import HiCacheController

    controller = object.__new__(HiCacheController)
    controller.io_backend = io_backend
    controller.mem_pool_host = pool
    controller.device = "cuda"
    operation: Any = SimpleNamespace(
        host_indices=torch.from_numpy(task.host), device_indices=task.device_slots, pool_transfers=None
    )

    def write() -> None:
        ordered = by_host is not None and by_host()
        host_indices, device_indices, _ = controller._move_write_operation(operation)
        if ordered:
            host_indices, device_indices = kernels.in_host_order(host_indices, device_indices)
        pool.backup_from_device_all_layer_physical(None, host_indices, device_indices, io_backend)

    return write


def _too_many(task: Task) -> str | None:
    geometry = task.geometry
    calls = len(task.host) // geometry.page_size * geometry.layers * len(geometry.components)
    return f"up to {calls} single copies: would take seconds" if calls > MOST_CALLS else None


def _no_tma(hicache: Any, task: Task) -> str | None:
    row = task.geometry.components[0].row_bytes
    rows = hicache.hicache_tma_rows_per_chunk(row)
    if task.geometry.page_size % rows:
        return f"SGLang takes no TMA kernel: it moves {rows} rows of {row} bytes at once, a page has fewer"
    if not hicache.use_hicache_tma_kernel(
        element_size=row, block_quota=hicache.TMA_BLOCK_QUOTA, page_size=task.geometry.page_size
    ):
        return "SGLang takes no TMA kernel here (GPU, row size, SGLANG_HICACHE_TMA_TRANSFER, or its build)"
    return None


@contextlib.contextmanager
def _tma(hicache: Any, wanted: bool) -> Iterator[None]:
    """What ``SGLANG_HICACHE_TMA_TRANSFER=0`` does, for one call: the variable is read once per process."""
    if wanted:
        yield
        return
    original = hicache.use_hicache_tma_kernel
    hicache.use_hicache_tma_kernel = lambda **_: False
    try:
        yield
    finally:
        hicache.use_hicache_tma_kernel = original


def host_pool(memory: KvBuffers, layout: str, page_size: int) -> Any:
    """SGLang's host pool over ``memory``: its rows on the GPU, its pinned buffer on the host."""
    import torch
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

    def pinned(dims: tuple[int, ...], dtype: Any, **_: Any) -> Any:
        return memory.pinned.view(dtype).view(dims)

    model = memory.model
    size = {
        "device_capacity_tokens": memory.slots,
        "host_token_capacity": memory.slots,
        "start_layer": 0,
        "end_layer": model.layers,
    }
    element = torch.bfloat16
    rows = [
        tuple(layer.view(element).view(memory.slots, model.heads, -1) for layer in layers)
        for layers in memory.rows
    ]
    where = rows[0][0].device
    tables = [
        torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.uint64, device=where)
        for layers in rows
    ]
    ours = ALLOC_MEMORY_FUNCS[where.type]
    ALLOC_MEMORY_FUNCS[where.type] = pinned
    try:
        if model.kv_kind == "mha":
            return _mha_pool(model.heads, rows, tables, page_size, layout, size)
        return _mla_pool(rows[0], tables[0], page_size, layout, size)
    finally:
        ALLOC_MEMORY_FUNCS[where.type] = ours


def _mha_pool(
    heads: int, rows: list[Any], tables: list[Any], page_size: int, layout: str, size: dict[str, int]
) -> Any:
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    k, v = rows
    info = MHABufferInfo(
        buffers=KVBuffers(k=k, v=v, k_data_ptrs=tables[0], v_data_ptrs=tables[1], layout=KVBufferLayout.NHD),
        page_size=page_size,
        head_num=heads,
        head_dim=k[0].shape[-1],
        v_head_dim=v[0].shape[-1],
        dtype=k[0].dtype,
        device=k[0].device,
    )
    return MHATokenToKVPoolHost(info, 1.0, 0, page_size, layout, **size)


def _mla_pool(rows: Any, table: Any, page_size: int, layout: str, size: dict[str, int]) -> Any:
    from sglang.srt.mem_cache.device_pool_info import MLABufferInfo
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    width = int(rows[0].shape[-1])
    info = MLABufferInfo(
        buffers=rows,
        data_ptrs=table,
        layer_indices=tuple(range(len(rows))),
        device_layer_num=len(rows),
        page_size=page_size,
        kv_lora_rank=width - 64,
        qk_rope_head_dim=64,
        kv_cache_dim=width,
        dtype=rows[0].dtype,
        device=rows[0].device,
    )
    return MLATokenToKVPoolHost(info, 1.0, 0, page_size, layout, target_layer_num=len(rows), **size)
