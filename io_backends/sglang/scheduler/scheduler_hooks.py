"""One scheduler process: switch the hooks on, fence the forwards, tell the operator."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ....policy.backend_spec import spec_of
from ....policy.decide import Decision, describe_decision
from ....policy.fact_table import ATTENTION_FACTS
from ....policy.log import logger_of
from ...device import open_device
from ...device.base import Device
from ...registry import BACKENDS, make_backend
from ...routes import routes_of
from .. import hooks, unsafe, versions
from ..errors import RefusedError, end_scheduler
from ..handover import decision_handover, ranks
from ..handover.decision_handover import ATTRIBUTE, is_ours
from ..metrics import metrics_of
from ..no_gpu import cpu_engine
from ..pools.errors import ShortHostRowsError
from ..pools.geometry import label_of
from ..pools.host_pools import HostPool, assigned, host_pools
from . import kernels
from .fences import Fences, forwards_of
from .indices import draft_pool_of
from .writeback import WriteBack

if TYPE_CHECKING:
    from .plan_reads import PlanReads

logger = logger_of(__name__)


@dataclass(slots=True)
class Active:
    """The plug-in at work in this process."""

    decision: Decision
    device: Device
    writeback: WriteBack
    scheduler: Any
    speculative: bool
    unsafe_fences: str | None = None
    pools: tuple[HostPool, ...] = ()
    plan_reads: PlanReads | None = None

    def fence_forward(self, batch: Any) -> None:
        """Before a forward is launched: wait for SM-side D2H work if the decision says so."""
        forwards = forwards_of(batch.forward_mode, speculative=self.speculative)
        if not forwards:
            return  # a prebuilt batch launches none, so that no gap ends here
        # The gap before this forward is where gathers of a long write may run.
        self.writeback.before_forward()
        waits = self.writeback.fences.before_forward(forwards, self.writeback.metrics)
        self.writeback.counters.forward_fences += bool(waits)

    def tell_metrics(self) -> None:
        """What runs here, as an info metric."""
        if self.writeback.metrics is not None:
            for route in self.decision.routes:
                self.writeback.metrics.runs(
                    route.backend,
                    rule=route.rule,
                    fence_forward="+".join(route.fence_forward),
                    version=metadata.version("sglang-hicache-io"),
                    unsafe_fences=self.unsafe_fences or "",
                )

    def summary(self) -> dict[str, Any]:
        """The decision in short, and the counters, for ``/server_info``."""
        decision = self.decision
        return {
            "backend": decision.backend,
            "fence_forward": list(decision.fences()),
            "rule": decision.rule,
            "because": decision.because,
            "routes": [route.to_dict() for route in decision.routes],
            "upstream_io_backend": decision.upstream_io_backend,
            "policy": decision.policy,
            "pools": [pool.to_dict() for pool in self.pools],
            **self.writeback.summary(),
            **unsafe.summary(self.unsafe_fences),
        }


_active: Active | None = None
_built = False
"""A scheduler was built in this process, or is being built."""


def active() -> Active | None:
    """What runs in this process; None where none of this project's backends was asked for."""
    return _active


def register_scheduler_hook() -> None:
    """Hook the construction of ``Scheduler``. Idempotent; the rest follows there, if asked for."""
    hooks.apply({versions.SCHEDULER + ".__init__": ("AROUND", around_scheduler_init)})


def around_scheduler_init(
    original: Callable[..., None], scheduler: Any, server_args: Any, *args: Any, **kwargs: Any
) -> None:
    """Hook around ``Scheduler.__init__``: nothing unless one of this project's backends was asked for."""
    global _built
    carried = getattr(server_args, ATTRIBUTE, None)
    another, _built = _built, True
    # Looked for where it matters only: a server without our backends pays nothing for it.
    if _active is not None or (carried is not None and (another or _is_another_there(scheduler))):
        raise end_scheduler(
            RefusedError(
                "this process has a scheduler already, and one of the two is asked to run our write-back, "
                "whose hooks are those of the process and whose fences of one scheduler: start each in a "
                "process of its own, as SGLang does"
            )
        )
    if carried is None:
        if is_ours(_effective_io_backend(server_args)):
            raise end_scheduler(
                RefusedError(
                    "--hicache-io-backend was not resolved in the launching process: the plug-in hicache_io "
                    "did not run there. A program that builds ServerArgs itself calls "
                    "sglang.srt.plugins.load_plugins() before; SGLANG_PLUGINS, if set, names hicache_io"
                )
            )
        original(scheduler, server_args, *args, **kwargs)
        return
    decision_handover.taken_over()
    decision = Decision.from_dict(carried.decision)
    unsafe_fences = unsafe.carried(carried.decision)
    refusal: Exception | None = None
    try:
        _activate(scheduler, decision, unsafe_fences)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        if ranks.alone(server_args):
            raise end_scheduler(error) from error
        # The others would wait for a rank that is gone; they hear of it where all meet.
        refusal = error
    original(scheduler, server_args, *args, **kwargs)
    try:
        if refusal is None:
            _make_ready(scheduler)
    except Exception as error:
        refusal = error
    try:
        ranks.agree(scheduler, decision, refusal)
    except RefusedError as error:
        raise end_scheduler(error) from (refusal or error)
    logger.info("%s", describe_decision(decision))
    unsafe.warn(unsafe_fences)


