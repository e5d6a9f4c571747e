"""Backends by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pools import make_pool

from sglang_hicache.io_backends import (
    Backend,
    BackendSpec,
    Option,
    SmWork,
    Submission,
    UnknownBackendError,
    available_backends,
    get_backend,
    register_backend,
    registry,
)
from sglang_hicache.io_backends.copy_engine import CopyEngineBackend
from sglang_hicache.io_backends.device.cpu import CpuDevice
from sglang_hicache.io_backends.interface import complete
from sglang_hicache.io_backends.plan.geometry import PoolGeometry
from sglang_hicache.io_backends.registry import (
    BACKENDS,
    ENTRY_POINT_GROUP,
    OWN_NAMES,
    ignored_spec,
    loading_problem,
    make_backend,
    unregister_backend,
    unsupported,
)
from sglang_hicache.policy.format import json_schema
from sglang_hicache.policy.names import NameProblem


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


class Bare:
    """All that a backend must have, and nothing else."""

    name = "mine"

    def __init__(self, device: Any, options: Any) -> None:
        self.calls: list[str] = []

    def supports(self, geometry: Any) -> str | None:
        return "no"

    def prepare(self, geometry: Any) -> None:
        self.calls.append("prepare")

    def submit(self, transfer: Any, stream: Any) -> Submission:
        return Submission(copies=1, nbytes=2)


class Whole(Bare):
    """A third party's class that has the rest too, without deriving from the interface."""

    spec = BackendSpec("mine", layouts=frozenset({"layer_first"}), options=(), sm_work=SmWork.GATHER)
    staging_bytes = (1, 2)
    waiting_bytes = 3

    def start(self, **named: Any) -> str:
        self.calls.append(f"start {sorted(named)}")
        return "started"


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    yield lambda *args: register_backend("mine", *args)
    unregister_backend("mine")


def test_what_a_class_leaves_out_has_defaults(register: Callable[..., None]) -> None:
    register(Bare)
    backend = make_backend("mine", None, {})  # type: ignore[arg-type]
    assert isinstance(backend, Backend)
    assert backend.name == "mine"
    assert backend.supports(None) == "no"  # type: ignore[arg-type]
    assert (backend.upstream_indices, backend.staging_bytes, backend.waiting_bytes) == (False, (0, 0), 0)
    assert backend.start(step_tokens=1, forwards_wait=True) is None
    backend.launched()
    assert backend.submit(None, None) == Submission(1, 2)  # type: ignore[arg-type]


def test_what_a_class_has_of_the_rest_is_used(register: Callable[..., None]) -> None:
    register(Whole)
    backend = make_backend("mine", None, {})  # type: ignore[arg-type]
    assert (backend.staging_bytes, backend.waiting_bytes) == ((1, 2), 3)
    assert backend.start(step_tokens=1, forwards_wait=True, sharers=2) == "started"
    backend.launched()


def test_a_spec_is_the_factorys_or_given_with_it(register: Callable[..., None]) -> None:
    register(Whole)
    assert BACKENDS["mine"] is Whole.spec
    unregister_backend("mine")
    spec = BackendSpec("mine", sm_work=SmWork.NONE)
    register(Bare, spec)
    assert BACKENDS["mine"] is spec
    unregister_backend("mine")
    register(Bare)
    assert BACKENDS["mine"] == BackendSpec("mine"), "the one before is gone"


def pool(layout: str, kv_kind: str) -> PoolGeometry:
    return replace(
        make_pool("page_first", layers=1, page_size=1, row_bytes=(16,)).geometry,
        layout=layout,
        kv_kind=kv_kind,
    )


@pytest.mark.parametrize("layouts", [None, frozenset({"page_first"})])
@pytest.mark.parametrize("kinds", [None, frozenset({"mha"}), frozenset({"mla", "index"})])
def test_a_pool_that_the_spec_rules_out_is_not_served_whatever_the_backend_says(
    register: Callable[..., None], layouts: frozenset[str] | None, kinds: frozenset[str] | None
) -> None:
    """And what the spec says of a pool is what `explain` says of it: they cannot differ."""

    class Eager(Bare):
        def supports(self, geometry: Any) -> str | None:
            self.calls.append("asked")
            return None

    spec = BackendSpec("mine", layouts=layouts, kv_kinds=kinds)
    register(Eager, spec)
    for layout in ("page_first", "page_head"):
        for kind in ("mha", "mla", "index", "state"):
            backend = Eager(None, {})
            served = (layouts is None or layout in layouts) and (kinds is None or kind in kinds)
            said = unsupported(complete(backend), pool(layout, kind))
            assert (said is None) == served == (spec.cannot_serve(layout, kind) is None)
            assert backend.calls == ["asked"] * served
            if not served:
                assert said == f"mine {spec.cannot_serve(layout, kind)}"


def test_of_a_pool_that_the_spec_allows_the_backend_has_the_last_word(register: Callable[..., None]) -> None:
    register(Bare, BackendSpec("mine", kv_kinds=frozenset({"mha"})))
    assert unsupported(complete(Bare(None, {})), pool("page_first", "mha")) == "no"


