"""Pools on a GPU and in pinned memory, and why there is none here."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pools import MemoryPool, make_pool

from sglang_hicache.io_backends import Backend, Transfer, get_backend
from sglang_hicache.io_backends.device.cuda import CudaDevice

# Streams that share a hardware queue wait for each other by accident, which hides a missing fence.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def why_not(*libraries: str) -> str | None:
    """Why tests that need a GPU, torch and ``libraries`` cannot run here; None if they can."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver: libcuda.so.1 was not found"
    for name in ("torch", *libraries):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch.cuda.is_available() is False"


WHY_NOT = why_not()
MARKS = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
if WHY_NOT is None:
    import torch

LONG = 100_000_000
"""Cycles that a stream sleeps so that others get far ahead: 50 ms at 2 GHz."""


class GpuPool(MemoryPool):
    """A pool whose device rows are on the GPU and whose host arrays are pinned.

    ``device`` stays the rows' copy on the host, for :meth:`expected`.
    """

    def __init__(self, pool: MemoryPool) -> None:
        self.rows = [[torch.from_numpy(rows).cuda() for rows in layers] for layers in pool.device]
        self.pinned = [torch.from_numpy(array).pin_memory() for array in pool.host]
        parts = tuple(
            replace(
                part,
                device_rows=tuple(layer.data_ptr() for layer in rows),
                host=replace(part.host, base=pinned.data_ptr()),
            )
            for part, rows, pinned in zip(pool.geometry.components, self.rows, self.pinned, strict=True)
        )
        host = [pinned.numpy() for pinned in self.pinned]
        super().__init__(replace(pool.geometry, components=parts), pool.device, host)


def gpu_pool(layout: str, **shape: Any) -> GpuPool:
    return GpuPool(make_pool(layout, **shape))


def transfer_of(pool: GpuPool, host: np.ndarray, slots: np.ndarray, **fields: Any) -> Transfer:
    device_slots = torch.from_numpy(slots).cuda()
    values: dict[str, Any] = {
        "ready": (),
        "indices_ready": None,
        "forwards_wait": False,
        "upstream_copy": lambda: pytest.fail("only fenced_kernel calls SGLang's copy"),
    }
    return Transfer(geometry=pool.geometry, host_slots=host, device_slots=device_slots, **values | fields)


def prepared(device: CudaDevice, name: str, pool: GpuPool, **options: Any) -> Backend:
    backend = get_backend(name)(device, options)
    assert backend.supports(pool.geometry) is None
    device.prepare_copies(pool.geometry)
    backend.prepare(pool.geometry)
    return backend


def assert_host(pool: GpuPool, expected: list[np.ndarray]) -> None:
    for part, got, want in zip(pool.geometry.components, pool.host, expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=part.name)
