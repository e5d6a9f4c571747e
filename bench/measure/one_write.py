"""The measurements of single writes: ``bandwidth``, ``fence`` and ``latency``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...io_backends.sglang.handover.machine_facts import detect
from ...policy.decide import Decision, decide
from ...policy.format.layers import Policy
from . import sglang_pools
from .cases import MODELS, Case, slots_of
from .contenders import Contender, Submit, Task, contenders, reason_of
from .devices import Bench
from .memory import KvBuffers
from .results import WRONG, Row, Spread
from .timing import interleaved, one_write, spreads


@dataclass
class Setting:
    """What every case of a run has in common.

    Attributes:
        device: where it runs.
        policy: what ``auto`` and the fences ask.
        repeats: of every contender in every case.
        wanted: names of contenders; None for all.
        options: of this project's backends, by backend; ``auto`` takes the policy's.
        link: GB/s of one large copy in the same run, where it was measured.
    """

    device: Bench
    policy: Policy
    repeats: int
    wanted: Collection[str] | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    link: Spread | None = None
    _memory: KvBuffers | None = None
    _decisions: dict[tuple[Any, ...], Decision] = field(default_factory=dict)

    def memory(self, case: Case) -> KvBuffers:
        """Rows and host memory of a case, of an allocation that later cases of the model share."""
        model = MODELS[case.model]
        if self._memory is None or self._memory.model is not model or self._memory.slots < case.pool_slots:
            self._memory = None  # before the new one is made: two may not fit
            self._memory = KvBuffers(model, case.pool_slots, self.device)
        return self._memory.part(case.pool_slots)

    def decision(self, case: Case) -> Decision:
        """What the policy decides for a server with this case's facts, on this machine."""
        facts = case_facts(case, self.device)
        key = tuple(facts.values())
        if key not in self._decisions:  # detecting the rest of the facts may start programs
            self._decisions[key] = decide(self.policy, detect(facts))
        return self._decisions[key]

    def task(self, case: Case, memory: KvBuffers, *, forwards_wait: bool | None = None) -> Task:
        """The case, ready to be written; forwards wait where the policy lists any, unless it is said."""
        host, rows = slots_of(case)
        decision = self.decision(case)
        return Task(
            case=case,
            memory=memory,
            geometry=memory.geometry(case.layout, case.page_size),
            host=host,
            rows=rows,
            device_slots=self.device.indices(rows),
            stream=self.device.new_stream(),
            device=self.device,
            decision=decision,
            forwards_wait=bool(decision.fences()) if forwards_wait is None else forwards_wait,
            options=self.options,
            upstream=sglang_pools.upstream,
        )


def case_facts(case: Case, device: Bench) -> dict[str, Any]:
    """The facts that a case fixes; what else there is to know is detected."""
    model = MODELS[case.model]
    return {
        "attention_backend": case.attention,
        "kv_kind": model.kv_kind,
        "mem_layout": case.layout,
        "page_size": case.page_size,
        "row_bytes": model.components[0],
        "device": device.where,
    }


def bandwidth(setting: Setting, case: Case) -> list[Row]:
    """GB/s of one write end to end, and the share of the link."""
    rows = _measure(setting, case, "bandwidth")
    for row in rows:
        rate = row.metrics.get("gb_per_s")
        if rate is not None and setting.link is not None:
            by = setting.link.median
            row.metrics["link_share"] = Spread(rate.median / by, rate.low / by, rate.high / by, rate.n)
    return rows


def fence(setting: Setting, case: Case) -> list[Row]:
    """How long a forward that must not share the SMs with D2H work waits for one write.

    The forward stream is idle and reaches its fence when the submission returns, as the next launch of a
    scheduler does. What ``hybrid`` leaves for later gaps between forwards is enqueued by asking again at
    once, each time with a fence of its own.
    """
    stream = setting.device.forward_stream()
    return _measure(setting, case, "fence", fence_stream=stream, forwards_wait=True)


def latency(setting: Setting, case: Case) -> list[Row]:
    """Time until the host sees one write complete that it polls for."""
    return _measure(setting, case, "latency", poll=True)


MEASURED: dict[str, Callable[[Setting, Case], list[Row]]] = {
    "bandwidth": bandwidth,
    "fence": fence,
    "latency": latency,
}


def _measure(
    setting: Setting,
    case: Case,
    measurement: str,
    *,
    fence_stream: Any = None,
    forwards_wait: bool | None = None,
    poll: bool = False,
) -> list[Row]:
    memory = setting.memory(case)
    memory.refill()
    task = setting.task(case, memory, forwards_wait=forwards_wait)
    rows: dict[str, Row] = {}
    submits: dict[str, Submit] = {}
    for contender in contenders(task, setting.wanted):
        row = rows[contender.name] = row_of(measurement, task, contender)
        if contender.submit is None:
            continue
        row.reason = check(memory, task, contender.submit)
        row.checked = row.reason is None
        if row.checked:
            submits[contender.name] = contender.submit

    def run(name: str) -> Mapping[str, float]:
        numbers, rows[name].copies = one_write(task, submits[name], fence_stream=fence_stream, poll=poll)
        return numbers

    found, failed = interleaved({name: _bound(run, name) for name in submits}, setting.repeats)
    for name, repeats in found.items():
        rows[name].metrics = spreads(repeats)
    for name, reason in failed.items():
        rows[name].reason = reason
    return list(rows.values())


def _bound(run: Callable[[str], Mapping[str, float]], name: str) -> Callable[[], Mapping[str, float]]:
    return lambda: run(name)


def row_of(measurement: str, task: Task, contender: Contender) -> Row:
    """A row without figures."""
    fenced = task.forwards_wait
    return Row(
        measurement,
        task.case,
        contender.name,
        backend=contender.backend,
        safe=contender.safe(fenced) if contender.submit is not None else None,
        fenced=fenced,
        entry_bytes=task.facts.entry_bytes,
        reason=contender.reason,
    )


def check(memory: KvBuffers, task: Task, submit: Submit) -> str | None:
    """Write once into poisoned host memory: why the contender is out, or None if every byte is right."""
    memory.poison()
    try:
        one_write(task, submit)
        wrong = memory.wrong_bytes(task.geometry, task.host, task.rows)
    except Exception as error:  # a contender that fails is a row with a reason
        return reason_of(error)
    return None if wrong is None else f"{WRONG}: {wrong}"
