"""Where indices go and which events forwards wait for, when a write has several pools."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from stand_in_scheduler import fences

from sglang_hicache.io_backends import Submission, Transfer, get_backend
from sglang_hicache.io_backends.copy_engine import BREAK_EVEN_ENTRY_BYTES
from sglang_hicache.io_backends.device.cpu import CpuDevice, CpuStream
from sglang_hicache.io_backends.hybrid import HybridBackend
from sglang_hicache.io_backends.interface import Backend, OptionsError
from sglang_hicache.io_backends.plan.geometry import Component, PoolGeometry, host_strides
from sglang_hicache.io_backends.registry import OWN_NAMES
from sglang_hicache.io_backends.routes import Route, one_route, routes_of
from sglang_hicache.io_backends.sglang.pools import geometry as pool_geometry
from sglang_hicache.io_backends.sglang.pools.errors import UnsupportedPoolError
from sglang_hicache.io_backends.sglang.scheduler import kernels, pool_registry, writeback
from sglang_hicache.io_backends.sglang.scheduler.indices import PlainIndices
from sglang_hicache.io_backends.sglang.scheduler.writeback import WriteBack
from sglang_hicache.policy.routes import WriteFacts, WriteRoute

LAYOUTS = ("layer_first", "page_first", "page_first_direct")


class L2Transfer(NamedTuple):
    """SGLang's, as far as it is used."""

    host_pool: Any
    device_pool: Any
    host_indices: Any
    device_indices: Any


class Named(Backend):
    """A backend that notes what it is given."""

    staging_bytes: tuple[int, int] = (0, 0)
    waiting_bytes: int = 0

    def __init__(
        self, name: str = "any", *, layouts: tuple[str, ...] = LAYOUTS, upstream: bool = False
    ) -> None:
        self.name = name
        self.upstream_indices = upstream
        self.prepared: list[Any] = []
        self.given: list[Transfer] = []
        self._layouts = layouts

    def supports(self, geometry: Any) -> str | None:
        return None if geometry.layout in self._layouts else f"{self.name} does not know {geometry.layout}"

    def prepare(self, geometry: Any) -> None:
        self.prepared.append(geometry)

    def submit(self, transfer: Transfer, stream: Any) -> Submission:
        self.given.append(transfer)
        if self.upstream_indices:
            transfer.upstream_copy()
        return Submission(copies=4, nbytes=transfer.tokens * 1024, sm_done=object())


def router() -> PlainIndices:
    return PlainIndices(lambda host_pool: bool(host_pool.ours))


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
    both = WriteBack(device, one_route(Named()), fences(device))
    # Neither is a kind of pool that is known, so neither is ours; nothing changes.
    pools = [SimpleNamespace(pool_label="kv"), SimpleNamespace(pool_label="draft")]
    both.pools.serve_alike(pools)
    assert [both.pools.serves(each) for each in pools] == [False, False]
    # One that ours does not serve takes the other with it: there is one pair of index vectors for both.
    some = WriteBack(device, one_route(Named(layouts=("page_first",))), fences(device))
    pools = [HostPool("page_first"), HostPool("layer_first")]
    some.pools.serve_alike(pools)
    assert [some.pools.serves(each) for each in pools] == [False, False]
    assert "shares its indices" in some.pools.fallbacks()[0]
    some.pools.serve_alike(alike := [HostPool("page_first"), HostPool("page_first")])
    assert [some.pools.serves(each) for each in alike] == [True, True]


def test_a_draft_pools_indices_are_moved_as_its_targets_are(operation: SimpleNamespace) -> None:
    """0.5.18 keeps the draft's pool apart, and submits it with the target's indices."""
    target, draft = pool(ours=True), pool(ours=True)
    controller = SimpleNamespace(
        mem_pool_host=target,
        mem_pool_host_draft=draft,
        io_backend="kernel",
        move_indices=lambda host, device: (f"moved {host}", device),
    )
    operation.pool_transfers = None
    plain = router()
    assert plain.move_write_operation(sglangs_own, controller, operation) == ("host", "device", None)
    for each in (target, draft):
        move = plain.move_of(each)
        assert move is not None
        assert move("host", "device", may_stage=False) == ("moved host", "device")


class HostPool:
    """A host pool of SGLang's, as far as a write sees it. Described as it says itself (see `described`)."""

    pool_label = "kv"
    size_per_token = 1024
    can_use_write_back_jit = True
    can_use_jit = True
    _strided_device_row_bytes = None
    token_stride_size = 256

    def __init__(self, layout: str = "page_first", row_bytes: int = 256) -> None:
        self.layout = layout
        self.row_bytes = row_bytes
        self.copied: list[tuple[Any, Any, bool, int | None]] = []

    def backup_from_device_all_layer_physical(self, _pool: Any, host: Any, device: Any, io: str) -> None:
        self.copied.append((host, device, self.can_use_write_back_jit, self._strided_device_row_bytes))


