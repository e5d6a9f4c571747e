"""Backends by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_hicache.io_backends import (
    UnknownBackendError,
    available_backends,
    get_backend,
    register_backend,
)
from sglang_hicache.io_backends.registry import unregister_backend


@pytest.fixture
def registered() -> Iterator[str]:
    register_backend("mine", lambda device, options: ("mine", options))  # type: ignore[arg-type, return-value]
    yield "mine"
    unregister_backend("mine")


def test_this_projects_backends_come_first() -> None:
    assert available_backends()[:3] == ("fenced_kernel", "copy_engine", "hybrid")


def test_a_registered_backend_is_found_until_it_is_taken_back(registered: str) -> None:
    assert registered in available_backends()
    assert get_backend(registered)(None, {"a": 1}) == ("mine", {"a": 1})  # type: ignore[arg-type, comparison-overlap]


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UnknownBackendError, match=r"no backend 'hybird'.*did you mean 'hybrid'\?"):
        get_backend("hybird")


@pytest.mark.parametrize("name", ["auto", "kernel", "direct", "kernel_ascend", "hybrid"])
def test_names_in_use_cannot_be_taken(name: str) -> None:
    with pytest.raises(ValueError, match="is taken"):
        register_backend(name, lambda device, options: None)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("name", ["Hybrid", "my-backend", "1st", ""])
def test_names_are_identifiers(name: str) -> None:
    with pytest.raises(ValueError, match="lower-case"):
        register_backend(name, lambda device, options: None)  # type: ignore[arg-type, return-value]


def test_the_interface_imports_neither_torch_nor_sglang() -> None:
    import subprocess
    import sys

    code = (
        "import sys, sglang_hicache.io_backends.hybrid, sglang_hicache.io_backends.device.cpu;"
        "print([m for m in ('torch', 'sglang') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