def _is_another_there(scheduler: Any) -> bool:
    """Whether this process has built another scheduler, before its construction was hooked too."""
    kind = getattr(sys.modules.get(versions.SCHEDULER.rpartition(".")[0]), "Scheduler", None)
    if not isinstance(kind, type):
        return False
    return any(issubclass(type(each), kind) and each is not scheduler for each in gc.get_objects())


def _effective_io_backend(server_args: Any) -> str | None:
    name = getattr(server_args, "hicache_io_backend", None)
    for _, fields in reversed(getattr(server_args, "_resolved_overrides", None) or ()):
        if "hicache_io_backend" in fields:
            return str(fields["hicache_io_backend"])
    return name


def _activate(scheduler: Any, decision: Decision, unsafe_fences: str | None) -> None:
    global _active
    version = versions.installed()
    problem = versions.problem_with(version) or versions.check_points(
        versions.release_of(version).scheduler_points, version
    )
    if problem is not None:
        raise RefusedError(problem)
    device = open_device(str(decision.facts["device"]["value"]))
    routes = routes_of(decision, lambda name, options: make_backend(name, device, options))
    fences = Fences(device, scheduler, producer=unsafe.keeps_producer_fence(unsafe_fences))
    writeback = WriteBack(device, routes, fences)
    if device.name == "cpu":
        cpu_engine.install()
    hooks.apply_or_refuse(
        {
            versions.SCHEDULER + ".run_batch": ("BEFORE", _before_run_batch),
            versions.SCHEDULER + ".get_internal_state": ("AFTER", _after_internal_state),
            versions.ENGINE + ".submit_device_to_host": ("AROUND", _around_submit),
            versions.CONTROLLER + ".reset": ("BEFORE", _before_reset),
            versions.CONTROLLER + "._move_write_operation": ("AROUND", _around_move),
            versions.HYBRID_CONTROLLER + "._move_write_operation": ("AROUND", _around_move),
        }
    )
    _active = Active(decision, device, writeback, scheduler, speculative=False, unsafe_fences=unsafe_fences)


def _make_ready(scheduler: Any) -> None:
    assert _active is not None
    spec = getattr(scheduler, "spec_algorithm", None)
    _active.speculative = spec is not None and not spec.is_none()
    _active.writeback.metrics = metrics_of(scheduler)
    offload = getattr(scheduler, "decode_offload_manager", None)
    for owner in (scheduler.tree_cache, offload):
        controller = getattr(owner, "cache_controller", None)
        if controller is not None:
            _prepare(controller, _active)
            unsafe.leave_out_sglangs(controller, _active.unsafe_fences)
    _active.writeback.start(_step_tokens(scheduler))
    _plan_past_copies(_active)
    _active.tell_metrics()


def _plan_past_copies(active: Active) -> None:
    """Let flashinfer's planning not wait for copies to the host, where it runs.

    Not with speculative decoding, whose planning may run beside a forward and would wait for its SMs. Values
    are the same with and without it, so that no server is refused for want of it.
    """
    if active.speculative or not any(
        active.decision.facts[name]["value"] == "flashinfer" for name in ATTENTION_FACTS
    ):
        return
    # SGLang has imported what it plans with.
    points = [each for each in versions.PLANNER_POINTS if each.target.rsplit(".", 2)[0] in sys.modules]
    try:
        reads = active.device.small_reads() if points else None
        if reads is None:
            return
        problem = versions.check_points(points, versions.installed())
        if problem is not None:
            raise RefusedError(problem)
        from .plan_reads import PlanReads  # torch is there by now

        hooks.apply_or_refuse({point.target: ("AROUND", _around_plan) for point in points})
    except Exception as error:
        logger.warning(
            "hicache-io: what flashinfer reads to plan a forward waits for the copies of a write: %s", error
        )
        return
    active.plan_reads = PlanReads(reads, active.writeback.counters)
    logger.info(
        "hicache-io: what flashinfer reads to plan a forward is read by a kernel while a write is on its way"
    )


