"""Copies of pools that lie in pieces of memory mapped side by side (cuMemMap), as expandable segments do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from gpu import MARKS, WHY_NOT, assert_host, gpu_pool, prepared, transfer_of

from sglang_hicache.io_backends.device.cuda import CudaDevice

pytestmark = MARKS
if WHY_NOT is None:
    import torch

_PIECE = 20 << 20
"""Bytes that PyTorch maps at a time for large tensors (``kLargeBuffer`` of its allocator)."""


@pytest.fixture
def expandable() -> Iterator[None]:
    """What is allocated meanwhile lies in expandable segments."""
    torch.cuda.empty_cache()  # a segment that is there would be used again
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    yield
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    torch.cuda.empty_cache()


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
@pytest.mark.parametrize("name", ["copy_engine", "hybrid"])
def test_rows_across_pieces(expandable: None, name: str, layout: str) -> None:
    tokens = 3 * _PIECE // 2048
    pool = gpu_pool(
        layout,
        layers=2,
        page_size=64,
        row_bytes=(2048, 2048),
        heads=8,
        pages=tokens // 64,
        device_slots=tokens,
    )
    segments = [each for each in torch.cuda.memory_snapshot() if each.get("is_expandable")]
    assert max(each["total_size"] for each in segments) > 2 * _PIECE, "no pool in expandable segments"
    slots = np.arange(tokens)
    expected = pool.expected(slots, slots)
    device = CudaDevice()
    # The ring of hybrid lies there too.
    backend = prepared(device, name, pool)
    stream = device.new_stream()
    ready = device.record(device.current_stream())
    device.wait(stream, ready)
    with device.use_stream(stream):
        given = transfer_of(pool, slots, slots)
        backend.submit(replace(given, ready=(ready,), indices_ready=ready), stream)
    stream.synchronize()
    assert_host(pool, expected)