class Indices(np.ndarray):
    is_cuda = False


def indices(*values: int) -> Any:
    return np.array(values, dtype=np.int64).view(Indices)


class Noting(CpuDevice):
    """Tells its events apart, and which were recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Any] = []

    def record(self, stream: Any) -> Any:
        self.recorded.append(object())
        return self.recorded[-1]


class Finish:
    """An event, as far as a completion uses it."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded_on: list[Any] = []

    def record(self, stream: Any = None) -> None:
        self.recorded_on.append(stream)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass


class Write:
    """Several writes of one pool through routes, with a controller's move and an engine's submission."""

    def __init__(self, routes: Sequence[Route], host: HostPool, io_backend: str = "kernel") -> None:
        self.device = device = Noting()
        self.writeback = WriteBack(device, routes, fences(device))
        self.controller = SimpleNamespace(
            mem_pool_host=host, mem_pool_device=None, io_backend=io_backend, move_indices=self._move
        )
        self.host = host
        self.device_pool: Any = None
        self.moves = 0
        self.recorded_before_the_move = 0
        self.as_sglang_moves = False

    def _move(self, host: Any, device: Any) -> tuple[Any, Any]:
        self.moves += 1
        self.recorded_before_the_move = len(self.device.recorded)
        return f"moved {host.tolist()}", device

    def __call__(self, host: Any, device: Any = None, pools: int = 1) -> Any:
        device = indices(*range(len(host))) if device is None else device
        operation = SimpleNamespace(host_indices=host, device_indices=device, pool_transfers=None)
        if self.as_sglang_moves:
            self.writeback.move_write_operation(sglangs_own, self.controller, operation)
        else:
            host, device, _ = self.writeback.move_write_operation(sglangs_own, self.controller, operation)
        self.engine = SimpleNamespace(
            device_to_host_stream=CpuStream(), io_backend=self.controller.io_backend
        )
        transfers = [L2Transfer(self.host, self.device_pool, host, device)] * pools
        return self.writeback.submit(self.submission, self.engine, transfers)

    @staticmethod
    def submission(engine: Any, transfers: Any) -> Any:
        for each in transfers:
            each.host_pool.backup_from_device_all_layer_physical(
                each.device_pool, each.host_indices, each.device_indices, engine.io_backend
            )
        return Completion(Finish(), timing_enabled=False)


class Completion(NamedTuple):
    """SGLang's, as far as it is used."""

    finish_event: Any
    timing_enabled: bool


class Part:
    """What a backend left for later."""

    def __init__(self) -> None:
        self.advanced: list[bool] = []
        self.ready: Any = None
        self.abandoned = self.fails = self.failed = self.finishes = self.done = self.blocked = False
        self._then: list[Any] = []

    def enqueued(self) -> bool:
        if self.failed:
            raise RuntimeError("a write to host memory failed half-way")
        return self.done or self.abandoned

    def can_advance(self) -> bool:
        return not self.enqueued() and not self.blocked

    def advance(self, ready: tuple[Any, ...], *, wait: bool = False) -> str:
        self.advanced.append(wait)
        self.ready = ready
        if self.fails:
            self.failed = True
            raise RuntimeError("cuMemcpyBatchAsync failed")
        self.done = self.finishes
        if self.done:
            self._finish()
        return "gathered"

    def abandon(self) -> None:
        self.abandoned = True
        self._finish()

    def _finish(self) -> None:
        for action in self._then:
            action()
        self._then.clear()

    def then(self, action: Any) -> None:
        self._then.append(action)


class Later(Named):
    """Leaves all of a write for later, and fails when it is given three tokens."""

    def __init__(self) -> None:
        super().__init__("later")
        self.left: list[Part] = []

    def submit(self, transfer: Transfer, stream: Any) -> Submission:
        if transfer.tokens == 3:
            raise RuntimeError("cuMemcpyBatchAsync failed")
        self.left.append(Part())
        return Submission(1, 1024, pending=self.left[-1])


@pytest.fixture(autouse=True)
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    """`HostPool` is a pool of 4 layers of 256 bytes, in its layout, without memory."""

    def describe(pool: HostPool) -> PoolGeometry:
        if not isinstance(pool, HostPool):
            raise UnsupportedPoolError("not a kind that is known")
        row = pool.row_bytes
        host = host_strides(pool.layout, base=0, layers=4, page_size=2, slots=64, row_bytes=row, heads=1)
        part = Component("kv", row, (0, 1, 2, 3), row, host)
        return PoolGeometry("kv", "mla", pool.layout, "uint8", 1, 4, 2, 64, 64, (part,))

    monkeypatch.setattr(pool_registry, "describe_pool", describe)
    monkeypatch.setattr(pool_registry, "fingerprint", id)


