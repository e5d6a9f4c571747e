"""The decision on its way from the launching process to every scheduler.

It rides on ``ServerArgs`` as ``_hicache_io``, which SGLang pickles with the arguments. Arriving in another
process it makes that process unable to build a ``Scheduler`` unless the plug-in's hook is around it. This is
the part that does not depend on SGLang's plug-in framework, which logs a plug-in that fails and goes on:
without it, such a scheduler would run SGLang's own copy kernel unfenced.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from ...registry import UPSTREAM_NAMES
from ..errors import RefusedError, end_scheduler

ATTRIBUTE = "_hicache_io"

_SCHEDULER_MODULE = "sglang.srt.managers.scheduler"

_failure: str | None = None
_taken_over = False


def failed_to_load(error: BaseException) -> None:
    """The plug-in failed to load in this process; SGLang only logs that."""
    global _failure
    _failure = f"the plug-in hicache_io failed to load there: {error!r}"


def taken_over() -> None:
    """The decision has reached the hook around ``Scheduler.__init__``, which answers for it from here on."""
    global _taken_over
    _taken_over = True


def is_ours(name: str | None) -> bool:
    """Whether ``--hicache-io-backend name`` is this plug-in's to serve."""
    return name is not None and name not in UPSTREAM_NAMES


class Carried:
    """A decision as plain data (``Decision.to_dict()``), guarded on arrival."""

    def __init__(self, decision: dict[str, Any]) -> None:
        self.decision = decision

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], Carried], tuple[dict[str, Any]]]:
        return _arrive, (self.decision,)


def _arrive(decision: dict[str, Any]) -> Carried:
    arm()
    return Carried(decision)


def arm() -> None:
    """Make ``Scheduler`` refuse to start in this process while the plug-in is not switched on. Idempotent."""
    if _SCHEDULER_MODULE in sys.modules:
        _guard_scheduler()
    # The module may still be to come: every scheduler process loads plug-ins right before it builds one.
    import sglang.srt.plugins as plugins

    original = plugins.load_plugins
    if getattr(original, "_hicache_io_guard", False):
        return

    @functools.wraps(original)
    def load_plugins() -> None:
        original()
        if _SCHEDULER_MODULE in sys.modules:
            _guard_scheduler()

    load_plugins._hicache_io_guard = True  # type: ignore[attr-defined]
    plugins.load_plugins = load_plugins


def _guard_scheduler() -> None:
    scheduler = sys.modules[_SCHEDULER_MODULE].Scheduler
    original = scheduler.__init__
    if getattr(original, "_hicache_io_guard", False):
        return

    @functools.wraps(original)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        if not _taken_over:
            reason = _failure or (
                "the plug-in hicache_io was not loaded in this process "
                "(is it left out by SGLANG_PLUGINS or SGLANG_PLATFORM?)"
            )
            raise end_scheduler(
                RefusedError(
                    f"this scheduler was asked to run one of our write-back backends, but {reason}. "
                    "It would copy KV cache without fences, so it does not start. Mend that, or start "
                    "with --hicache-io-backend kernel"
                )
            )
        original(self, *args, **kwargs)

    guarded._hicache_io_guard = True  # type: ignore[attr-defined]
    scheduler.__init__ = guarded
