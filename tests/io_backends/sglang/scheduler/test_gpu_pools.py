"""SGLang's own host pools and transfer engine on a GPU, our routing on the real device: bytes and events.

Runs with the SGLang installed, or with the one that ``bench/lab/gpu_bundle.py`` packs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu import why_not
from stand_in_scheduler import fences

from sglang_hicache.bench.measure import sglang_pools
from sglang_hicache.io_backends import get_backend
from sglang_hicache.io_backends.device.cuda import CudaDevice
from sglang_hicache.io_backends.registry import OWN_NAMES
from sglang_hicache.io_backends.routes import Route, one_route
from sglang_hicache.io_backends.sglang.scheduler import kernels
from sglang_hicache.io_backends.sglang.scheduler.writeback import WriteBack

WHY_NOT = why_not("sglang")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.usefixtures("gpu_sglang"),
]
if WHY_NOT is None:
    import torch

POISON = 0xA5
LAYERS = 3
TOKENS = 2048
LONG = 100_000_000
"""Cycles that a stream sleeps so that others get far ahead: 50 ms at 2 GHz."""
LAYOUTS = ("layer_first", "page_first", "page_first_direct")
BOTH = ("extend", "decode")
DTYPES = ("bfloat16", "float8_e4m3fn")
# (K, V) or (latent, rope) widths of a head, and heads. Rows of 512 bytes in bf16, 256 in fp8, unless named.
MHA, MLA = ("mha", 4, 64, 64), ("mla", 1, 192, 64)
WIDE_K = ("wide_k", 4, 96, 64)
QWEN3_8B, DEEPSEEK_V3 = ("mha", 8, 128, 128), ("mla", 1, 512, 64)
Shape = tuple[str, int, int, int]


@pytest.fixture(scope="module")
def gpu_sglang() -> None:
    """SGLang's kernels for the rows of these tests, compiled side by side."""
    reason = sglang_pools.why_not()
    if reason is not None:
        pytest.skip(reason)
    failed = sglang_pools.compile_kernels([256, 512, 768, 1152, 2048])
    assert not failed


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


@pytest.fixture
def made() -> Iterator[Callable[..., Pools]]:
    """Makes pools, and unpins what they pinned."""
    pools: list[Pools] = []

    def make(*args: Any, **fields: Any) -> Pools:
        pools.append(Pools(*args, **fields))
        return pools[-1]

    yield make
    torch.cuda.synchronize()
    for each in pools:
        each.host.destroy()