def _step_tokens(scheduler: Any) -> int:
    """Tokens that a forward makes rows of: a chunk, or a prefill batch where none is chunked.

    A prompt that is longer than a batch and not chunked makes more, as does a write of SGLang before 0.5.22,
    which holds a whole prompt. A PD decode server computes no prompts: 0.
    """
    mode = getattr(scheduler, "disaggregation_mode", None)
    if getattr(mode, "value", mode) == "decode":
        return 0
    chunk = getattr(scheduler, "chunked_prefill_size", None)
    most = chunk if chunk and chunk > 0 else scheduler.max_prefill_tokens
    return int(min(most, scheduler.max_total_num_tokens))


def _prepare(controller: Any, active: Active) -> None:
    """Make the backend ready for a controller's pools now, not under the first write."""
    group = controller.mem_pool_host
    pools = [entry.host_pool for entry in getattr(group, "entries", ())] or [group]
    draft = draft_pool_of(controller)
    if draft is not None:  # two pools with one vector of indices go one way
        active.writeback.pools.serve_alike([*pools, draft])
        active.writeback.expect(draft)
    for pool in pools:
        active.writeback.expect(pool)
    active.pools += _listed(controller, active)
    for row in active.pools:
        logger.info("hicache-io: host pool %s", row.in_words())
    for pool in pools:
        kernel_options = [
            r.options for r in active.decision.routes if spec_of(BACKENDS, r.backend).upstream_copy
        ]
        if kernel_options and active.device.name == "cuda":
            for options in kernel_options:
                if "block_quota" in options:
                    kernels.build_limited(pool, int(options["block_quota"]))
            logger.info(
                "hicache-io: pool %s is written back by SGLang's %s",
                getattr(pool, "pool_label", type(pool).__name__),
                kernels.kernel_of(pool, controller.io_backend),
            )


def _cache_of(controller: Any) -> Any:
    """The device cache as a whole, of which ``mem_pool_device`` may be a part; None where it is not known."""
    allocator = getattr(controller, "mem_pool_device_allocator", None)
    return None if allocator is None else allocator.get_kvcache()


def _listed(controller: Any, active: Active) -> tuple[HostPool, ...]:
    """The pools of a controller as they are, with who writes each."""
    group = controller.mem_pool_host
    listed = [
        (str(getattr(entry.name, "value", entry.name)), entry.host_pool, entry.device_pool)
        for entry in getattr(group, "entries", ())
    ] or [(label_of(group), group, getattr(controller, "mem_pool_device", None))]
    draft = draft_pool_of(controller)
    if draft is not None:
        listed.append(("draft", draft, getattr(controller, "mem_pool_device_draft", None)))
    by_name = {name: pool for name, pool, _ in listed}
    runner = getattr(getattr(active.scheduler, "tp_worker", None), "model_runner", None)
    window = getattr(runner, "sliding_window_size", None)
    known = active.writeback.pools
    try:
        found = host_pools(listed, window, _cache_of(controller))
        return assigned(found, active.decision, lambda row, name: known[by_name[row.name]].reason_of(name))
    except ShortHostRowsError as error:
        raise RefusedError(str(error)) from error
    except Exception as error:  # a list for people: no reason not to serve
        logger.warning("hicache-io: the host pools cannot be listed: %r", error)
        return ()


def _around_submit(original: Callable[..., Any], engine: Any, transfers: Any) -> Any:
    assert _active is not None
    began = time.perf_counter()
    try:
        return _active.writeback.submit(original, engine, transfers)
    finally:
        _active.writeback.counters.submit_seconds += time.perf_counter() - began


def _around_move(original: Callable[..., Any], controller: Any, op: Any) -> Any:
    assert _active is not None
    return _active.writeback.move_write_operation(original, controller, op)


def _around_plan(original: Callable[..., Any], backend: Any, *args: Any, **kwargs: Any) -> Any:
    assert _active is not None
    reads = _active.plan_reads
    if reads is None or not reads.possible() or not _active.writeback.copying():
        return original(backend, *args, **kwargs)
    with reads:
        return original(backend, *args, **kwargs)


def _before_reset(controller: Any, *args: Any, **kwargs: Any) -> None:
    # SGLang may reset while it builds a scheduler whose activation failed, and that all ranks will refuse.
    if _active is not None:
        _active.writeback.abandon()


def _before_run_batch(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    assert _active is not None
    _active.fence_forward(batch)


def _after_internal_state(output: Any, *args: Any, **kwargs: Any) -> None:
    assert _active is not None
    output.internal_state["hicache_io"] = _active.summary()
