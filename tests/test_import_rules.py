"""Who may import whom: read off the sources, nothing is imported.

``policy`` knows no backend, ``io_backends`` no measurement; inside ``io_backends`` the plan of a transfer
knows no device, a device no backend, and a backend no SGLang. So each part can be read, and tested, without
those above it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import import_graph
import pytest
from import_graph import NEVER, PACKAGES, ROOT, circles, floors, graph_of, imports, level, upwards

MODULES = import_graph.modules()


def test_no_import_goes_upwards() -> None:
    assert upwards(MODULES) == []


@pytest.mark.parametrize("folder", sorted(NEVER))
def test_what_a_folder_must_not_know(folder: str) -> None:
    inside = {name: path for name, path in MODULES.items() if f"{name}.".startswith(f"{folder}.")}
    known = {name: set(imports(name, path, MODULES)) & NEVER[folder] for name, path in inside.items()}
    assert not {name: found for name, found in known.items() if found}


def test_policy_stands_alone() -> None:
    inside = {name: path for name, path in MODULES.items() if f"{name}.".startswith("policy.")}
    assert inside
    for name, path in inside.items():
        ours = {other for other in imports(name, path, MODULES) if other in MODULES}
        assert all(f"{other}.".startswith("policy.") for other in ours), (name, ours)


def test_nothing_imports_in_a_circle() -> None:
    assert circles(graph_of(MODULES)) == []


def test_a_circle_and_an_import_upwards_would_be_seen(tmp_path: Path) -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert level("policy.format.load") < level("io_backends.plan.copies") < level("io_backends.device.base")
    assert level("io_backends.hybrid") < level("io_backends.sglang.scheduler.fences") < level("bench.cli")
    wrong = {"policy/a.py": "from . import b", "policy/b.py": "from . import a\nfrom ..bench import c"}
    wrong |= {"bench/c.py": "import sglang_hicache.policy.b", "io_backends/d.py": ""}
    for name, text in wrong.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    known = import_graph.modules(tmp_path)
    assert upwards(known) == [("policy.b", "bench.c")]
    assert circles(graph_of(known)) == [["bench.c", "policy.a", "policy.b"]]
    script = str(Path(import_graph.__file__))
    shown = subprocess.run(
        [sys.executable, script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "policy: 2 files, 3 lines, 1 floors" in shown.stdout
    assert "1 circles, 1 imports upwards" in shown.stdout


def test_floors_are_what_stands_on_each_other() -> None:
    graph = {"a.x": {"a.y", "b.z"}, "a.y": {"a.z"}, "a.z": {"a.y", "a.w"}, "a.w": set(), "b.z": {"a.w"}}
    assert floors(graph, "a") == 3  # x, the circle of y and z, w
    assert floors(graph, "b") == 1
    assert floors(graph, "c") == 0


def test_nobody_compares_with_a_backends_name() -> None:
    """What a backend is like stands in its spec; the lab's scripts are about named ones."""
    names = {"hybrid", "copy_engine", "fenced_kernel"}
    found = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path.relative_to(ROOT).parts[:2] == ("bench", "lab"):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Compare):
                    parts = [each for side in (node.left, *node.comparators) for each in ast.walk(side)]
                    if names & {each.value for each in parts if isinstance(each, ast.Constant)}:
                        found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
