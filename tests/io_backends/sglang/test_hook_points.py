"""The hook table against the published wheels of every supported SGLang, read as source, not imported."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from repository import VERSIONS

from sglang_hicache.io_backends.sglang.pools.geometry import NOT_COMPARED, OTHER_KINDS, WITHOUT_BYTES
from sglang_hicache.io_backends.sglang.versions import (
    HOST_POOL,
    PLANNER_POINTS,
    RELEASES,
    SUPPORTED,
    HookPoint,
    check_points,
    current,
    installed,
    problem_with,
    release_of,
)

WHEELS = VERSIONS
POINTS = tuple(dict.fromkeys((*(point for release in RELEASES for point in release.points), *PLANNER_POINTS)))
"""Of all releases."""


@pytest.fixture(scope="module", params=SUPPORTED)
def version(request: pytest.FixtureRequest) -> str:
    version: str = request.param
    assert (WHEELS / version / "sglang").is_dir(), f"SGLang {version} is not unpacked: run `make versions`"
    return version


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def source_of(version: str, target: str) -> tuple[ast.Module, list[str]]:
    """The module that holds ``target``, and the names below it."""
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        path = WHEELS.joinpath(version, *parts[:end]).with_suffix(".py")
        if path.is_file():
            return tree(path), parts[end:]
    raise FileNotFoundError(f"no module of {target} in SGLang {version}")


def function(version: str, target: str) -> ast.FunctionDef | None:
    try:
        node: ast.AST
        node, names = source_of(version, target)
    except FileNotFoundError:
        return None
    for name in names:
        found = [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and child.name == name
        ]
        if not found:
            return None
        node = found[-1]
    return node if isinstance(node, ast.FunctionDef) else None


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.target.removeprefix("sglang.srt."))
def test_every_point_is_where_the_table_says(version: str, point: HookPoint) -> None:
    found = function(version, point.target)
    if point not in (*release_of(version).points, *PLANNER_POINTS):
        # Newer host pools have the older copy too, and call it from the newer one.
        kept = point.target.startswith(HOST_POOL + ".")
        assert kept or found is None, f"{point.target} exists in {version}; the table says it does not"
        return
    assert found is not None, f"{point.target} is gone"
    parameters = tuple(argument.arg for argument in (*found.args.posonlyargs, *found.args.args))
    assert parameters[: len(point.parameters)] == point.parameters


def assigned_attributes(version: str, target: str) -> set[str]:
    module, names = source_of(version, target)
    node: ast.AST = module
    for name in names:
        node = next(c for c in ast.iter_child_nodes(node) if getattr(c, "name", None) == name)
    return {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
    }


def test_what_the_hooks_read_is_there(version: str) -> None:
    """Attributes that the plug-in reads off SGLang's objects."""
    engine = assigned_attributes(version, "sglang.srt.mem_cache.l2_transfer.L2TransferEngine")
    assert {"io_backend", "device_to_host_stream"} <= engine
    scheduler = assigned_attributes(version, "sglang.srt.managers.scheduler.Scheduler")
    assert {"enable_overlap", "tree_cache", "forward_stream"} <= scheduler
    controller = assigned_attributes(version, "sglang.srt.managers.cache_controller.HiCacheController")
    assert {"l2_transfer_engine", "mem_pool_host"} <= controller
    mode = source_of(version, "sglang.srt.model_executor.forward_batch_info.ForwardMode.x")[0]
    names = {node.name for node in ast.walk(mode) if isinstance(node, ast.FunctionDef)}
    assert {"is_prebuilt", "is_decode_or_idle"} <= names


def test_the_producer_fence_of_sglang_itself_is_where_upstream_says(version: str) -> None:
    """`write_fence_stream` came in 0.5.23; `explain` tells the operator so."""
    controller = assigned_attributes(version, "sglang.srt.managers.cache_controller.HiCacheController")
    assert ("write_fence_stream" in controller) == (version == "0.5.23")


def test_the_transfer_engine_calls_the_pool_method_that_is_routed(version: str) -> None:
    body = function(version, "sglang.srt.mem_cache.l2_transfer.L2TransferEngine.submit_device_to_host")
    assert body is not None
    called = {node.attr for node in ast.walk(body) if isinstance(node, ast.Attribute)}
    copies = {name for name in called if name.startswith("backup_from_device")}
    assert copies == {release_of(version).pool_copy}


@pytest.mark.parametrize("version", SUPPORTED)
def test_supported_versions_have_no_problem(version: str) -> None:
    assert problem_with(version) is None
    assert problem_with(version + "+cu130") is None


@pytest.mark.parametrize(
    "version", ["0.5.17", "0.5.24", "0.6.0", "0.5.23.post1", "0.5.23rc1", "0.0.0.dev0", "x"]
)
def test_others_do_and_the_message_says_what_to_do(version: str) -> None:
    message = problem_with(version)
    assert message is not None
    assert version in message
    assert "--hicache-io-backend kernel" in message


class TestRunningSglang:
    @pytest.fixture(autouse=True)
    def importable(self, libcuda: None) -> None:
        """SGLang imports."""

    def test_the_installed_one_is_as_published(self) -> None:
        assert check_points(current().points, installed()) is None

    def test_a_target_that_is_gone_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sglang.srt.mem_cache.l2_transfer import L2TransferEngine

        monkeypatch.delattr(L2TransferEngine, "submit_device_to_host")
        message = check_points(current().points, installed())
        assert message is not None
        assert "L2TransferEngine.submit_device_to_host is not there" in message

    def test_a_target_with_other_parameters_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sglang.srt.mem_cache.l2_transfer import L2TransferEngine

        monkeypatch.setattr(L2TransferEngine, "submit_device_to_host", lambda self, jobs: None)
        message = check_points(current().points, installed())
        assert message is not None
        assert "takes ('self', 'jobs'), expected ('self', 'transfers')" in message


@pytest.mark.parametrize("kind", [*OTHER_KINDS, *NOT_COMPARED, *WITHOUT_BYTES])
def test_every_kind_of_pool_that_is_left_to_sglang_exists(kind: str) -> None:
    found = [
        version
        for version in SUPPORTED
        for path in (WHEELS / version / "sglang/srt/mem_cache").rglob("*.py")
        if re.search(rf"^class {kind}\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert found, f"no supported SGLang has {kind}"
