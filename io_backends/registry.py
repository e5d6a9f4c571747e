"""Backends by name: this project's three, and third parties'.

A third party registers either with the entry point group ``sglang_hicache.io_backends`` (works in every
process, also in SGLang's spawned schedulers) or with :func:`register_backend` (this process only).
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from .interface import BackendFactory

ENTRY_POINT_GROUP = "sglang_hicache.io_backends"

AUTO = "auto"
"""The name that asks the policy."""

UPSTREAM_NAMES = ("kernel", "direct", "kernel_ascend")
"""SGLang's own values of ``--hicache-io-backend``; this project never takes them over."""

OWN_NAMES = ("fenced_kernel", "copy_engine", "hybrid")

_own = {
    "fenced_kernel": "sglang_hicache.io_backends.fenced_kernel:FencedKernelBackend",
    "copy_engine": "sglang_hicache.io_backends.copy_engine:CopyEngineBackend",
    "hybrid": "sglang_hicache.io_backends.hybrid:HybridBackend",
}
_registered: dict[str, BackendFactory] = {}


class UnknownBackendError(ValueError):
    """No backend of that name; the message lists those there are, and the nearest one."""


def register_backend(name: str, factory: BackendFactory) -> None:
    """Make ``factory`` available as ``--hicache-io-backend name`` in this process.

    Raises:
        ValueError: the name is not a lower-case identifier, or is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"backend name {name!r} must be lower-case letters, digits and underscores")
    if name == AUTO or name in UPSTREAM_NAMES or name in available_backends():
        raise ValueError(f"backend name {name!r} is taken")
    _registered[name] = factory


def unregister_backend(name: str) -> None:
    """Undo :func:`register_backend`.

    Raises:
        KeyError: ``name`` was not registered by :func:`register_backend`.
    """
    del _registered[name]


@cache
def _third_party() -> dict[str, EntryPoint]:
    reserved = {AUTO, *UPSTREAM_NAMES, *_own}
    return {p.name: p for p in entry_points(group=ENTRY_POINT_GROUP) if p.name not in reserved}


def available_backends() -> tuple[str, ...]:
    """Names that :func:`get_backend` knows: this project's first, then third parties', sorted."""
    return (*OWN_NAMES, *sorted({*_registered, *_third_party()}))


def get_backend(name: str) -> BackendFactory:
    """The factory of backend ``name``.

    Raises:
        UnknownBackendError: there is none.
    """
    if name in _registered:
        return _registered[name]
    if name in _own:
        module, _, attribute = _own[name].partition(":")
        factory: BackendFactory = getattr(import_module(module), attribute)
        return factory
    if name in _third_party():
        loaded: BackendFactory = _third_party()[name].load()
        return loaded
    raise UnknownBackendError(unknown_backend(name))


def unknown_backend(name: str) -> str:
    """The message for a name that is not there."""
    names = available_backends()
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no backend {name!r} (there are {', '.join(names)}){hint}"
