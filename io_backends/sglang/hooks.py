"""Hooks on SGLang's functions, by its own registry (``sglang.srt.plugins.hook_registry``)."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from .errors import RefusedError

Hooks = Mapping[str, tuple[str, Callable[..., Any]]]
"""By dotted path of the function: ``BEFORE``, ``AFTER`` or ``AROUND``, and what is called then."""


def register(hooks: Hooks) -> None:
    """Tell SGLang of hooks, but for those that it knows. It applies them when all plug-ins are loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, (kind, hook) in hooks.items():
        if hook not in [known for _, known, _ in HookRegistry._hooks.get(target, [])]:
            HookRegistry.register(target, hook, HookType[kind])


def apply(hooks: Hooks) -> None:
    """Register hooks and apply them now."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    register(hooks)
    HookRegistry.apply_hooks()


def apply_or_refuse(hooks: Hooks) -> None:
    """Apply hooks, and make sure that they are there: SGLang only logs one that fails.

    Raises:
        RefusedError: one is not.
    """
    apply(hooks)
    for target, (_, hook) in hooks.items():
        owner, _, name = target.rpartition(".")
        if not _wraps(getattr(pkgutil.resolve_name(owner), name), hook):
            raise RefusedError(
                f"the hook on {target} could not be applied (SGLang's log says why); another plug-in may "
                "have taken it. Remove that, or start with --hicache-io-backend kernel"
            )


def _wraps(function: Any, hook: Callable[..., Any]) -> bool:
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
