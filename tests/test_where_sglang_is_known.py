"""Which folders know SGLang and the GPU's libraries, and which part of ``io_backends/sglang`` knows which.

Read as source: nothing is imported, so that this runs where SGLang is not installed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "sglang_hicache"
FOLDERS = ("io_backends", "policy", "bench")

KNOWN_IN: Mapping[str, Mapping[str, str]] = {
    "sglang": {
        "io_backends/sglang/*": "the plug-in",
        "bench/race/simulation/*": "runs SGLang's cache, pools and transfers on a virtual device",
        "bench/*sglang_pools.py": "measures SGLang's own copies beside ours",
    },
    "torch": {
        "io_backends/device/*": "the seam to hardware",
        "io_backends/sglang/*": "SGLang's indices and pools are tensors",
        "bench/*": "forwards to measure beside, models to serve, SGLang's tensors in the simulation",
    },
    "triton": {
        "io_backends/device/gather_kernel.py": "the gather",
        "io_backends/device/small_reads_kernel.py": "reads past the copy engine",
        "bench/*idle_gpu.py": "asks whether a kernel compiles for a GPU that is not here",
    },
    "cuda": {"bench/*contenders.py": "measures the driver's own calls beside ours"},
}
"""By library: the files that import it (``*`` crosses folders), and why they must."""

ABOVE = frozenset({"errors", "hooks", "unsafe", "versions"})
"""Modules that every part of ``io_backends/sglang`` may import."""

MAY_IMPORT: Mapping[str, frozenset[str]] = {
    "plugin": frozenset({"handover", "launcher", "scheduler"}),
    "launcher": frozenset({"handover", "scheduler"}),
    "pools": frozenset(),
    "handover": frozenset({"pools"}),
    "scheduler": frozenset({"handover", "metrics", "no_gpu", "pools"}),
    "metrics": frozenset(),
    "no_gpu": frozenset({"pools"}),
    "diagnose": frozenset({"handover", "launcher", "no_gpu", "pools"}),
    **dict.fromkeys(ABOVE, frozenset[str]()),
}
"""By part: other parts that it may import, or single modules of one. What the parts' first lines say."""

VERSION = re.compile(r"(?<![\d.])0\.5\.\d+(?!\.)")
DECIDES = "io_backends/sglang/versions.py"
NAMES_A_VERSION = {"bench/*sglang_pools.py": "written for one release, and refuses any other"}


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the package by its path in the repository."""
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def imported(path: str, tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it: of ``from a import b``, ``a.b``."""
    here = [PACKAGE, *Path(path).with_suffix("").parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def importers(library: str) -> set[str]:
    return {
        path
        for path, tree in sources().items()
        if any(name.partition(".")[0] == library for name in imported(path, tree))
    }


@pytest.mark.parametrize("library", KNOWN_IN)
def test_a_library_is_known_only_where_it_belongs(library: str) -> None:
    found = importers(library)
    allowed = KNOWN_IN[library]
    assert {path for path in found if not any(fnmatch(path, where) for where in allowed)} == set()
    assert {where for where in allowed if not any(fnmatch(path, where) for path in found)} == set()


def test_what_moves_bytes_does_not_know_what_measures_it() -> None:
    """Neither ``hicache-io race`` nor its simulation is part of what serves."""
    upwards = {
        (path, name)
        for path, tree in sources().items()
        if path.startswith("io_backends/")
        for name in imported(path, tree)
        if name.startswith(f"{PACKAGE}.bench")
    }
    assert upwards == set()


def part_of(dotted: str) -> str:
    """Below ``io_backends/sglang``: the folder, or the module that is in none."""
    return dotted.partition(".")[0]


def crossings() -> set[tuple[str, str]]:
    """(part, dotted name of what it imports) below ``io_backends/sglang``, but not within a part."""
    inside = f"{PACKAGE}.io_backends.sglang."
    found = set()
    for path, tree in sources().items():
        if not path.startswith("io_backends/sglang/") or path == "io_backends/sglang/__init__.py":
            continue
        part = part_of(".".join(Path(path).with_suffix("").parts[2:]))
        for name in imported(path, tree):
            if name.startswith(inside) and part_of(name.removeprefix(inside)) != part:
                found.add((part, name.removeprefix(inside)))
    return found


def is_allowed(part: str, name: str) -> bool:
    return part_of(name) in ABOVE or any(
        name == other or name.startswith(other + ".") for other in MAY_IMPORT.get(part, ())
    )


def test_each_part_of_the_plug_in_imports_what_its_first_lines_say() -> None:
    assert {each for each in crossings() if not is_allowed(*each)} == set()


def test_nothing_is_allowed_that_no_part_needs() -> None:
    needed = {
        (part, other)
        for part, others in MAY_IMPORT.items()
        for other in others
        if any(by == part and (name + ".").startswith(other + ".") for by, name in crossings())
    }
    assert needed == {(part, other) for part, others in MAY_IMPORT.items() for other in others}


def test_only_one_file_tells_sglang_versions_apart() -> None:
    """No text of any other one, but its documentation, names an SGLang version."""
    named = {
        (path, node.value)
        for path, tree in sources().items()
        # A policy's rules and evidence are about versions that it is told of.
        if path != DECIDES and not path.startswith("policy/")
        for node in strings(tree)
        if VERSION.search(node.value) and not any(fnmatch(path, where) for where in NAMES_A_VERSION)
    }
    assert named == set()


def test_it_is_the_one() -> None:
    assert any(VERSION.fullmatch(node.value) for node in strings(sources()[DECIDES]))


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """String constants, parts of f-strings included, but not documentation: a text that is a statement."""
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node
