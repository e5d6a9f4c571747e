"""The decision: made once, in the launching process, while SGLang resolves its arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang_hicache.io_backends.device import unavailable
from sglang_hicache.io_backends.registry import AUTO, OWN_NAMES, get_backend
from sglang_hicache.io_backends.sglang import runtime, versions
from sglang_hicache.io_backends.sglang.carried import ATTRIBUTE, Carried
from sglang_hicache.io_backends.sglang.errors import RefusedError, exit_with
from sglang_hicache.io_backends.sglang.options import (
    CLI_ATTRIBUTE,
    POLICY_ATTRIBUTE,
    check_name,
    is_ours,
)
from sglang_hicache.policy.decide import Decision, decide
from sglang_hicache.policy.facts import Fact, Facts, detect
from sglang_hicache.policy.load import PolicyError, policy_in_force

logger = logging.getLogger(__name__)

_SOURCE = "sglang-hicache-io"


def around_handle_hicache(original: Callable[[Any], None], server_args: Any) -> None:
    """Hook around SGLang's HiCache argument resolution.

    Raises:
        RefusedError: the server must not start (called from ``sglang.Engine``).
        SystemExit: the same, for a command line: one line on standard error, status 2.
    """
    try:
        _resolve(original, server_args)
    except (RefusedError, PolicyError) as error:
        if getattr(server_args, CLI_ATTRIBUTE, False):
            raise exit_with(error, 2) from None
        raise


def _resolve(original: Callable[[Any], None], server_args: Any) -> None:
    config = _view(server_args)
    name = config.hicache_io_backend
    option = getattr(server_args, POLICY_ATTRIBUTE, None)
    in_use = _hicache_in_use(config)
    if not is_ours(name):
        if option is not None:
            raise RefusedError(
                f"--hicache-io-policy has no say over --hicache-io-backend {name}, which is SGLang's own; "
                f"use --hicache-io-backend {AUTO}, or leave the policy out"
            )
        original(server_args)
        return
    check_name(name, None)
    if not in_use:
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
        original(server_args)
        return

    _refuse_what_is_not_covered(config, name)
    policy = policy_in_force(option)
    # SGLang knows only its own names. What it is told serves H2D, and pools that our backend does not.
    layout = config.hicache_mem_layout
    _declare(server_args, hicache_io_backend="direct" if layout == "page_first_direct" else "kernel")
    original(server_args)
    # SGLang may have changed the layout (storage backends do).
    decision = decide(policy, _facts(server_args, _view(server_args)), backend=name)
    _refuse_layout(name, decision, _view(server_args).hicache_mem_layout)
    problem = versions.check_points(
        versions.LAUNCHER_POINTS + versions.SCHEDULER_POINTS + versions.CALLED_POINTS, versions.installed()
    )
    if problem is not None:
        raise RefusedError(problem)
    setattr(server_args, ATTRIBUTE, Carried(decision.to_dict()))
    # A forked scheduler, or one in this process, finds the hook here; a spawned one loads the plug-in.
    runtime.register_scheduler_hook()


def _hicache_in_use(config: Any) -> bool:
    # The condition under which handle_hicache normalizes anything, in 0.5.18 to 0.5.23.
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


def _refuse_layout(name: str, decision: Decision, layout: str) -> None:
    """A backend asked for by name must be able to serve the layout; ``auto`` may fall back, and says so."""
    if name == AUTO or name not in OWN_NAMES:
        return
    layouts = getattr(get_backend(decision.backend), "layouts", None)
    if layouts is not None and layout not in layouts:
        raise RefusedError(
            f"--hicache-io-backend {name} cannot serve --hicache-mem-layout {layout} "
            f"(it can: {', '.join(sorted(layouts))}); choose one of these, or --hicache-io-backend {AUTO}"
        )


def _facts(server_args: Any, config: Any) -> Facts:
    resolved = "resolved by SGLang"
    device = str(config.device).partition(":")[0]
    backends = _attention_backends(config)
    facts = {
        "prefill_attention_backend": Fact(backends[0], resolved),
        "decode_attention_backend": Fact(backends[1], resolved),
        "kv_kind": Fact("mla" if _uses_mla(server_args) else "mha", resolved),
        "mem_layout": Fact(config.hicache_mem_layout, resolved),
        "page_size": Fact(config.page_size, resolved),
        "device": Fact(device, resolved),
    }
    return Facts({**detect({"device": device}), **facts})


def _view(server_args: Any) -> Any:
    """Resolved values so far; before 0.5.19 the arguments themselves are resolved in place."""
    if versions.installed().startswith("0.5.18"):
        return server_args
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(server_args)


def _declare(server_args: Any, **fields: Any) -> None:
    if versions.installed().startswith("0.5.18"):
        for field, value in fields.items():
            setattr(server_args, field, value)
        return
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, _SOURCE, **fields)


def _attention_backends(config: Any) -> tuple[str | None, str | None]:
    from sglang.srt.arg_groups.overrides import attention_backends_of

    prefill, decode = attention_backends_of(config)
    return prefill, decode


def _uses_mla(server_args: Any) -> bool:
    if versions.installed().startswith("0.5.18"):
        return bool(server_args.use_mla_backend())
    from sglang.srt.arg_groups.overrides import use_mla_backend

    return bool(use_mla_backend(server_args))
