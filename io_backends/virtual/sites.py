"""Where in the program something was asked for."""

from __future__ import annotations

import sys

HIDDEN = {__package__, "torch", "contextlib", "weakref"}
"""Packages and modules that only pass calls on. A stand-in that launches for others adds its own."""

_shown: dict[str, bool] = {}


def caller() -> str:
    """``package/module.py:line in function`` of the innermost frame outside :data:`HIDDEN`."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not _is_shown(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "?").replace(".", "/")
    if frame.f_globals.get("__file__", "").endswith("__init__.py"):
        module += "/__init__"
    return f"{module}.py:{frame.f_lineno} in {frame.f_code.co_name}"


def hide(module: str) -> None:
    """Look through ``module`` (and what is in it) from now on: whoever called it is meant."""
    HIDDEN.add(module)
    _shown.clear()


def _is_shown(module: str) -> bool:
    known = _shown.get(module)
    if known is None:
        known = _shown[module] = not any(
            module == hidden or module.startswith(hidden + ".") for hidden in HIDDEN
        )
    return known
