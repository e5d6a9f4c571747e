"""The decision: made once, in the launching process, when SGLang has resolved its arguments.

Two steps, because SGLang's own HiCache step must see a name that it knows, and what the decision rests on is
final only at the end of the resolution (see `server_facts`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ....policy.backend_spec import spec_of
from ....policy.decide import Decision, decide
from ....policy.facts import Facts
from ....policy.format.errors import PolicyError
from ....policy.log import logger_of
from ....policy.sentences import lost_sentence
from ....policy.unfenced import lost_here
from ...device import unavailable
from ...policy_files import policy_in_force
from ...registry import AUTO, BACKENDS
from .. import unsafe, versions
from ..errors import RefusedError, exit_with
from ..handover.decision_handover import ATTRIBUTE, Carried, is_ours
from ..handover.server_facts import resolved_facts
from ..scheduler import scheduler_hooks
from .options import asked, refuse_unservable

logger = logger_of(__name__)

_SOURCE = "sglang-hicache-io"

WANTED_ATTRIBUTE = "_hicache_io_wanted"
"""On ``ServerArgs``: the name that was asked for, from SGLang's HiCache step on."""

explaining = False
"""Set in a process that only asks what arguments resolve to: it makes no decision, and hooks no scheduler."""


def around_handle_hicache(original: Callable[[Any], None], server_args: Any) -> None:
    """Hook around SGLang's HiCache step: check what was asked for, and tell SGLang a name that it knows.

    Raises:
        RefusedError: the server must not start (called from ``sglang.Engine``).
        SystemExit: the same, for a command line: one line on standard error, status 2.
    """
    with _refusing(server_args):
        if _prepare(server_args):
            setattr(server_args, WANTED_ATTRIBUTE, versions.view(server_args).hicache_io_backend)
            # SGLang knows only its own names. What it is told serves H2D, and pools that ours does not.
            layout = versions.view(server_args).hicache_mem_layout
            _declare(server_args, hicache_io_backend="direct" if layout == "page_first_direct" else "kernel")
    original(server_args)


def around_resolution(original: Callable[[Any], None], server_args: Any) -> None:
    """Hook around SGLang's whole resolution: decide when it is done.

    Raises:
        RefusedError, SystemExit: as above.
    """
    original(server_args)
    name = getattr(server_args, WANTED_ATTRIBUTE, None)
    # The mark travels to other processes; the decision is made where it is not there yet.
    if name is not None and not explaining and getattr(server_args, ATTRIBUTE, None) is None:
        with _refusing(server_args):
            _decide(server_args, name)


@contextmanager
def _refusing(server_args: Any) -> Iterator[None]:
    try:
        yield
    except (RefusedError, PolicyError) as error:
        if asked(server_args).from_cli:
            logging.getLogger("sglang").setLevel(logging.WARNING)  # how it ends would stand below the reason
            raise exit_with(error, 2) from None
        raise


def _prepare(server_args: Any) -> bool:
    """Whether this server's write-back is ours. Raises RefusedError for what is not covered."""
    config = versions.view(server_args)
    name = config.hicache_io_backend
    option = asked(server_args).policy
    asked(server_args).experiment.check(name, served=is_ours(name) and hicache_in_use(config))
    if not is_ours(name):
        if option is not None:
            raise RefusedError(
                f"--hicache-io-policy has no say over --hicache-io-backend {name}, which is SGLang's own; "
                f"use --hicache-io-backend {AUTO}, or leave the policy out"
            )
        return False
    refuse_unservable(name, None)
    if not hicache_in_use(config):
        if option is not None:
            raise RefusedError(
                "--hicache-io-policy needs HiCache: add --enable-hierarchical-cache, or leave the policy out"
            )
        logger.warning(
            "%s: --hicache-io-backend %s has nothing to do without --enable-hierarchical-cache",
            _SOURCE,
            name,
        )
        _declare(server_args, hicache_io_backend="kernel")
        return False
    _refuse_what_is_not_covered(config, name)
    policy_in_force(option)
    return True


def _decide(server_args: Any, name: str) -> None:
    facts = resolved_facts(server_args)
    fences = asked(server_args).experiment.fences
    policy = policy_in_force(asked(server_args).policy)
    decided = decide(policy, facts, backend=name)
    unsafe.check_decision(decided, name)
    decision = unsafe.applied(decided, fences)
    if lost := lost_here(policy, facts, backend=name):
        logger.warning("%s: %s", _SOURCE, lost_sentence(lost, policy))
    # SGLang may have changed the layout (storage backends do).
    _refuse_unserved(name, decision, facts)
    problem = versions.check_points(versions.current().points, versions.installed())
    if problem is not None:
        raise RefusedError(problem)
    setattr(server_args, ATTRIBUTE, Carried(unsafe.to_carry(decision, fences)))
    # A forked scheduler, or one in this process, finds the hook here; a spawned one loads the plug-in.
    scheduler_hooks.register_scheduler_hook()


def hicache_in_use(config: Any) -> bool:
    """The condition under which ``handle_hicache`` normalizes anything, in 0.5.18 to 0.5.23."""
    return bool(
        config.enable_hierarchical_cache
        or config.disaggregation_decode_enable_offload_kvcache
        or (
            config.disaggregation_mode == "decode"
            and config.disaggregation_decode_retraction_backup in (None, "host_pool")
        )
    )


def _refuse_what_is_not_covered(config: Any, name: str) -> None:
    advice = f"start with --hicache-io-backend kernel instead of {name}"
    device = str(config.device).partition(":")[0]
    problem = unavailable(device)
    if problem is not None:
        raise RefusedError(f"{problem} (asked for: --hicache-io-backend {name})")
    if getattr(config, "use_ray", False):
        raise RefusedError(f"--use-ray starts schedulers in a way that is not covered yet; {advice}")
    if getattr(config, "enable_pdmux", False):
        raise RefusedError(
            f"--enable-pdmux runs forwards on streams that the fences do not know; {advice}, or leave it out"
        )
    if getattr(config, "enable_hisparse", False):
        raise RefusedError(
            "--enable-hisparse copies rows to the host by SGLang's SM kernel on streams of its own, past the "
            f"fences; {advice}, or leave it out"
        )


def _refuse_unserved(name: str, decision: Decision, facts: Facts) -> None:
    """A backend asked for by name must be able to serve the pool; ``auto`` may fall back, and says so."""
    if name == AUTO:
        return
    spec = spec_of(BACKENDS, decision.backend)
    reason = spec.cannot_serve(facts.value("mem_layout"), facts.value("kv_kind"))
    if reason is not None:
        raise RefusedError(
            f"--hicache-io-backend {name} {reason}; choose one of these, or --hicache-io-backend {AUTO}"
        )


def _declare(server_args: Any, **fields: Any) -> None:
    versions.arguments().declare(server_args, _SOURCE, **fields)
