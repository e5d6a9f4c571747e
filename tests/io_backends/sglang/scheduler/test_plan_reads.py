"""What an attention backend reads to plan a forward: which calls are taken, when, and in which servers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from own_process import run_cases

from sglang_hicache.io_backends.policy_files import default_policy
from sglang_hicache.io_backends.sglang import versions
from sglang_hicache.io_backends.sglang.errors import RefusedError
from sglang_hicache.io_backends.sglang.scheduler import scheduler_hooks
from sglang_hicache.io_backends.sglang.scheduler.scheduler_hooks import Active
from sglang_hicache.io_backends.sglang.scheduler.writes import Counters
from sglang_hicache.policy.decide import Decision, decide
from sglang_hicache.policy.facts import Facts

torch = pytest.importorskip("torch")
from sglang_hicache.io_backends.sglang.scheduler.plan_reads import PlanReads  # noqa: E402


class Reads:
    """Takes int32 for the device's and int64 for the host's; what it read is doubled, so that it shows."""

    def __init__(self) -> None:
        self.read_shapes: list[tuple[int, ...]] = []

    def serves(self, values: Any) -> bool:
        return bool(values.dtype == torch.int32)

    def read(self, values: Any) -> Any:
        self.read_shapes.append(tuple(values.shape))
        return values.to(torch.int64) * 2


VALUES = torch.tensor([3, 4, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda values: values.to("cpu").tolist(), [6, 8, 10]),
        (lambda values: values.to(torch.device("cpu")).tolist(), [6, 8, 10]),
        (lambda values: values.cpu().tolist(), [6, 8, 10]),
        (lambda values: values.tolist(), [6, 8, 10]),
        (lambda values: values[1].item(), 8),
        (lambda values: int(values[1]), 8),
        (lambda values: float(values[1]), 8.0),
        (lambda values: int(values.max()), 10),
        # As flashinfer's plan does.
        (lambda values: (values.to("cpu")[1:] - values.to("cpu")[:-1]).max().to(torch.int64).item(), 2),
    ],
)
def test_reads_in_every_spelling(call: Callable[[Any], Any], found: object) -> None:
    reads, counters = Reads(), Counters()
    with PlanReads(reads, counters):
        assert call(VALUES) == found
    assert counters.plan_reads == len(reads.read_shapes) > 0
    before = list(reads.read_shapes)
    assert call(VALUES) != found  # torch's own again
    assert reads.read_shapes == before


def test_a_condition_is_a_read() -> None:
    reads = Reads()
    with PlanReads(reads, Counters()):
        assert VALUES[0]
        assert not VALUES[0] - 3
    assert reads.read_shapes == [(), ()]


@pytest.mark.parametrize(
    "call",
    [
        lambda values: values.to(torch.int64),
        lambda values: values.to("cpu", torch.float32),
        # May end before the values are there: whoever asks so waits by himself.
        lambda values: values.to("cpu", non_blocking=True),
        lambda values: values.to(device="cpu", copy=True),
        lambda values: values.cpu(memory_format=torch.contiguous_format),
        lambda values: values.to(torch.float64).cpu(),
        lambda values: values.clone() + values[1:].sum(),
    ],
)
def test_what_is_left_to_torch(call: Callable[[Any], Any]) -> None:
    reads, counters = Reads(), Counters()
    with PlanReads(reads, counters):
        given = call(VALUES)
    assert torch.equal(given, call(VALUES))
    assert (reads.read_shapes, counters.plan_reads) == ([], 0)


def test_an_error_ends_it() -> None:
    reads = Reads()
    with pytest.raises(ZeroDivisionError), PlanReads(reads, Counters()):
        _ = 1 // 0
    assert VALUES.tolist() == [3, 4, 5]


def test_planning_inside_planning() -> None:
    reads, counters = Reads(), Counters()
    plan = PlanReads(reads, counters)
    with plan:
        with plan:
            assert VALUES.tolist() == [6, 8, 10]
        assert VALUES.tolist() == [6, 8, 10]
    assert VALUES.tolist() == [3, 4, 5]
    assert counters.plan_reads == 2


class Planner:
    """Stands for FlashInferAttnBackend."""

    def init_forward_metadata(self, forward_batch: Any) -> list[int]:
        """Read what is to be planned."""
        planned: list[int] = forward_batch.tolist()
        return planned


MODULE = versions.FLASHINFER.rpartition(".")[0]


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Planner]]:
    """SGLang's module of flashinfer with a planner of its own, and the hooks taken off again."""
    module = ModuleType(MODULE)
    planner = type(
        "FlashInferAttnBackend", (Planner,), {"init_forward_metadata": Planner.init_forward_metadata}
    )
    module.FlashInferAttnBackend = planner  # type: ignore[attr-defined]
    for name in (versions.FLASHINFER, versions.FLASHINFER_MLA):
        monkeypatch.delitem(sys.modules, name.rpartition(".")[0], raising=False)
    monkeypatch.setitem(sys.modules, MODULE, module)

    def apply(hooks: Any) -> None:
        ((target, (kind, hook)),) = hooks.items()
        assert (target, kind) == (versions.FLASHINFER + ".init_forward_metadata", "AROUND")
        around = partial(hook, planner.init_forward_metadata)
        planner.init_forward_metadata = lambda *args: around(*args)  # type: ignore[method-assign]

    monkeypatch.setattr(scheduler_hooks.hooks, "apply_or_refuse", apply)
    monkeypatch.setattr(PlanReads, "possible", staticmethod(lambda: True))  # asks the driver
    monkeypatch.setattr(versions, "installed", lambda: versions.SUPPORTED[-1])
    yield planner
    scheduler_hooks._active = None


