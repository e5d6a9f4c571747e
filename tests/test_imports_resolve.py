"""What tools see that know nothing of an installation: every import of the project's own resolves by path."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("io_backends", "policy", "bench")
NAME = "sglang_hicache"
PACKAGES: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
    "setuptools"
]["packages"]

FILES = [path for folder in (*FOLDERS, "tests") for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[int, Path, str | None]]:
    """(line, what is imported from as a path without suffix, name) of each first-party import of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for each in node.names:
                if each.name.split(".")[0] == NAME:
                    yield node.lineno, ROOT.joinpath(*each.name.split(".")[1:]), None
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                start = path.parents[node.level - 1]
            elif parts and parts[0] == NAME:
                start, parts = ROOT, parts[1:]
            else:
                continue
            for each in node.names:
                yield node.lineno, start.joinpath(*parts), each.name


def module(path: Path) -> Path | None:
    """The file of a module or package; None where there is none."""
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def defines(file: Path, name: str) -> bool:
    """Whether a name is bound at the top of a file, or in a block there."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and node.name == name:
            return True
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name:
            return True
        if isinstance(node, ast.ImportFrom | ast.Import) and any(
            (each.asname or each.name) == name for each in node.names
        ):
            return True
    return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_party_imports_resolve_by_path(path: Path) -> None:
    for line, source, name in imports(path):
        where = f"{path.relative_to(ROOT)}:{line}"
        if name is not None and module(source / name) is not None:
            continue
        file = module(source)
        assert file is not None, f"{where}: no file for {source.relative_to(ROOT)}"
        assert name is None or defines(file, name), f"{where}: {file.relative_to(ROOT)} has no {name}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_inside_the_folders_imports_are_relative(folder: str) -> None:
    """Only then does an editor that was opened on a clone, with no installation, find what they name."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not any(each.split(".")[0] == NAME for each in names), f"{path}:{node.lineno}"


def test_what_is_in_the_wheel_needs_nothing_that_is_not() -> None:
    """bench/lab is the maintainers', and stays in the repository."""
    inside = {ROOT.joinpath(*name.split(".")[1:]) for name in PACKAGES}
    left_out = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")} - inside
    assert left_out == {ROOT / "bench" / "lab"}
    for folder in inside:
        for path in folder.glob("*.py"):
            for line, source, name in imports(path):
                file = (module(source / name) if name else None) or module(source)
                assert file is not None
                assert file.parent in inside, (
                    f"{path.relative_to(ROOT)}:{line} needs {file.relative_to(ROOT)}"
                )


def test_plan_is_pure(tmp_path: Path) -> None:
    """A bare copy of a folder of numbers: no torch, no device, nothing else of this project."""
    allowed = {"numpy", *sys.stdlib_module_names}
    plan = ROOT / "io_backends" / "plan"
    for path in plan.glob("*.py"):
        for line, source, _ in imports(path):
            assert source.parent == plan, f"{path.relative_to(ROOT)}:{line}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {each.name.split(".")[0] for each in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] in allowed
    shutil.copytree(plan, tmp_path / "plan")
    program = "import plan.geometry, plan.staged_write, plan.ring_size, plan.ring"
    subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, check=True, env=_numpy_only())


def _numpy_only() -> dict[str, str]:
    import numpy

    return {"PYTHONPATH": str(Path(numpy.__file__).parents[1]), "PATH": ""}
