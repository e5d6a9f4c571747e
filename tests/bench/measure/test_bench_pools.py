"""SGLang's pools as the benchmark builds them mirror the memory that the benchmark measures."""

from __future__ import annotations

import pytest

from sglang_hicache.bench.measure import sglang_pools
from sglang_hicache.bench.measure.cases import MODELS
from sglang_hicache.bench.measure.devices import TimedCpu
from sglang_hicache.bench.measure.memory import KvBuffers
from sglang_hicache.io_backends import host_strides
from sglang_hicache.io_backends.sglang.pools.geometry import describe_pool

# MLA's pool in page_first_direct cannot be built with fewer pages than layers.
SLOTS = 64 * 64
pytestmark = pytest.mark.usefixtures("cpu_sglang")


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
@pytest.mark.parametrize("name", ["Qwen3-8B", "DeepSeek-V3"])
def test_same_rows_and_same_host_bytes(name: str, layout: str, page_size: int) -> None:
    model = MODELS[name]
    memory = KvBuffers(model, SLOTS, TimedCpu())
    geometry = describe_pool(sglang_pools.host_pool(memory, layout, page_size))
    assert (geometry.layout, geometry.page_size) == (layout, page_size)
    assert (geometry.host_slots, geometry.device_slots) == (SLOTS, SLOTS)
    assert geometry.bytes_per_token == model.bytes_per_token
    for part, rows, host, width in zip(
        geometry.components, memory.rows, memory.host, model.components, strict=True
    ):
        assert part.device_rows == tuple(layer.data_ptr() for layer in rows)
        assert part.row_bytes == part.device_row_stride == width
        assert part.host == host_strides(
            layout,
            base=host.data_ptr(),
            layers=model.layers,
            page_size=page_size,
            slots=SLOTS,
            row_bytes=width,
            heads=model.heads,
        )