class Pools:
    """A device pool of random rows on the GPU, and its host pool, registered by SGLang, full of poison."""

    def __init__(
        self, shape: Shape, layout: str, page_size: int, dtype: str = "bfloat16", tokens: int = TOKENS
    ) -> None:
        from sglang.srt.mem_cache import memory_pool
        from sglang.srt.mem_cache.pool_host import mha, mla

        kind, heads, first, second = shape
        self.tokens = tokens
        size = {"device_capacity_tokens": tokens, "start_layer": 0, "end_layer": LAYERS}
        rest = (2.0, 0, page_size, layout)
        args = (tokens, page_size, getattr(torch, dtype))
        self.device: Any
        self.host: Any
        if kind == "mla":
            self.device = memory_pool.MLATokenToKVPool(*args, first, second, LAYERS, "cuda", False)
            self.host = mla.MLATokenToKVPoolHost(
                self.device._mla_buffer_info(), *rest, target_layer_num=LAYERS, **size
            )
            self.components = [list(self.device.kv_buffer)]
        else:
            self.device = memory_pool.MHATokenToKVPool(
                *args, heads, first, LAYERS, "cuda", False, v_head_dim=second
            )
            host = mha.MHATokenToKVPoolHost if kind == "mha" else mha.AsymmetricMHATokenToKVPoolHost
            self.host = host(self.device._mha_buffer_info(), *rest, **size)
            self.components = [list(self.device.k_buffer), list(self.device.v_buffer)]
        for layers in self.components:
            for rows in layers:
                rows.view(torch.uint8).random_(0, 256)
        torch.cuda.synchronize()
        for buffer in self.buffers():
            assert buffer.is_pinned()
            buffer.view(torch.uint8).fill_(POISON)

    def buffers(self) -> list[Any]:
        """Host memory of each component."""
        buffer = self.host.kv_buffer
        if isinstance(buffer, tuple | list):
            return list(buffer)
        return list(buffer) if len(self.components) > 1 else [buffer]

    def by_token(self, buffer: Any) -> Any:
        """``buffer`` as bytes [layer, slot, byte of the row], as SGLang's pools index it."""
        got = buffer.view(torch.uint8)
        if self.host.layout == "page_head":  # (P, H, page, L, D)
            got = got.permute(3, 0, 2, 1, 4)
        elif self.host.layout != "layer_first":  # (P, L, page, H, D) or (T, L, H, D)
            got = got.transpose(0, 1)
        return got.reshape(LAYERS, self.host.size, -1)

    def assert_copied(self, host_slots: Any, device_slots: Any, rows: list[list[Any]] | None = None) -> None:
        """The host pool holds these device rows (of ``rows``, if given), and poison everywhere else."""
        where = device_slots.to("cuda")
        for buffer, layers in zip(self.buffers(), rows or self.components, strict=True):
            expected = torch.full_like(self.by_token(buffer), POISON)
            for layer, source in enumerate(layers):
                expected[layer, host_slots] = source[where].cpu().view(torch.uint8).flatten(1)
            assert torch.equal(self.by_token(buffer), expected)

    def slots(self, tokens: int, seed: int) -> tuple[Any, Any]:
        """(host indices on the host, device indices on the GPU): whole pages in runs of random length."""
        page = self.host.page_size
        rng = np.random.default_rng(seed)

        def some(total: int) -> Any:
            pages = np.arange(total // page)
            runs = np.split(pages, np.sort(rng.choice(len(pages), len(pages) // 4, replace=False)))
            order = rng.permutation(len(runs))
            picked = np.concatenate([runs[nth] for nth in order])[: tokens // page]
            return torch.from_numpy((picked[:, None] * page + np.arange(page)).reshape(-1))

        return some(self.host.size), some(self.tokens).cuda()


class Scheduler:
    """What of SGLang's scheduler a write-back needs: a controller, an engine, a forward stream."""

    def __init__(
        self,
        device: CudaDevice,
        name: str,
        pools: list[Pools],
        forwards: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        from sglang.srt.managers.cache_controller import HiCacheController
        from sglang.srt.mem_cache.l2_transfer import L2TransferEngine

        io_backend = "direct" if pools[0].host.layout == "page_first_direct" else "kernel"
        self.engine = L2TransferEngine(io_backend)
        self.forward = torch.cuda.Stream()
        # The least ring that hybrid takes is 1 MiB: larger writes go round it.
        backend = get_backend(name)(device, {"staging_mb": 1, **options})
        self.writeback = WriteBack(device, one_route(backend, forwards), fences(device, self.forward))
        self.controllers: list[Any] = []
        for each in pools:
            controller = object.__new__(HiCacheController)
            controller.io_backend = io_backend
            controller.device = "cuda"
            controller.mem_pool_host = each.host
            self.controllers.append(controller)
        self.pools = pools

    def use_routes(self, device: CudaDevice, first_holds: Any, names: tuple[str, str]) -> None:
        first, last = (get_backend(name)(device, {}) for name in names)
        routes = (Route(first, frozenset(), first_holds), *one_route(last))
        self.writeback = WriteBack(device, routes, fences(device, self.forward))

    def write(self, slots: list[tuple[Any, Any]]) -> Any:
        """One submission of all pools, indices moved as ``start_writing`` does. Returns its completion."""
        from sglang.srt.managers.cache_controller import HiCacheController
        from sglang.srt.mem_cache.l2_transfer import L2Transfer, L2TransferEngine

        transfers = []
        for controller, pools, (host, rows) in zip(self.controllers, self.pools, slots, strict=True):
            operation: Any = SimpleNamespace(host_indices=host, device_indices=rows, pool_transfers=None)
            host, rows, _ = self.writeback.move_write_operation(
                HiCacheController._move_write_operation, controller, operation
            )
            transfers.append(L2Transfer(pools.host, pools.device, host, rows))
        return self.writeback.submit(L2TransferEngine.submit_device_to_host, self.engine, transfers)


def assert_event_works(completion: Any, wait: str = "synchronize") -> None:
    """``finish_event`` does all that SGLang asks of it."""
    event = completion.finish_event
    if wait == "synchronize":
        event.synchronize()
    deadline = time.monotonic() + 20
    while not event.query():
        assert time.monotonic() < deadline, "finish_event never became complete"
        time.sleep(0.001)
    assert completion.timing_enabled
    assert completion.start_event.elapsed_time(event) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [MHA, MLA], ids=lambda shape: shape[0])
@pytest.mark.parametrize("name", OWN_NAMES)
def test_byte_for_byte(
    device: CudaDevice,
    made: Callable[..., Pools],
    name: str,
    shape: Shape,
    layout: str,
    page_size: int,
    dtype: str,
) -> None:
    pools = made(shape, layout, page_size, dtype)
    scheduler = Scheduler(device, name, [pools])
    for seed, tokens in enumerate((64, 1024)):
        slots = pools.slots(tokens, seed)
        for buffer in pools.buffers():
            buffer.view(torch.uint8).fill_(POISON)
        assert_event_works(scheduler.write([slots]))
        pools.assert_copied(*slots)
    counters = scheduler.writeback.counters
    assert scheduler.writeback.pools.fallbacks() == []
    assert (counters.writes, counters.fallback_writes) == (2, 0)
    assert counters.bytes == (64 + 1024) * pools.host.size_per_token


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("shape", [MHA, MLA, QWEN3_8B], ids=["mha", "mla", "Qwen3-8B"])
def test_byte_for_byte_by_host_slot(
    device: CudaDevice,
    made: Callable[..., Pools],
    monkeypatch: pytest.MonkeyPatch,
    shape: Shape,
    page_size: int,
) -> None:
    """What long writes of short rows get, and a forward in flight beside it."""
    for name, value in (("FROM", 0), ("SPAN", 0), ("BELOW", 2**30)):
        monkeypatch.setattr(kernels, f"ORDER_{name}_BYTES", value)
    pools = made(shape, "layer_first", page_size)
    scheduler = Scheduler(device, "fenced_kernel", [pools], BOTH)
    assert scheduler.writeback.pools.serves(pools.host)  # before serving: loads what sorts
    scheduler.write([pools.slots(512, 0)]).finish_event.synchronize()  # SGLang may compile its kernel here
    for seed, tokens in enumerate((512, 1536)):
        slots = pools.slots(tokens, seed)
        for buffer in pools.buffers():
            buffer.view(torch.uint8).fill_(POISON)
        after = [[torch.full_like(rows, seed) for rows in layers] for layers in pools.components]
        torch.cuda.synchronize()
        with torch.cuda.stream(scheduler.forward):
            torch.cuda._sleep(LONG)
            for layers in pools.components:
                for rows in layers:
                    rows.fill_(seed)
            forward = torch.cuda.Event()
            forward.record()
        completion = scheduler.write([slots])
        assert not forward.query(), "sorting waited for the forward on the host"
        assert_event_works(completion)
        pools.assert_copied(*slots, rows=after)
    assert scheduler.writeback.counters.ordered_writes == 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [QWEN3_8B, DEEPSEEK_V3], ids=["Qwen3-8B", "DeepSeek-V3"])
@pytest.mark.parametrize("name", OWN_NAMES)
def test_rows_of_real_models(
    device: CudaDevice, made: Callable[..., Pools], name: str, shape: Shape, layout: str
) -> None:
    pools = made(shape, layout, 16)
    slots = pools.slots(1536, seed=3)
    assert_event_works(Scheduler(device, name, [pools]).write([slots]))
    pools.assert_copied(*slots)


@pytest.mark.parametrize("name", ["hybrid", "copy_engine"])
@pytest.mark.parametrize("layout", ["page_first", "page_first_direct"])
def test_k_wider_than_v(device: CudaDevice, made: Callable[..., Pools], layout: str, name: str) -> None:
    pools = made(WIDE_K, layout, 16)
    slots = pools.slots(512, seed=4)
    scheduler = Scheduler(device, name, [pools])
    assert_event_works(scheduler.write([slots]))
    pools.assert_copied(*slots)
    assert scheduler.writeback.pools.fallbacks() == []


@pytest.mark.parametrize("name", OWN_NAMES)
def test_page_head(device: CudaDevice, made: Callable[..., Pools], name: str) -> None:
    pools = made(MHA, "page_head", 16)
    slots = pools.slots(512, seed=5)
    scheduler = Scheduler(device, name, [pools], BOTH)
    assert_event_works(scheduler.write([slots]))
    pools.assert_copied(*slots)
    # The other two leave it to SGLang's AOT kernel, and fence behind that.
    assert scheduler.writeback.counters.fallback_writes == (0 if name == "hybrid" else 1)
    assert scheduler.writeback.fences.before_forward(frozenset(BOTH))


@pytest.mark.parametrize("name", OWN_NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_pools_in_one_submission(
    device: CudaDevice, made: Callable[..., Pools], layout: str, name: str
) -> None:
    pools = [made(MHA, layout, 16), made(MLA, layout, 16), made(MHA, layout, 16, "float8_e4m3fn")]
    slots = [each.slots(tokens, seed=tokens) for each, tokens in zip(pools, (320, 1024, 16), strict=True)]
    scheduler = Scheduler(device, name, pools)
    assert_event_works(scheduler.write(slots))
    for each, indices in zip(pools, slots, strict=True):
        each.assert_copied(*indices)
    assert scheduler.writeback.counters.writes == 1


@pytest.mark.parametrize("name", OWN_NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_forward_in_flight_is_waited_for(
    device: CudaDevice, made: Callable[..., Pools], layout: str, name: str
) -> None:
    """Rows that a forward still has to write arrive as it writes them."""
    pools = made(MHA, layout, 16)
    slots = pools.slots(512, seed=6)
    scheduler = Scheduler(device, name, [pools])
    scheduler.write([slots])  # compiles and allocates what the first write needs
    torch.cuda.synchronize()
    for buffer in pools.buffers():
        buffer.view(torch.uint8).fill_(POISON)
    after = [[torch.full_like(rows, 0) for rows in layers] for layers in pools.components]
    torch.cuda.synchronize()
    with torch.cuda.stream(scheduler.forward):
        torch.cuda._sleep(LONG)
        for layers in pools.components:
            for rows in layers:
                rows.zero_()
    assert_event_works(scheduler.write([slots]))
    pools.assert_copied(*slots, rows=after)


@pytest.mark.parametrize("wait", ["query", "synchronize"])
@pytest.mark.parametrize("name", OWN_NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_forwards_wait(
    device: CudaDevice, made: Callable[..., Pools], layout: str, name: str, wait: str
) -> None:
    """Parts of a write that are left for a later gap between forwards arrive too, polled or waited for."""
    # 3 layers of 1 KiB a token: 12 rounds of hybrid's ring.
    pools = made(MHA, layout, 16, tokens=8192)
    slots = pools.slots(4096, seed=7)
    scheduler = Scheduler(device, name, [pools], BOTH)
    completion = scheduler.write([slots])
    assert_event_works(completion, wait)
    pools.assert_copied(*slots)


@pytest.mark.parametrize("kind", [MHA, MLA, WIDE_K])
@pytest.mark.parametrize("page", [1, 16])
def test_each_write_takes_its_route(
    device: CudaDevice,
    made: Callable[..., Pools],
    monkeypatch: pytest.MonkeyPatch,
    kind: Shape,
    page: int,
) -> None:
    """One run by the gather, scattered ones by SGLang's SM kernel, which needs its indices on the GPU."""
    from sglang.srt.mem_cache.pool_host import mha, mla

    def not_this(*args: Any, **named: Any) -> None:
        raise AssertionError("the staged path")

    for module in (mha, mla):
        for name in vars(module).copy():
            if "staged_lf_pf" in name:
                monkeypatch.setattr(module, name, not_this)
    pools = made(kind, "page_first", page)
    before = pools.host.can_use_write_back_jit
    scattered = pools.slots(512, seed=9)
    one_run = (torch.arange(256, 768), scattered[1])
    scheduler = Scheduler(device, "hybrid", [pools])
    scheduler.use_routes(device, lambda write: write.contiguous, ("hybrid", "fenced_kernel"))
    for slots in (scattered, one_run, scattered):
        for buffer in pools.buffers():
            buffer.view(torch.uint8).fill_(POISON)
        assert_event_works(scheduler.write([slots]))
        pools.assert_copied(*slots)
    assert scheduler.writeback.counters.by_backend == {"hybrid": 1, "fenced_kernel": 2}
    assert scheduler.writeback.pools.fallbacks() == []
    assert pools.host.can_use_write_back_jit == before


@pytest.mark.parametrize("layout", ["layer_first", "page_first"])
@pytest.mark.parametrize("quota", [1, 3])
def test_a_limit_on_thread_blocks(
    device: CudaDevice, made: Callable[..., Pools], layout: str, quota: int
) -> None:
    pools = made(QWEN3_8B, layout, 16)
    assert kernels.build_limited(pools.host, quota)
    slots = pools.slots(512, seed=10)
    scheduler = Scheduler(device, "fenced_kernel", [pools], block_quota=quota)
    assert_event_works(scheduler.write([slots]))
    pools.assert_copied(*slots)


@pytest.mark.parametrize("name", OWN_NAMES)
def test_many_writes_without_waiting(device: CudaDevice, made: Callable[..., Pools], name: str) -> None:
    pools = made(MHA, "page_first", 16)
    host, rows = pools.slots(1024, seed=8)
    scheduler = Scheduler(device, name, [pools])
    completions = [scheduler.write([part]) for part in zip(host.split(128), rows.split(128), strict=True)]
    completions[-1].finish_event.synchronize()
    assert all(each.finish_event.query() for each in completions)
    pools.assert_copied(host, rows)
