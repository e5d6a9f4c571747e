"""SGLang's entry point (group ``sglang.srt.plugins``, name ``hicache_io``).

Loading wraps only how the server's arguments are parsed and resolved. Nothing on the path of a write or a
forward is touched unless one of this project's backends was asked for: with ``kernel``, ``direct`` or
``kernel_ascend`` the functions that run are SGLang's own objects.
"""

from __future__ import annotations

import sys

from . import versions
from .launcher import options, resolution
from .scheduler import scheduler_hooks

_failure: str | None = None


def failure() -> str | None:
    """What went wrong when the plug-in was loaded in this process; None if nothing, or not loaded."""
    return _failure


def load() -> None:
    """Register the hooks. Called by SGLang in the command line, the engine and each spawned process.

    SGLang logs an exception from here and goes on, so what goes wrong is also kept for the guard.
    """
    global _failure
    try:
        _load()
    except BaseException as error:
        _failure = f"the plug-in hicache_io failed to load there: {error!r}"
        raise


def _load() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    version = versions.installed()
    problem = versions.problem_with(version)
    HookRegistry.register(versions.ADD_CLI_ARGS, options.extend_parser(problem), HookType.AFTER)
    options.accept_engine_keywords(problem)
    if problem is not None:
        return
    HookRegistry.register(versions.FROM_CLI_ARGS, options.around_from_cli_args, HookType.AROUND)
    old = version.startswith("0.5.18")
    handle = versions.HANDLE_HICACHE_0_5_18 if old else versions.HANDLE_HICACHE
    HookRegistry.register(handle, resolution.around_handle_hicache, HookType.AROUND)
    resolve = versions.RESOLVE_0_5_18 if old else versions.RESOLVE
    HookRegistry.register(resolve, resolution.around_resolution, HookType.AROUND)
    if "sglang.srt.managers.scheduler" in sys.modules:
        # Not in the detokenizer, say: importing the scheduler there would cost seconds and memory.
        scheduler_hooks.register_scheduler_hook()
