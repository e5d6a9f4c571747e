"""SGLang's entry point (group ``sglang.srt.plugins``, name ``hicache_io``).

Loading wraps only how the server's arguments are parsed and resolved. Nothing on the path of a write or a
forward is touched unless one of this project's backends was asked for: with ``kernel``, ``direct`` or
``kernel_ascend`` the functions that run are SGLang's own objects.
"""

from __future__ import annotations

import sys

from . import hooks, versions
from .handover.decision_handover import failed_to_load
from .launcher import options, resolution
from .scheduler import scheduler_hooks


def load() -> None:
    """Register the hooks. Called by SGLang in the command line, the engine and each spawned process.

    SGLang logs an exception from here and goes on, so what goes wrong is also kept for the guard.
    """
    try:
        _load()
    except BaseException as error:
        failed_to_load(error)
        raise


def _load() -> None:
    problem = versions.problem_with(versions.installed())
    options.refuse_early(problem)
    hooks.register({versions.ADD_CLI_ARGS: ("AFTER", options.extend_parser(problem))})
    options.accept_engine_keywords(problem)
    if problem is not None:
        return
    arguments = versions.arguments()
    hooks.register(
        {
            versions.FROM_CLI_ARGS: ("AROUND", options.around_from_cli_args),
            arguments.handle_hicache.target: ("AROUND", resolution.around_handle_hicache),
            arguments.resolve.target: ("AROUND", resolution.around_resolution),
        }
    )
    if "sglang.srt.managers.scheduler" in sys.modules:
        # Not in the detokenizer, say: importing the scheduler there would cost seconds and memory.
        scheduler_hooks.register_scheduler_hook()
