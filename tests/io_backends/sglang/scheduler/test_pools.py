"""SGLang's own host pools and transfer engine, our routing: the right bytes by SGLang's own views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from stand_in_scheduler import fences

from sglang_hicache.io_backends import Backend, Submission, Transfer, get_backend
from sglang_hicache.io_backends.device.cpu import CpuDevice
from sglang_hicache.io_backends.registry import OWN_NAMES
from sglang_hicache.io_backends.routes import one_route
from sglang_hicache.io_backends.sglang import versions
from sglang_hicache.io_backends.sglang.pools.errors import UnsupportedPoolError
from sglang_hicache.io_backends.sglang.pools.geometry import describe_pool, host_buffers
from sglang_hicache.io_backends.sglang.scheduler.writeback import WriteBack

pytestmark = pytest.mark.usefixtures("cpu_sglang")

LAYERS = 3
DEVICE_TOKENS = 256
CASES = [
    ("mha", "layer_first"),
    ("mha", "page_first"),
    ("mha", "page_first_direct"),
    ("wide_k", "page_first"),
    ("wide_k", "page_first_direct"),
    ("mla", "layer_first"),
    ("mla", "page_first"),
    ("mla", "page_first_direct"),
]
DCP_CASES = [("dcp", layout) for layout in ("layer_first", "page_first", "page_first_direct")]
"""Rows of which the second of three ranks of decode context parallelism has its own."""


class Pools:
    """A device pool full of random rows, and its host pool full of poison."""

    def __init__(
        self, kind: str, layout: str, page_size: int, dtype: str = "bfloat16", tokens: int = DEVICE_TOKENS
    ) -> None:
        import torch
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
        from sglang.srt.mem_cache.pool_host.mha import (
            AsymmetricMHATokenToKVPoolHost,
            MHATokenToKVPoolHost,
        )
        from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

        torch.manual_seed(0)
        element = getattr(torch, dtype)
        self.tokens = tokens
        size = {"device_capacity_tokens": tokens, "start_layer": 0, "end_layer": LAYERS}
        self.device: Any
        self.host: Any
        if kind == "mha":
            self.device = MHATokenToKVPool(tokens, page_size, element, 2, 32, LAYERS, "cpu", False)
            self.host = MHATokenToKVPoolHost(
                self.device._mha_buffer_info(), 2.0, 0, page_size, layout, **size
            )
        elif kind == "wide_k":
            self.device = MHATokenToKVPool(
                tokens, page_size, element, 2, 48, LAYERS, "cpu", False, v_head_dim=32
            )
            self.host = AsymmetricMHATokenToKVPoolHost(
                self.device._mha_buffer_info(), 2.0, 0, page_size, layout, **size
            )
        else:
            self.device = MLATokenToKVPool(tokens, page_size, element, 64, 16, LAYERS, "cpu", False)
            ranks, rank = (3, 1) if kind == "dcp" else (1, 0)
            self.host = MLATokenToKVPoolHost(
                self.device._mla_buffer_info(),
                2.0,
                0,
                page_size * ranks,
                layout,
                dcp_size=ranks,
                dcp_rank=rank,
                target_layer_num=LAYERS,
                **size,
            )
        for _, rows in self.views():
            rows.view(torch.uint8).random_(0, 256)
        for buffer in host_buffers(self.host):
            buffer.view(torch.uint8).fill_(0xA5)

    def rows_of(self, indices: Any) -> Any:
        """Rows that SGLang's copy takes for these indices."""
        from sglang.srt.layers.dcp.layout import maybe_dcp_kernel_indices

        return maybe_dcp_kernel_indices(
            indices, getattr(self.host, "dcp_size", 1), getattr(self.host, "dcp_rank", 0)
        )

    def views(self) -> list[tuple[Any, Any]]:
        """(host rows, device rows) of each component and layer; host rows as SGLang itself indexes them."""
        if hasattr(self.device, "k_buffer"):
            return [
                *zip(self.host.k_data_refs, self.device.k_buffer, strict=True),
                *zip(self.host.v_data_refs, self.device.v_buffer, strict=True),
            ]
        return list(zip(self._mla_refs(), self.device.kv_buffer, strict=True))

    def _mla_refs(self) -> list[Any]:
        if self.host.layout == "page_first_direct":
            return [self.host.kv_buffer[:, layer] for layer in range(LAYERS)]
        return list(self.host.data_refs)

    def assert_copied(self, host_slots: Any, device_slots: Any, rows: Sequence[Any] | None = None) -> None:
        """The host pool holds these rows of the device pool (of ``rows``, if given), and poison elsewhere."""
        import torch

        page = self.host.page_size
        host_slots, device_slots = self.rows_of(host_slots), self.rows_of(device_slots)
        for nth, (host, device) in enumerate(self.views()):
            if rows is not None:
                device = rows[nth]
            got = host.view(torch.uint8)
            # page_first_direct: SGLang's views are [page, offset, ...].
            paged = self.host.layout == "page_first_direct"
            copied = got[host_slots // page, host_slots % page] if paged else got[host_slots]
            assert torch.equal(copied, device[device_slots].view(torch.uint8))
            flat = got.reshape(self.host.size, -1)
            untouched = torch.ones(self.host.size, dtype=torch.bool)
            untouched[host_slots] = False
            assert bool((flat[untouched] == 0xA5).all()), "bytes outside the transfer changed"


def engine_of(pools: Pools) -> Any:
    from sglang.srt.mem_cache.l2_transfer import L2TransferEngine

    return L2TransferEngine("direct" if pools.host.layout == "page_first_direct" else "kernel")


def submit(writeback: WriteBack, pools: list[Pools], slots: list[tuple[Any, Any]]) -> Any:
    from sglang.srt.mem_cache.l2_transfer import L2Transfer, L2TransferEngine

    engine = engine_of(pools[0])
    transfers = [L2Transfer(p.host, p.device, h, d) for p, (h, d) in zip(pools, slots, strict=True)]
    return writeback.submit(L2TransferEngine.submit_device_to_host, engine, transfers)


def write_back(name: str, forwards: tuple[str, ...] = ()) -> WriteBack:
    device = CpuDevice()
    backend = get_backend(name)(device, {"staging_mb": 1})
    return WriteBack(device, one_route(backend, forwards), fences(device))


def random_slots(pools: Pools, pages: int, seed: int = 0) -> tuple[Any, Any]:
    """Whole host pages and device pages, fragmented, as SGLang allocates them."""
    import torch

    rng = np.random.default_rng(seed)
    page = pools.host.page_size

    def some(total: int) -> Any:
        picked = rng.permutation(total // page)[:pages]
        page_of = page * getattr(pools.host, "dcp_size", 1)
        return torch.from_numpy((picked[:, None] * page_of + np.arange(page_of)).reshape(-1))

    return some(pools.host.size), some(pools.tokens)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize(("kind", "layout"), CASES)
@pytest.mark.parametrize("name", OWN_NAMES)
def test_sglangs_pools_byte_for_byte(name: str, kind: str, layout: str, page_size: int) -> None:
    pools = Pools(kind, layout, page_size)
    slots = random_slots(pools, min(DEVICE_TOKENS // page_size, 40))
    writeback = write_back(name)
    completion = submit(writeback, [pools], [slots])
    pools.assert_copied(*slots)
    assert completion.finish_event.query()
    assert writeback.pools.fallbacks() == []
    assert writeback.counters.bytes == len(slots[0]) * pools.host.size_per_token
    assert writeback.counters.producer_fences == 1


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("kind", "layout"), DCP_CASES)
@pytest.mark.parametrize("name", OWN_NAMES)
def test_rows_that_ranks_share_byte_for_byte(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: str, layout: str, page_size: int
) -> None:
    pools = Pools(kind, layout, page_size)
    slots = random_slots(pools, 7)
    with monkeypatch.context() as older:
        older.setattr(versions, "installed", lambda: "0.5.22")
        assert not write_back(name).pools.serves(pools.host)
    writeback = write_back(name)
    submit(writeback, [pools], [slots])
    pools.assert_copied(*slots)
    assert writeback.pools.fallbacks() == []
    assert writeback.counters.bytes == 7 * page_size * pools.host.size_per_token


def test_page_head_through_hybrid() -> None:
    import torch

    pools = Pools("mha", "page_head", 16)
    host_slots, device_slots = random_slots(pools, 5)
    submit(write_back("hybrid"), [pools], [(host_slots, device_slots)])
    for component, buffers in zip(
        pools.host.kv_buffer, (pools.device.k_buffer, pools.device.v_buffer), strict=True
    ):
        for layer, rows in enumerate(buffers):
            # (P, H, page, L, D) -> [slot, H, D]
            got = component[:, :, :, layer].permute(0, 2, 1, 3)[host_slots // 16, host_slots % 16]
            assert torch.equal(got.view(torch.uint8), rows[device_slots].view(torch.uint8))


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_other_element_types(dtype: str) -> None:
    pools = Pools("mha", "page_first", 16, dtype)
    slots = random_slots(pools, 5)
    submit(write_back("hybrid"), [pools], [slots])
    pools.assert_copied(*slots)


@pytest.mark.parametrize("name", OWN_NAMES)
def test_one_submission_with_two_pools(name: str) -> None:
    first, second = Pools("mha", "page_first", 16), Pools("mla", "page_first", 16)
    slots = [random_slots(first, 5, seed=1), random_slots(second, 7, seed=2)]
    submit(write_back(name), [first, second], slots)
    first.assert_copied(*slots[0])
    second.assert_copied(*slots[1])


@pytest.mark.parametrize("label", ["swa", "draft_swa"])
def test_rows_of_sliding_layers_that_a_release_does_not_hold_are_left_to_sglang(
    label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have them before a later gap between forwards has read them; window_cases.py has why."""
    host = Pools("mha", "page_first", 16).host
    held = [release.version for release in versions.RELEASES if release.windows_held]
    assert held == ["0.5.22", "0.5.23"]
    for release in versions.RELEASES:
        monkeypatch.setattr(versions, "installed", lambda number=release.version: number)
        host.pool_label = "full"
        assert describe_pool(host).label == "full"
        host.pool_label = label
        if release.windows_held:
            assert describe_pool(host).label == label
        else:
            with pytest.raises(UnsupportedPoolError, match="not known to hold rows of sliding layers"):
                describe_pool(host)


class TestFallback:
    """A pool that we do not cover goes SGLang's way, counts as SM work, and says why once."""

    @pytest.fixture
    def pools(self, monkeypatch: pytest.MonkeyPatch) -> Pools:
        from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

        class SomeOtherPoolHost(MHATokenToKVPoolHost):
            calls: ClassVar[list[str]] = []

            def backup_from_device_all_layer(
                self, device_pool: Any, host_indices: Any, device_indices: Any, io_backend: str
            ) -> None:
                self.calls.append(io_backend)

        pools = Pools("mha", "page_first", 16)
        pools.host.__class__ = SomeOtherPoolHost
        return pools

    def test_it_is_not_described(self, pools: Pools) -> None:
        with pytest.raises(UnsupportedPoolError, match="SomeOtherPoolHost is not a plain MHA or MLA pool"):
            describe_pool(pools.host)

    def test_sglangs_copy_runs_and_forwards_are_fenced_behind_it(
        self, pools: Pools, caplog: pytest.LogCaptureFixture
    ) -> None:
        writeback = write_back("copy_engine", ("decode",))
        for _ in range(2):
            submit(writeback, [pools], [random_slots(pools, 2)])
        assert pools.host.calls == ["kernel", "kernel"]
        assert writeback.counters.fallback_writes == 2
        # copy_engine itself has no SM work; SGLang's path has, here on two engines' transfer streams.
        assert writeback.fences.before_forward(frozenset({"decode"})) == 2
        assert writeback.fences.before_forward(frozenset({"decode"})) == 0
        said = [r.message for r in caplog.records if "goes through SGLang's own path" in r.message]
        assert len(said) == 1


def test_an_error_in_a_backend_reaches_sglang_and_nothing_is_acknowledged() -> None:
    class Failing(Backend):
        name = "failing"

        def supports(self, geometry: Any) -> None:
            return None

        def prepare(self, geometry: Any) -> None:
            pass

        def submit(self, transfer: Transfer, stream: Any) -> Submission:
            raise ValueError("no")

    pools = Pools("mha", "page_first", 16)
    device = CpuDevice()
    with pytest.raises(ValueError, match="no"):
        submit(WriteBack(device, one_route(Failing()), fences(device)), [pools], [random_slots(pools, 2)])


def test_indices_out_of_range_are_refused() -> None:
    import torch

    pools = Pools("mha", "page_first", 16)
    beyond = torch.tensor([pools.host.size])
    with pytest.raises(ValueError, match="kv host index"):
        submit(write_back("hybrid"), [pools], [(beyond, torch.tensor([0]))])


def test_a_pool_that_got_new_memory_is_described_again() -> None:
    pools = Pools("mha", "page_first", 16)
    writeback = write_back("copy_engine")
    slots = random_slots(pools, 2)
    submit(writeback, [pools], [slots])
    pools.host.kv_buffer = pools.host.kv_buffer.clone()
    pools.host._initialize_transfer_views(pools.device._mha_buffer_info(), None)
    other = random_slots(pools, 3, seed=5)
    import torch

    pools.host.kv_buffer.view(torch.uint8).fill_(0xA5)
    submit(writeback, [pools], [other])
    pools.assert_copied(*other)