def long_entries(write: WriteFacts) -> bool:
    return write.entry_bytes >= 4096


class TestRoutes:
    def test_each_write_takes_the_first_that_holds(self) -> None:
        far, near = Named("far"), Named("near")
        write = Write([Route(far, frozenset(), long_entries), *one_route(near)], HostPool())
        write(indices(8, 9, 10, 11))  # one copy of 4 rows of 4 layers
        write(indices(8, 10, 12, 14))  # four copies
        write(indices(20, 21, 22, 23, 24))
        assert [list(each.host_slots) for each in far.given] == [[8, 9, 10, 11], [20, 21, 22, 23, 24]]
        assert [list(each.host_slots) for each in near.given] == [[8, 10, 12, 14]]
        assert write.writeback.counters.by_backend == {"far": 2, "near": 1}
        assert write.moves == 0

    def test_a_write_for_sglangs_kernel_gets_its_indices_moved_and_no_staging(self) -> None:
        ours, kernel = Named("ours"), Named("kernel", upstream=True)
        host = HostPool()
        write = Write([Route(ours, frozenset(), long_entries), *one_route(kernel)], host)
        write(indices(8, 9, 10, 11))
        assert write.moves == 0
        write(indices(8, 10, 12, 14))
        assert write.moves == 1
        (copied,) = host.copied
        assert copied[0] == "moved [8, 10, 12, 14]"
        assert copied[2:] == (False, 256), "the SM kernel, packed rows strided by their own width"
        assert (host.can_use_write_back_jit, host._strided_device_row_bytes) == (True, None)

    @pytest.mark.parametrize(
        ("io_backend", "layout", "slots", "order"),
        [
            ("kernel", "layer_first", (12, 8, 10), (8, 10, 12)),
            ("kernel", "layer_first", (8, 10, 12), (8, 10, 12)),
            ("kernel", "page_first", (12, 8, 10), (12, 8, 10)),
            ("direct", "layer_first", (12, 8, 10), (12, 8, 10)),  # sorts them itself
        ],
    )
    def test_sglangs_kernel_gets_short_rows_by_host_slot(
        self,
        monkeypatch: pytest.MonkeyPatch,
        io_backend: str,
        layout: str,
        slots: tuple[int, ...],
        order: tuple[int, ...],
    ) -> None:
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(kernels, "ORDER_FROM_BYTES", 0)
        monkeypatch.setattr(kernels, "ORDER_SPAN_BYTES", 0)
        host, rows = HostPool(layout), torch.tensor([3, 1, 2])
        write = Write(one_route(Named("kernel", upstream=True)), host, io_backend)
        write.controller.move_indices = lambda host, device: (host, device)
        write(torch.tensor(slots), rows)
        ((to, source, *_),) = host.copied
        assert tuple(to.tolist()) == order
        assert dict(zip(to.tolist(), source.tolist(), strict=True)) == dict(
            zip(slots, (3, 1, 2), strict=True)
        )
        assert write.writeback.counters.ordered_writes == (slots != order)

    def test_writes_of_ours_and_fallbacks_keep_their_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "ORDER_FROM_BYTES", 0)
        monkeypatch.setattr(kernels, "ORDER_SPAN_BYTES", 0)
        ours = Named("ours")
        write = Write(one_route(ours), HostPool("layer_first"))
        write(indices(12, 8, 10))
        assert list(ours.given[0].host_slots) == [12, 8, 10]
        host = HostPool("layer_first")
        write = Write([*one_route(Named("never", layouts=(), upstream=True)), *one_route(ours)], host)
        write(indices(12, 8, 10))
        assert [each[0] for each in host.copied] == ["moved [12, 8, 10]"]
        assert write.writeback.counters.ordered_writes == 0

    def test_a_backend_that_cannot_serve_the_pool_leaves_its_writes_to_sglang(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        never, ours = Named("never", layouts=()), Named("ours")
        host = HostPool()
        write = Write([Route(never, frozenset({"decode"}), long_entries), *one_route(ours)], host)
        write(indices(8, 9, 10, 11))
        write(indices(8, 10))
        assert never.given == never.prepared == []
        assert len(ours.given) == 1
        # The staged path takes host indices on the host, so nothing was moved.
        assert [(list(each[0]), each[2]) for each in host.copied] == [([8, 9, 10, 11], True)]
        assert write.writeback.counters.by_backend == {"upstream": 1, "ours": 1}
        assert write.writeback.pools.fallbacks() == ["never does not know page_first"]
        assert [record.getMessage() for record in caplog.records] == [
            "sglang-hicache-io: what never was chosen for in pool kv goes through SGLang's own path, fenced: "
            "never does not know page_first"
        ]
        # SGLang's kernels may run beside whatever any route fences.
        assert write.writeback.fences.before_forward(frozenset({"decode"})) == 1

    @pytest.mark.parametrize("io_backend", ["kernel", "direct"])
    @pytest.mark.parametrize(
        ("layout", "slots", "whole"),
        [
            ("page_first_direct", (4, 5, 2, 3), True),
            ("page_first_direct", (), True),
            ("page_first_direct", (4, 5, 2), False),  # of two
            ("page_first_direct", (5, 6), False),
            ("page_first_direct", (5, 4), False),
            ("page_first_direct", (4, 6), False),
            ("page_first", (5, 9, 4), True),  # has no pages
        ],
    )
    def test_a_write_that_is_not_whole_pages_takes_sglangs_own_way_and_is_counted(
        self, io_backend: str, layout: str, slots: tuple[int, ...], whole: bool
    ) -> None:
        ours, host, fell_back = Named("ours"), HostPool(layout), []
        ours.whole_pages = True  # type: ignore[attr-defined]
        write = Write(one_route(ours, ("extend",)), host, io_backend)
        write.writeback.metrics = SimpleNamespace(  # type: ignore[assignment]
            on_its_way=lambda *_: None,
            wrote=lambda *_, **__: None,
            fell_back=lambda *given: fell_back.append(given),
        )
        write(indices(*slots))
        assert [list(each.host_slots) for each in ours.given] == ([list(slots)] if whole else [])
        counters = write.writeback.counters
        assert counters.fallback_writes == len(host.copied) == len(fell_back) == (not whole)
        if not whole:
            ((to, *_),) = host.copied
            assert to == f"moved {list(slots)}", "indices as SGLang's own copy wants them"
            assert fell_back == [("kv", writeback.NOT_WHOLE)]
            # Its kernels may run beside whatever any route fences.
            assert write.writeback.fences.before_forward(frozenset({"extend"})) == 1
        # The next one is ours again.
        write(indices(8, 9))
        assert [list(each.host_slots) for each in ours.given][-1] == [8, 9]

    def test_hybrid_is_given_whole_pages_only_and_the_others_anything(self) -> None:
        device = CpuDevice()
        given = {name: get_backend(name)(device, {}) for name in OWN_NAMES}
        assert {name for name, each in given.items() if getattr(each, "whole_pages", False)} == {"hybrid"}

    def test_short_entries_are_counted(self) -> None:
        write = Write(one_route(Named()), HostPool())
        write(indices(*range(8)))
        assert write.writeback.counters.short_entry_writes == 1
        write(indices(*range(4 * BREAK_EVEN_ENTRY_BYTES // 1024)))
        assert write.writeback.counters.short_entry_writes == 1

    def test_one_instance_for_routes_with_the_same_options_and_fences(self) -> None:
        def route(backend: str, fences: tuple[str, ...] = ("extend",), **options: int) -> WriteRoute:
            return WriteRoute("rule", "layer", "because", backend, fences, options, {})

        same, unfenced = route("hybrid", staging_mb=1), route("hybrid", (), staging_mb=1)
        chosen = SimpleNamespace(routes=(same, route("copy_engine"), same, unfenced))
        found = routes_of(chosen, lambda name, options: Named(name))  # type: ignore[arg-type]
        assert [each.backend.name for each in found] == ["hybrid", "copy_engine", "hybrid", "hybrid"]
        assert found[0].backend is found[2].backend
        # What one leaves for later, a write of the other would enqueue, under its own fences.
        assert found[3].backend is not found[0].backend

    def test_an_instance_with_two_sets_of_fences_is_refused(self) -> None:
        one = Named()
        with pytest.raises(ValueError, match="different fences"):
            Write([Route(one, frozenset({"extend"}), long_entries), *one_route(one)], HostPool())

    def test_indices_that_sglang_left_for_its_own_copy_are_not_given_to_its_kernel(self) -> None:
        """A controller whose move is SGLang's own: host indices may stay on the host, for the staged path."""
        kernel, host = Named("kernel", upstream=True), HostPool()
        write = Write(one_route(kernel), host)
        write.controller.is_kv_sharded = True
        write.as_sglang_moves = True
        write(indices(8, 9))
        assert kernel.given == []
        assert [(list(each[0]), each[2]) for each in host.copied] == [([8, 9], True)]

    def test_its_copy_waits_for_the_move_of_its_indices(self) -> None:
        """Moving them is work on the current stream."""
        kernel = Named("kernel", upstream=True)
        write = Write(one_route(kernel), HostPool())
        for _ in range(2):
            write(indices(8, 9))
            after = write.device.recorded[write.recorded_before_the_move :]
            assert set(kernel.given[-1].ready) <= set(after)

    @pytest.mark.parametrize("translates", [False, True])
    def test_indices_that_sglang_translates_are_left_to_its_own_copy(self, translates: bool) -> None:
        """On its transfer stream, for unified memory: before that they name other rows."""
        ours, host = Named("ours"), HostPool()
        write = Write(one_route(ours), host, "direct")
        write.as_sglang_moves = True
        translate = (lambda rows: rows) if translates else None
        write.device_pool = SimpleNamespace(host_transfer_translate=translate)
        write(indices(8, 9))
        assert [len(ours.given), len(host.copied)] == ([0, 1] if translates else [1, 0])

    def test_kernels_on_the_transfer_stream_come_before_another_pools_drain(self) -> None:
        """Behind it, a forward that waits for them would wait for the link."""
        order: list[str] = []
        ours, kernel = Named("ours"), Named("kernel", upstream=True)
        for backend in (ours, kernel):
            backend.submit = lambda transfer, stream, name=backend.name: (  # type: ignore[method-assign]
                order.append(name) or Submission(copies=1, nbytes=1, sm_done=object())
            )
        write = Write([Route(ours, frozenset(), long_entries), *one_route(kernel, ("decode",))], HostPool())
        engine = SimpleNamespace(device_to_host_stream=CpuStream(), io_backend="kernel")
        pools = {name: HostPool() for name in ("ours", "kernel", "upstream")}
        pools["upstream"].backup_from_device_all_layer_physical = (  # type: ignore[method-assign]
            lambda *_: order.append("upstream")
        )
        rows = {"ours": (8, 9, 10, 11), "kernel": (8, 10, 12, 14), "upstream": (8, 9)}
        transfers = []
        for name, host_pool in pools.items():
            slots = indices(*rows[name])
            if name == "upstream":
                slots.is_cuda, host_pool.can_use_write_back_jit = True, False
            write.controller.mem_pool_host = host_pool
            operation = SimpleNamespace(host_indices=slots, device_indices=slots, pool_transfers=None)
            moved = write.writeback.move_write_operation(sglangs_own, write.controller, operation)
            transfers.append(L2Transfer(host_pool, None, *moved[:2]))
        write.writeback.submit(write.submission, engine, transfers)
        assert sorted(order[:2]) == ["kernel", "upstream"]
        assert order[2:] == ["ours"]


def test_sorting_is_loaded_with_a_pool_that_sglangs_kernel_may_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(kernels, "prepare_order", loaded.append)
    for upstream in (False, True):
        host = HostPool("layer_first")
        assert Write(one_route(Named(upstream=upstream)), host).writeback.pools.serves(host)
        assert loaded == ([host] if upstream else [])


class TestForwardFences:
    def test_forwards_wait_for_the_routes_that_name_them(self) -> None:
        a, b = Named("a"), Named("b")
        write = Write(
            [Route(a, frozenset({"extend"}), long_entries), *one_route(b, ("extend", "decode"))], HostPool()
        )
        write(indices(8, 9, 10, 11))
        assert write.writeback.fences.before_forward(frozenset({"decode"})) == 0
        write(indices(8, 10, 12, 14))
        # Events on two streams, of which neither covers the other.
        assert write.writeback.fences.before_forward(frozenset({"extend"})) == 2
        assert write.writeback.fences.before_forward(frozenset({"extend", "decode"})) == 0

    def test_the_stream_of_an_engine_that_is_gone_is_waited_for_too(self) -> None:
        """Another engine may be made where the last one was, with its id."""
        backend = Named()
        write = Write(one_route(backend, ("decode",)), HostPool())
        for _ in range(20):
            write(indices(8, 9))
            backend.given.clear()  # what a real one is given goes with the write
        assert write.writeback.fences.before_forward(frozenset({"decode"})) == 20

    def test_nothing_is_kept_for_forwards_that_nobody_fences(self) -> None:
        write = Write(one_route(Named()), HostPool())
        write(indices(8, 9))
        assert write.writeback.fences.before_forward(frozenset({"extend", "decode"})) == 0

    def test_a_flush_leaves_its_gather_for_the_next_forward(self) -> None:
        backend = Later()
        write = Write(one_route(backend, ("decode",)), HostPool())
        completion = write(indices(8, 9))
        assert write.writeback.fences.before_forward(frozenset({"decode"})) == 0
        completion.finish_event.synchronize()
        assert backend.left[0].advanced == [True]
        assert write.writeback.fences.before_forward(frozenset({"decode"})) == 1


class TestWhatIsLeftForLater:
    def test_every_entry_point_gives_events_of_its_own(self) -> None:
        """An event from before a forward was launched lets SM work run beside it."""
        backend = Later()
        write = Write(one_route(backend, ("decode",)), HostPool())
        first, second = write(indices(8, 9)), write(indices(10, 11))
        device = write.device
        for enter in (
            write.writeback.advance,
            first.finish_event.query,
            first.finish_event.synchronize,
            second.finish_event.wait,
        ):
            device.recorded.clear()
            for part in backend.left:
                part.ready = None
            spent = write.writeback.counters.gap_seconds
            enter()
            assert write.writeback.counters.gap_seconds > spent, enter
            given = {event for part in backend.left for event in part.ready or ()}
            assert given, enter
            assert given <= set(device.recorded), enter

    def test_a_pool_that_fails_takes_the_rest_of_its_write_with_it(self) -> None:
        """SGLang gives the slots of all its pools to others then; an earlier write is not touched."""
        backend = Later()
        write = Write(one_route(backend, ("decode",)), HostPool())
        write(indices(8, 9))
        engine = SimpleNamespace(device_to_host_stream=CpuStream(), io_backend="kernel")
        transfers = [
            L2Transfer(HostPool(), None, indices(*range(tokens)), indices(*range(tokens)))
            for tokens in (2, 3)
        ]
        with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync failed"):
            write.writeback.submit(write.submission, engine, transfers)
        assert [part.abandoned for part in backend.left] == [False, True]
        # What was enqueued of it may run on the SMs.
        assert write.writeback.fences.before_forward(frozenset({"decode"})) == 1
        # The earlier one goes on.
        write.writeback.advance()
        assert [part.advanced for part in backend.left] == [[False], []]

    @pytest.mark.parametrize("how", ["advance", "query", "synchronize"])
    def test_a_part_that_fails_later_takes_the_rest_of_its_write_with_it(self, how: str) -> None:
        backend = Later()
        write = Write(one_route(backend, ("decode",)), HostPool())
        completion = write(indices(8, 9), pools=3)
        other = write(indices(10, 11))
        backend.left[0].finishes = backend.left[1].fails = True
        enter = write.writeback.advance if how == "advance" else getattr(completion.finish_event, how)
        with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync failed"):
            enter()
        assert [part.abandoned for part in backend.left[1:]] == [True, True, False]
        tried = [len(part.advanced) for part in backend.left[:3]]
        assert write.writeback.fences.before_forward(frozenset({"decode"})) >= 1
        # It is never acknowledged, and is not tried again; the other write goes on.
        for _ in range(2):
            with pytest.raises(RuntimeError, match="half-way"):
                completion.finish_event.query()
        assert not other.finish_event.query()
        write.writeback.advance()
        assert [len(part.advanced) for part in backend.left[:3]] == tried
        assert backend.left[3].advanced

    def test_an_earlier_write_that_fails_on_the_way_goes_the_same_way(self) -> None:
        """A backend goes on with what is older first, and that is what fails."""
        backend = Later()
        write = Write(one_route(backend, ("decode",)), HostPool())
        earlier, later = write(indices(8, 9), pools=2), write(indices(10, 11))
        first, rest, last = backend.left

        def fail(ready: tuple[Any, ...], *, wait: bool = False) -> Any:
            first.failed = True
            raise RuntimeError("cuMemcpyBatchAsync failed")

        last.advance = fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync failed"):
            later.finish_event.synchronize()
        assert rest.abandoned
        assert last.abandoned
        with pytest.raises(RuntimeError, match="half-way"):
            earlier.finish_event.query()

    def test_what_sglang_fails_at_behind_the_copies_ends_the_write_too(self) -> None:
        """It frees the slots then."""
        backend = Later()
        write = Write(one_route(backend, ("decode",)), HostPool())

        def submission(engine: Any, transfers: Any) -> Any:
            Write.submission(engine, transfers)
            raise RuntimeError("no event")

        write.submission = submission  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="no event"):
            write(indices(8, 9), pools=2)
        assert [part.abandoned for part in backend.left] == [True, True]
        assert write.writeback.fences.before_forward(frozenset({"decode"})) == 1
        write.writeback.before_forward()
        assert [part.advanced for part in backend.left] == [[], []]

    def test_a_write_has_nothing_to_do_with_an_earlier_one_that_fails(self) -> None:
        """Its caller would think that its host slots are free, and it would be written to them later."""
        backend = Later()
        write = Write(one_route(backend, ("decode",)), HostPool())
        first = write(indices(8, 9))
        backend.left[0].fails = True
        second = write(indices(10, 11))
        assert backend.left[0].advanced == [], "a submission polls for nobody"
        with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync failed"):
            first.finish_event.query()
        # It goes on, as do later ones; what the first one kept goes when its streams are through.
        third = write(indices(12, 13))
        write.writeback.advance()
        assert [len(part.advanced) for part in backend.left] == [1, 1, 0]
        assert len(write.writeback._in_flight) == 2
        write.writeback.abandon()
        assert second.finish_event.query()
        assert third.finish_event.query()
        write(indices(14, 15))
        assert len(write.writeback._in_flight) == 1

    def test_after_a_reset_nothing_is_left(self) -> None:
        backend = Later()
        write = Write(one_route(backend, ("decode",)), HostPool())
        completion = write(indices(8, 9), pools=2)
        write.writeback.abandon()
        assert [part.abandoned for part in backend.left] == [True, True]
        assert completion.finish_event.query()
        write.writeback.advance()
        assert [part.advanced for part in backend.left] == [[], []]


class TestGaps:
    """Where forwards wait, what a write leaves goes in the gaps before them."""

    def test_what_is_left_in_a_writes_first_gap_waits_for_the_link_in_the_second(self) -> None:
        backend = Later()
        write = Write(one_route(backend, ("decode",)), HostPool())
        write(indices(8, 9))
        (first,) = backend.left
        first.blocked = True
        write.writeback.before_forward()
        assert first.advanced == [], "nothing that its forward would wait for"
        write(indices(10, 11))
        write.writeback.advance()
        assert first.advanced == [], "nor at a poll"
        write.writeback.before_forward()
        assert first.advanced == [True]
        assert backend.left[1].advanced == [], "behind one that is not through, and in its own first gap"
        first.done = True
        write.writeback.advance()
        write.writeback.before_forward()
        assert first.advanced == [True]
        assert backend.left[1].advanced == [False, True]

    def test_backends_are_told_of_every_forward_after_the_last_chance(self) -> None:
        backend = Later()
        told: list[int] = []
        backend.launched = lambda: told.append(len(backend.left[0].advanced))  # type: ignore[method-assign]
        write = Write(one_route(backend, ("decode",)), HostPool())
        write(indices(8, 9))
        for _ in range(2):
            write.writeback.before_forward()
        assert told == [1, 2]

    def test_backends_are_started_with_the_fences_of_their_routes(self) -> None:
        started: dict[str, Any] = {}

        def note(name: str) -> Any:
            def start(**named: Any) -> str:
                started[name] = named
                return f"{name} is ready"

            return start

        fenced, free = Named("fenced"), Named("free")
        fenced.start, free.start = note("fenced"), note("free")  # type: ignore[method-assign]
        fenced.staging_bytes = free.staging_bytes = 0, 100
        write = Write([Route(fenced, frozenset({"extend"}), long_entries), *one_route(free)], HostPool())
        write.writeback.start(8192)
        assert started == {
            "fenced": {"step_tokens": 8192, "forwards_wait": True, "sharers": 2},
            "free": {"step_tokens": 8192, "forwards_wait": False, "sharers": 2},
        }


class TestGauges:
    """What metrics say is on its way."""

    def test_instances_of_one_name_are_summed_and_the_oldest_write_is_dated(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said: list[Any] = []
        a, b = Later(), Later()
        for backend, used in ((a, 1), (b, 10)):
            backend.staging_bytes, backend.waiting_bytes = (used, 100), 3 * used
        write = Write([Route(a, frozenset({"extend"}), long_entries), *one_route(b)], HostPool())
        write.writeback.metrics = SimpleNamespace(  # type: ignore[assignment]
            on_its_way=lambda *given: said.append(given), wrote=lambda *_, **__: None
        )
        clock = iter((5.0, 6.0))
        monkeypatch.setattr(writeback.time, "time", lambda: next(clock))
        staged = {"later": (11, 200, 33)}
        first, second = write(indices(8, 9)), write(indices(10, 11))
        assert said == [(staged, 5.0), (staged, 5.0)]
        for part in b.left:
            part.finishes = True
        assert first.finish_event.query()
        assert said[2:] == [(staged, 6.0)]
        assert first.finish_event.query()
        assert len(said) == 3, "once a write"
        second.finish_event.synchronize()
        assert said[3:] == [(staged, 0.0)], "true in the idle time that follows"
        write.writeback.before_forward()
        assert said[4:] == [(staged, 0.0)]

    def test_a_write_of_which_nothing_is_left_is_seen_complete_too(self) -> None:
        said: list[float] = []
        write = Write(one_route(Named()), HostPool())
        write.writeback.metrics = SimpleNamespace(  # type: ignore[assignment]
            on_its_way=lambda _, oldest: said.append(oldest), wrote=lambda *_, **__: None
        )
        completion = write(indices(8, 9))
        # An event that was never recorded reads as complete.
        assert completion.finish_event.recorded_on == [write.engine.device_to_host_stream]
        assert said[0] > 0
        assert completion.finish_event.query()
        assert said[1:] == [0.0]

    def test_a_reset_forgets_what_sglang_forgets(self) -> None:
        said: list[float] = []
        write = Write(one_route(Named()), HostPool())
        write.writeback.metrics = SimpleNamespace(  # type: ignore[assignment]
            on_its_way=lambda _, oldest: said.append(oldest), wrote=lambda *_, **__: None
        )
        write(indices(8, 9))
        write.writeback.abandon()
        assert said[-1] == 0.0


class TestCopying:
    """Whether something is on its way to the host, which small copies would wait for."""

    def test_from_the_submission_to_the_end_of_the_last_write(self, monkeypatch: pytest.MonkeyPatch) -> None:
        done: list[Any] = []
        monkeypatch.setattr(Finish, "query", lambda event: event in done)
        write = Write(one_route(Named()), HostPool())
        assert not write.writeback.copying()
        first, second = (write(indices(8, 9)) for _ in range(2))
        assert write.writeback.copying()
        done.append(first.finish_event)
        assert write.writeback.copying()
        done.append(second.finish_event)
        assert not write.writeback.copying()

    def test_what_is_left_for_later_is_on_its_way_too(self) -> None:
        later = Later()
        write = Write(one_route(later), HostPool())
        write(indices(8, 9))
        assert write.writeback.copying()
        (part,) = later.left
        assert part.advanced == []
        part.finishes = True
        write.writeback.before_forward()
        assert not write.writeback.copying()


class TestInstances:
    """Two routes may name one backend, with other options."""

    def test_a_pool_that_only_one_of_them_serves(self) -> None:
        """Neither raises at every write nor sends the whole pool to SGLang's path."""
        small, large = Named("hybrid", layouts=()), Named("hybrid")
        host = HostPool()
        write = Write([Route(small, frozenset(), long_entries), *one_route(large)], host)
        write(indices(8, 9, 10, 11))
        write(indices(8, 10, 12, 14))
        assert small.prepared == small.given == []
        assert [list(each.host_slots) for each in large.given] == [[8, 10, 12, 14]]
        assert write.writeback.counters.by_backend == {"upstream": 1, "hybrid": 1}

    @pytest.mark.parametrize("order", [(1, 64), (64, 1)])
    def test_a_ring_that_can_never_hold_a_write_is_refused_at_start(self, order: tuple[int, int]) -> None:
        device = CpuDevice()
        backends = [HybridBackend(device, {"staging_mb": size}) for size in order]
        routes = [Route(backends[0], frozenset(), long_entries), *one_route(backends[1])]
        writeback = WriteBack(device, routes, fences(device))
        with pytest.raises(OptionsError, match=r"two tokens of 2097152 bytes do not fit .* raise staging_mb"):
            writeback.pools.serves(HostPool(row_bytes=2**19))

    def test_the_default_ring_leaves_a_pool_of_larger_rows_to_sglang(self) -> None:
        device = CpuDevice()
        writeback = WriteBack(device, one_route(HybridBackend(device, {})), fences(device))
        assert not writeback.pools.serves(HostPool(row_bytes=2**26))
        assert "raise staging_mb" in writeback.pools.fallbacks()[0]


@pytest.mark.parametrize("part", ["host", "k", "v", "kv"])
@pytest.mark.parametrize("at", [0, -1])
def test_a_pool_whose_memory_changed_is_looked_at_again(
    part: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its geometry holds raw addresses, of host memory and of device rows."""
    monkeypatch.undo()
    addresses = {name: [index * 10, index * 10 + 1] for index, name in enumerate(("host", "k", "v", "kv"), 1)}

    def buffers(name: str) -> list[Any]:
        return [SimpleNamespace(data_ptr=lambda value=value: value) for value in addresses[name]]

    monkeypatch.setattr(pool_geometry, "host_buffers", lambda pool: buffers("host"))
    names = ("k", "v") if part != "kv" else ("kv",)

    def fingerprint() -> tuple[int, ...]:
        pool = SimpleNamespace(**{f"device_{name}_buffers": buffers(name) for name in names})
        return pool_registry.fingerprint(pool)

    before = fingerprint()
    assert fingerprint() == before
    addresses[part][at] += 5
    assert fingerprint() != before


def test_a_pool_that_comes_while_serving_is_left_to_sglang(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is refused any more then, least of all at every write."""
    device = CpuDevice()
    writeback = WriteBack(device, one_route(HybridBackend(device, {"staging_mb": 1})), fences(device))
    writeback.start(8192)
    assert not writeback.pools.serves(HostPool(row_bytes=2**19))
    assert "hybrid can never write pool kv" in caplog.text
