"""What HiCache lacks to run on SGLang's CPU engine: host allocation, loads back, and streams to wait for.

Used for tests and demonstrations without a GPU, and installed only in a scheduler whose device is the CPU.
On a GPU loads (H2D) are SGLang's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...device.cpu import host_view, rows_view
from .. import hooks, versions
from ..pools.geometry import describe_pool


def install() -> None:
    """Supply them, in this process. Idempotent."""
    from sglang.srt.mem_cache.pool_host import common

    common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate
    hooks.apply(
        {
            versions.ENGINE + ".__init__": ("AFTER", _streams_that_synchronize),
            versions.MHA_POOL + ".load_to_device_per_layer": ("AROUND", _load_layer),
            versions.MLA_POOL + ".load_to_device_per_layer": ("AROUND", _load_layer),
        }
    )


def _streams_that_synchronize(_result: None, engine: Any, *args: Any, **kwargs: Any) -> None:
    # torch's CPU streams have no synchronize, which SGLang's error path calls: it would hide the error.
    for stream in (engine.device_to_host_stream, engine.host_to_device_stream):
        if not hasattr(stream, "synchronize"):
            stream.synchronize = lambda: None


def _allocate(
    dims: tuple[int, ...], dtype: Any, device: str, pin_memory: bool, allocator: Any, **_: Any
) -> Any:
    return allocator.allocate(dims, dtype=dtype, device=device)


def _load_layer(
    original: Callable[..., None],
    pool: Any,
    device_pool: Any,
    host_indices: Any,
    device_indices: Any,
    layer_id: int,
    io_backend: str,
    *,
    is_draft: bool = False,
) -> None:
    geometry = describe_pool(pool)
    if not is_draft and not 0 <= layer_id < pool.target_layer_num:
        return
    slots = np.asarray(host_indices, dtype=np.int64)
    rows = np.asarray(device_indices, dtype=np.int64)
    page, offset = np.divmod(slots, geometry.page_size)
    for part in geometry.components:
        for piece in range(part.host.pieces):
            target = rows_view(geometry, part, layer_id, piece)
            target[rows] = host_view(geometry, part, layer_id, piece)[page, offset]
