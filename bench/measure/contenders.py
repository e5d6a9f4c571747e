"""Who takes part: this project's backends, ``auto``, a plain copy loop, and SGLang's own paths."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...io_backends import PoolGeometry, Transfer, available_backends, direct_copies
from ...io_backends.plan.copies import Slots
from ...io_backends.registry import AUTO, BACKENDS, make_backend, unsupported
from ...io_backends.routes import write_facts
from ...policy.backend_spec import SmWork, spec_of
from ...policy.decide import Decision
from ...policy.routes import WriteFacts
from . import sglang_pools
from .cases import Case
from .devices import Bench
from .memory import KvBuffers

Fence = Callable[[Any], None]
"""Called with each event that a forward which must not share the SMs would wait for."""

MEMCPY_LOOP = "memcpy_loop"
MOST_SINGLE_COPIES = 20_000

STEP_TOKENS = 8192
"""Of a forward at most: SGLang's chunk on an H100 and an H200 (0.5.23)."""


@dataclass(frozen=True)
class Submitted:
    """What a submission enqueued.

    Attributes:
        copies: entries for the copy engine; None where it is not known.
        more: enqueues what can be of the rest; true once everything is. None where nothing was left.
    """

    copies: int | None
    more: Callable[[], bool] | None = None


Submit = Callable[[Fence], Submitted]
"""Enqueues one write on the current stream, which is the task's."""


@dataclass(frozen=True)
class Contender:
    """One way to write a case back, or the ``reason`` why it is none.

    Attributes:
        backend: who moves the bytes.
        sm_work: whether SMs do some of it.
        ours: whether the forwards that the policy lists wait for that.
    """

    name: str
    submit: Submit | None = None
    reason: str | None = None
    backend: str | None = None
    sm_work: bool = True
    ours: bool = False

    def safe(self, fenced: bool) -> bool:
        """Whether it keeps the policy's fences, which are some if ``fenced``."""
        return self.ours or not self.sm_work or not fenced


@dataclass(frozen=True)
class Task:
    """One case, ready to be written.

    Attributes:
        memory: None where there is none and the driver does nothing.
        host, rows: slots int64 [tokens] on the host.
        device_slots: ``rows`` on the device.
        stream: SGLang's transfer stream.
        device: what backends are given.
        decision: the policy's, for this case on this machine.
        forwards_wait: whether forwards wait for the SM work of this project's backends.
        options: of this project's backends, by backend; ``auto`` takes the policy's.
        upstream: SGLang's own copy of the write for ``fenced_kernel``, or why there is none.
    """

    case: Case
    memory: KvBuffers | None
    geometry: PoolGeometry
    host: Slots
    rows: Slots
    device_slots: Any
    stream: Any
    device: Bench
    decision: Decision
    forwards_wait: bool
    options: Mapping[str, Mapping[str, Any]]
    upstream: Callable[[Task], Callable[..., None] | str]

    @property
    def facts(self) -> WriteFacts:
        return write_facts(self.geometry, self.host)


def names() -> tuple[str, ...]:
    """Every contender there may be, in the order shown."""
    return (AUTO, *available_backends(), MEMCPY_LOOP, *sglang_pools.CONTENDERS)


def contenders(task: Task, wanted: Collection[str] | None = None) -> Iterator[Contender]:
    """Every contender of a case whose name is in ``wanted`` (all without it)."""
    for name in names():
        if wanted is not None and name not in wanted:
            continue
        try:
            yield _contender(name, task)
        except Exception as error:  # one that cannot be set up is a row with a reason, like one that fails
            yield Contender(name, reason=reason_of(error))


def reason_of(error: BaseException) -> str:
    """One line for a row."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def _contender(name: str, task: Task) -> Contender:
    if name == AUTO:
        return _auto(task)
    if name == MEMCPY_LOOP:
        return _memcpy_loop(task)
    if name in sglang_pools.CONTENDERS:
        made = sglang_pools.submission(task, name)
        if isinstance(made, str):
            return Contender(name, reason=made)
        sm_work = name != sglang_pools.DIRECT

        def submit(fence: Fence) -> Submitted:
            made()
            if sm_work:
                fence(task.device.record(task.stream))
            return Submitted(None)

        return Contender(name, submit, backend=name, sm_work=sm_work)
    return ours(name, task, task.options.get(name, {}))


def _auto(task: Task) -> Contender:
    route = task.decision.routes[task.decision.route(task.facts)]
    return replace(ours(route.backend, task, route.options), name=AUTO)


def ours(name: str, task: Task, options: Mapping[str, Any]) -> Contender:
    """A backend of this project, or of a third party, behind its interface."""
    device, geometry = task.device, task.geometry
    backend = make_backend(name, device, options)
    reason = unsupported(backend, geometry)
    if reason is not None:
        return Contender(name, reason=reason, backend=name, ours=True)
    upstream = _no_upstream
    if backend.upstream_indices:
        found = task.upstream(task)
        if isinstance(found, str):
            return Contender(name, reason=found, backend=name, ours=True)
        upstream = found
    sm_work = spec_of(BACKENDS, name).sm_work is not SmWork.NONE
    backend.prepare(geometry)
    backend.start(step_tokens=STEP_TOKENS, forwards_wait=task.forwards_wait)

    def submit(fence: Fence) -> Submitted:
        ready = device.record(device.current_stream())
        transfer = Transfer(
            geometry, task.host, task.device_slots, (ready,), ready, task.forwards_wait, upstream
        )
        done = backend.submit(transfer, task.stream)
        if done.sm_done is not None:
            fence(done.sm_done)
        pending = done.pending
        if pending is None:
            return Submitted(done.copies)

        def more() -> bool:
            event = pending.advance((device.record(device.current_stream()),))
            if event is not None:
                fence(event)
            return pending.enqueued()

        return Submitted(done.copies, more)

    return Contender(name, submit, backend=name, sm_work=sm_work, ours=True)


def _no_upstream(**_: Any) -> None:
    raise AssertionError("only a backend with upstream_indices calls SGLang's own copy")


def _memcpy_loop(task: Task) -> Contender:
    batch = direct_copies(task.geometry, task.host, task.rows)
    if len(batch) > MOST_SINGLE_COPIES:
        reason = f"{len(batch)} single copies: a loop of them would take seconds"
        return Contender(MEMCPY_LOOP, reason=reason, sm_work=False)
    if task.device.name == "cpu":

        def plain(fence: Fence) -> Submitted:
            task.device.copy(batch, task.stream)
            return Submitted(len(batch))

        return Contender(MEMCPY_LOOP, plain, backend=MEMCPY_LOOP, sm_work=False)
    from cuda.bindings import driver as cuda

    entries = list(zip(batch.dst.tolist(), batch.src.tolist(), batch.nbytes.tolist(), strict=True))

    def loop(fence: Fence) -> Submitted:
        handle = task.stream.cuda_stream
        for dst, src, nbytes in entries:
            cuda.cuMemcpyDtoHAsync(dst, src, nbytes, handle)
        return Submitted(len(entries))

    return Contender(MEMCPY_LOOP, loop, backend=MEMCPY_LOOP, sm_work=False)