def test_what_is_not_known_of_a_server_rules_nothing_out() -> None:
    spec = BackendSpec("mine", layouts=frozenset({"page_first"}), kv_kinds=frozenset({"mha"}))
    assert spec.cannot_serve(None, None) is None
    assert spec.cannot_serve("page_first", None) is None
    assert spec.cannot_serve(None, "mla") == "cannot serve KV cache of kind mla (it can: mha)"
    assert BackendSpec("mine").cannot_serve("page_head", "mla") is None


def test_anothers_spec_says_nothing(register: Callable[..., None]) -> None:
    with pytest.raises(ValueError, match="the spec of backend 'mine' is for 'yours'"):
        register(Bare, BackendSpec("yours"))

    class Derived(CopyEngineBackend):
        name = "mine"

    register(Derived)
    assert BACKENDS["mine"] == BackendSpec("mine")


def test_a_module_that_cannot_be_imported_has_no_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "no_such_module:Backend", ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "_third_party", lambda: {"broken": broken})
    assert BACKENDS["broken"] == BackendSpec("broken")
    with pytest.raises(ModuleNotFoundError):
        get_backend("broken")


def test_every_backend_of_this_project_says_all_of_itself() -> None:
    assert tuple(BACKENDS)[:3] == OWN_NAMES
    for name in OWN_NAMES:
        spec = BACKENDS[name]
        assert spec.name == name
        assert spec.layouts
        assert spec.options is not None
        assert spec.sm_work is not SmWork.UNKNOWN
    with pytest.raises(KeyError):
        BACKENDS["kernel"]


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        (Option("n", most=4, because="four"), [1, 4], [0, 5, -1, True, "1", 1.0, None]),
        (Option("n", least=0), [0, 10**9], [-1, "auto"]),
        (Option("n", words=("auto",), default="auto"), ["auto", 1], ["Auto", 0, []]),
        (Option("n", words=("a", "b"), numbers=False), ["a", "b"], ["c", 1]),
        (Option("n", flag=True, default=False), [True, False], [0, 1, "true"]),
    ],
)
def test_options_take_what_can_work(option: Option, good: list[Any], bad: list[Any]) -> None:
    schema = Draft202012Validator(json_schema._option(option))
    for value in good:
        option.check(value)
        assert schema.is_valid(value)
    for value in bad:
        with pytest.raises(NameProblem, match=r"^n must be "):
            option.check(value)
        # To JSON 1.0 is the whole number 1.
        assert (value == 1.0 and not isinstance(value, (bool, int))) or not schema.is_valid(value)


def test_a_default_must_work() -> None:
    with pytest.raises(NameProblem, match="n must be at most 4, not 5: four"):
        Option("n", default=5, most=4, because="four")
    with pytest.raises(NameProblem, match=r"^n must be at most 4, not 5$"):
        Option("n", default=5, most=4)


def test_a_pool_of_steps_goes_to_who_says_that_it_takes_them() -> None:
    """Others would take each index for a row."""
    assert "4 indices stand for one row" in str(BackendSpec("mine").cannot_serve("page_first", "mla", 4))
    for name in OWN_NAMES:
        assert BACKENDS[name].cannot_serve("page_first", "mla", 4) is None
    pool = make_pool("page_first", layers=1, page_size=1, row_bytes=(16,)).geometry
    stepped = replace(pool, index_step=2)
    served = get_backend("copy_engine")(CpuDevice(), {})
    assert unsupported(served, stepped) is None
    register_backend("mine", lambda device, options: served, BackendSpec("mine"))
    try:
        served.name = "mine"
        assert unsupported(served, pool) is None
        assert "2 indices stand for one row" in str(unsupported(served, stepped))
    finally:
        unregister_backend("mine")


def test_a_spec_of_names_that_no_pool_has_cannot_be_made() -> None:
    with pytest.raises(NameProblem, match="memory layout of backend mine 'page_fist'") as caught:
        BackendSpec("mine", layouts=frozenset({"page_fist"}))
    assert caught.value.hint == "page_first"
    with pytest.raises(NameProblem, match="KV kind of backend mine 'mhaa'"):
        BackendSpec("mine", kv_kinds=frozenset({"mhaa"}))


def test_what_is_wrong_with_a_backend_itself() -> None:
    class Mine:
        spec = BackendSpec("yours")

    class Derived(CopyEngineBackend):
        """Its spec is the other's, and not about it."""

    for factory, expected in ((Mine, True), (Derived, False), (CopyEngineBackend.supports, False)):
        register_backend("mine", factory)  # type: ignore[arg-type]
        try:
            assert loading_problem("mine") is None
            assert bool(ignored_spec("mine")) == expected
        finally:
            unregister_backend("mine")
    assert "no backend 'mine'" in str(loading_problem("mine"))
    assert all(loading_problem(name) is None and ignored_spec(name) is None for name in OWN_NAMES)
