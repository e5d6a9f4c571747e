"""Where indices go and which events forwards wait for, when a write has several pools."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_hicache.io_backends import Submission
from sglang_hicache.io_backends.device.cpu import CpuDevice
from sglang_hicache.io_backends.sglang.writeback import WriteBack


class Router(WriteBack):
    """Serves the pools that say so."""

    def serves(self, host_pool: Any) -> bool:
        return bool(host_pool.ours)


class Upstream:
    name = "any"

    def supports(self, geometry: Any) -> None:
        return None

    def prepare(self, geometry: Any) -> None:
        pass

    def submit(self, transfer: Any, stream: Any) -> Submission:
        return Submission(1, 1)


def router() -> Router:
    device = CpuDevice()
    return Router(device, Upstream(), device.current_stream)


def pool(*, ours: bool, jit: bool = False, layout: str = "page_first") -> SimpleNamespace:
    return SimpleNamespace(ours=ours, can_use_write_back_jit=jit, layout=layout)


class Controller:
    """A hybrid controller with a KV pool and a side pool."""

    is_kv_sharded = False

    def __init__(self, kv: Any, side: Any, io_backend: str, device_pool: Any = None) -> None:
        entries = [
            SimpleNamespace(name="kv", host_pool=kv, device_pool=device_pool),
            SimpleNamespace(name="mamba", host_pool=side, device_pool=None),
        ]
        self.mem_pool_host = SimpleNamespace(
            anchor_entry=entries[0],
            entries=entries,
            entry_map={entry.name: entry for entry in entries},
            layout=kv.layout,
        )
        self.mem_pool_device = device_pool
        self.io_backend = io_backend
        self.asked: list[bool] = []

    def _move_pool_indices(
        self, host_pool: Any, host: Any, device: Any, *, write_back_jit: bool
    ) -> tuple[str, str]:
        self.asked.append(write_back_jit)
        return "moved host", "moved device"


@pytest.fixture
def operation() -> SimpleNamespace:
    from dataclasses import dataclass

    @dataclass
    class PoolTransfer:
        name: str
        host_indices: Any
        device_indices: Any

    side = PoolTransfer("mamba", "side host", "side device")
    return SimpleNamespace(host_indices="host", device_indices="device", pool_transfers=[side])


def sglangs_own(controller: Any, operation: Any) -> str:
    return "SGLang's own"


@pytest.mark.parametrize(
    ("layout", "io_backend", "staged"),
    [
        ("page_first", "kernel", True),
        ("layer_first", "kernel", False),
        ("page_first_direct", "direct", False),
    ],
)
def test_a_side_pool_of_sglangs_gets_its_indices_by_sglangs_rule(
    operation: SimpleNamespace, layout: str, io_backend: str, staged: bool
) -> None:
    """A Mamba pool can always use the staged kernel, but SGLang asks it to with `page_first` only."""
    controller = Controller(pool(ours=True, layout=layout), pool(ours=False, jit=True), io_backend)
    host, device, sides = router().move_write_operation(sglangs_own, controller, operation)
    assert (host, device) == ("host", "device")
    assert (sides[0].host_indices, sides[0].device_indices) == ("moved host", "moved device")
    assert controller.asked == [staged]


def test_a_pool_whose_indices_sglang_translates_gets_them_moved(operation: SimpleNamespace) -> None:
    unified = SimpleNamespace(host_transfer_translate=lambda indices: indices)
    controller = Controller(pool(ours=True), pool(ours=False), "kernel", device_pool=unified)
    assert router().move_write_operation(sglangs_own, controller, operation) == "SGLang's own"


def test_a_draft_pool_goes_the_way_of_its_target() -> None:
    device = CpuDevice()
    both = WriteBack(device, Upstream(), device.current_stream)
    # Neither is a kind of pool that is known, so neither is ours; nothing changes.
    pools = [SimpleNamespace(pool_label="kv"), SimpleNamespace(pool_label="draft")]
    both.serve_alike(pools)
    assert [both.serves(each) for each in pools] == [False, False]


class TestForwardFences:
    def test_sm_work_on_two_streams_is_two_events(self) -> None:
        writeback = router()
        writeback._sm_done = {"backend": "gathered", "upstream": "copied"}
        assert set(writeback.take_sm_done()) == {"gathered", "copied"}
        assert writeback.take_sm_done() == ()

    def test_a_flush_leaves_its_gather_for_the_next_forward(self) -> None:
        class Part:
            def flush(self) -> str:
                return "gathered"

        writeback = router()
        writeback._sm_done = {"upstream": "copied"}
        writeback.flush([Part()])  # type: ignore[list-item]
        assert set(writeback.take_sm_done()) == {"gathered", "copied"}
