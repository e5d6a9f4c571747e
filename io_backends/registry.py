"""Backends by name: this project's three, and third parties'.

A third party registers either with the entry point group ``sglang_hicache.io_backends`` (works in every
process, also in SGLang's spawned schedulers) or with :func:`register_backend` (this process only). What a
backend says of itself, its spec, is the attribute ``spec`` of its factory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..policy.backend_spec import Backends, BackendSpec, spec_of
from ..policy.names import AUTO as AUTO
from ..policy.names import UPSTREAM_NAMES as UPSTREAM_NAMES
from ..policy.names import nearest
from .device.base import Device
from .interface import Backend, BackendFactory, complete
from .plan.geometry import PoolGeometry

ENTRY_POINT_GROUP = "sglang_hicache.io_backends"

_own = {
    "fenced_kernel": "sglang_hicache.io_backends.fenced_kernel:FencedKernelBackend",
    "copy_engine": "sglang_hicache.io_backends.copy_engine:CopyEngineBackend",
    "hybrid": "sglang_hicache.io_backends.hybrid:HybridBackend",
}
OWN_NAMES = tuple(_own)
"""This project's backends."""

_registered: dict[str, BackendFactory] = {}
_specs: dict[str, BackendSpec] = {}
"""Given to :func:`register_backend`."""


class UnknownBackendError(ValueError):
    """No backend of that name; the message lists those there are, and the nearest one."""


def register_backend(name: str, factory: BackendFactory, spec: BackendSpec | None = None) -> None:
    """Make ``factory`` available as ``--hicache-io-backend name`` in this process.

    Args:
        name: lower-case letters, digits and underscores.
        factory: makes an instance from the device and the policy's options.
        spec: what the backend says of itself; without it ``factory.spec``, if that has this name. Without
            either any options are let through, and nothing is known of its work on the SMs.

    Raises:
        ValueError: the name is not a lower-case identifier, or is taken, or the spec is another's.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"backend name {name!r} must be lower-case letters, digits and underscores")
    if name == AUTO or name in UPSTREAM_NAMES or name in available_backends():
        raise ValueError(f"backend name {name!r} is taken")
    if spec is not None and spec.name != name:
        raise ValueError(f"the spec of backend {name!r} is for {spec.name!r}")
    _registered[name] = factory
    if spec is not None:
        _specs[name] = spec


def unregister_backend(name: str) -> None:
    """Undo :func:`register_backend`.

    Raises:
        KeyError: ``name`` was not registered by :func:`register_backend`.
    """
    del _registered[name]
    _specs.pop(name, None)


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


def make_backend(name: str, device: Device, options: Mapping[str, Any]) -> Backend:
    """An instance of backend ``name`` with all of the interface (:func:`~.interface.complete`).

    Raises:
        UnknownBackendError: there is none.
        OptionsError: it can never work with these options.
    """
    return complete(get_backend(name)(device, options))


def loading_problem(name: str) -> str | None:
    """Why backend ``name`` cannot be loaded, so that no server with it starts; None if it can."""
    try:
        get_backend(name)
    # A third party's module may fail in any way when it is imported.
    except Exception as error:
        return f"cannot be loaded: {error!r}"
    return None


def ignored_spec(name: str) -> str | None:
    """What to say of backend ``name`` if it can be loaded and has a spec that nobody reads; else None."""
    own = getattr(get_backend(name), "__dict__", {}).get("spec")
    if name not in _specs and isinstance(own, BackendSpec) and own.name != name:
        return f"its spec is of another name, {own.name!r}, and is ignored: layouts and options are unchecked"
    return None


def unsupported(backend: Backend, geometry: PoolGeometry) -> str | None:
    """Why ``backend`` serves no pool like this: by its spec, or as it says itself; None if it does.

    What the spec rules out it is not asked: what ``explain`` says of a pool is then what a server does.
    """
    reason = spec_of(BACKENDS, backend.name).cannot_serve(
        geometry.layout, geometry.kv_kind, geometry.index_step
    )
    return backend.supports(geometry) if reason is None else f"{backend.name} {reason}"


class _Backends(Mapping[str, BackendSpec]):
    """What is registered now; the module of a backend is loaded when its spec is asked for."""

    def __getitem__(self, name: str) -> BackendSpec:
        if name not in available_backends():
            raise KeyError(name)
        spec = _specs.get(name)
        if spec is None:
            try:
                spec = getattr(get_backend(name), "spec", None)
            # A third party's module may fail in any way when it is imported. `doctor` says so, and a server
            # that asks for the backend does not start.
            except Exception:
                if name in _own:
                    raise
        # A class that derives from another's backend has that one's spec, which is not about it.
        if isinstance(spec, BackendSpec) and spec.name == name:
            return spec
        return BackendSpec(name)

    def __iter__(self) -> Iterator[str]:
        return iter(available_backends())

    def __len__(self) -> int:
        return len(available_backends())

    # One object for the whole process, whatever is registered when.
    __hash__ = object.__hash__
    __eq__ = object.__eq__


BACKENDS: Backends = _Backends()
"""The spec of every backend, by name: what policies are checked against."""


def unknown_backend(name: str) -> str:
    """The message for a name that is not there."""
    names = available_backends()
    near = nearest(name, (AUTO, *names, *UPSTREAM_NAMES))
    return f"no backend {name!r} (there are {', '.join((AUTO, *names))})" + (
        f"; did you mean {near!r}?" if near else ""
    )