def decision(backend: str = "auto", **facts: Any) -> Decision:
    known = {"gpu_arch": "sm_90", "mem_layout": "page_first", "page_size": 64, "device": "cuda"}
    return decide(default_policy(), Facts.given(**{**known, **facts}), backend=backend)


def active(
    decided: Decision, reads: Reads | Exception | None, *, speculative: bool = False
) -> tuple[Active, SimpleNamespace]:
    def small_reads() -> Reads | None:
        if isinstance(reads, Exception):
            raise reads
        return reads

    writeback = SimpleNamespace(counters=Counters(), copying=lambda: writeback.busy, busy=False)
    device: Any = SimpleNamespace(name="cuda", small_reads=small_reads)
    given: Any = writeback
    scheduler_hooks._active = Active(decided, device, given, None, speculative=speculative)
    scheduler_hooks._plan_past_copies(scheduler_hooks._active)
    return scheduler_hooks._active, writeback


def test_planning_reads_past_copies_while_there_are_some(planner: type[Planner]) -> None:
    reads = Reads()
    _, writeback = active(decision(attention_backend="flashinfer"), reads)
    assert planner().init_forward_metadata(VALUES) == [3, 4, 5]
    writeback.busy = True
    assert planner().init_forward_metadata(VALUES) == [6, 8, 10]
    writeback.busy = False
    assert planner().init_forward_metadata(VALUES) == [3, 4, 5]
    assert writeback.counters.plan_reads == len(reads.read_shapes) == 1


@pytest.mark.parametrize(
    ("decided", "reads"),
    [
        (decision(attention_backend="triton"), Reads()),
        (decision(attention_backend="fa3"), Reads()),
        # A device without copies that hold anybody up.
        (decision(attention_backend="flashinfer"), None),
    ],
)
def test_servers_that_have_nothing_of_it(
    planner: type[Planner], decided: Decision, reads: Reads | None
) -> None:
    before = planner.init_forward_metadata
    found, _ = active(decided, reads)
    assert found.plan_reads is None
    assert planner.init_forward_metadata is before


@pytest.mark.sglang
def test_the_hook_on_sglangs_own_planners(subtests: pytest.Subtests, plain_python: Sequence[str]) -> None:
    run_cases(subtests, Path(__file__).with_name("plan_reads_cases.py"), {}, plain_python)


def test_planning_ends_it_with_an_error_too(planner: type[Planner]) -> None:
    _, writeback = active(decision(attention_backend="flashinfer"), Reads())
    writeback.busy = True
    with pytest.raises(AttributeError):
        planner().init_forward_metadata(None)
    assert VALUES.tolist() == [3, 4, 5]


def test_nothing_is_asked_while_a_graph_is_captured(
    planner: type[Planner], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, writeback = active(decision(attention_backend="flashinfer"), Reads())
    writeback.busy = True
    monkeypatch.setattr(PlanReads, "possible", staticmethod(lambda: False))
    monkeypatch.setattr(writeback, "copying", lambda: pytest.fail("an event was asked"))
    assert planner().init_forward_metadata(VALUES) == [3, 4, 5]


def test_speculative_planning_is_left_alone(planner: type[Planner]) -> None:
    """It may run beside a forward, and a kernel of its would wait for the SMs."""
    found, _ = active(decision(attention_backend="flashinfer"), Reads(), speculative=True)
    assert found.plan_reads is None


def test_one_of_two_attention_backends_is_enough(planner: type[Planner]) -> None:
    decided = decision(prefill_attention_backend="fa3", decode_attention_backend="flashinfer")
    found, _ = active(decided, Reads())
    assert found.plan_reads is not None


def test_what_sglang_has_not_imported_is_not_looked_at(
    planner: type[Planner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, MODULE)
    found, _ = active(decision(attention_backend="flashinfer"), Reads())
    assert found.plan_reads is None
    assert MODULE not in sys.modules


@pytest.mark.parametrize("what", ["no kernel", "another planner", "no hook"])
def test_a_server_that_cannot_have_it_serves_without(
    planner: type[Planner], what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reads: Reads | Exception = Reads()
    said = what
    if what == "no kernel":
        reads = RuntimeError("no kernel")
    elif what == "another planner":
        planner.init_forward_metadata = lambda self, batch: [1]  # type: ignore[method-assign]
        said = "init_forward_metadata takes ('self', 'batch')"
    else:

        def refuse(hooks: Any) -> None:
            raise RefusedError("no hook")

        monkeypatch.setattr(scheduler_hooks.hooks, "apply_or_refuse", refuse)
    before = planner.init_forward_metadata
    with caplog.at_level("WARNING"):
        found, writeback = active(decision(attention_backend="flashinfer"), reads)
    writeback.busy = True
    assert found.plan_reads is None
    assert planner.init_forward_metadata is before
    (line,) = caplog.messages
    assert line.startswith(
        "hicache-io: what flashinfer reads to plan a forward waits for the copies of a write: "
    )
    assert said in line


def test_a_hook_that_is_left_behind_changes_nothing(planner: type[Planner]) -> None:
    found, writeback = active(decision(attention_backend="flashinfer"), Reads())
    writeback.busy = True
    found.plan_reads = None
    assert planner().init_forward_metadata(VALUES) == [3, 4, 5]
