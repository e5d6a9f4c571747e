"""Who may import whom: read off the sources, nothing is imported.

``policy`` knows no backend, ``io_backends`` no measurement; inside ``io_backends`` the plan of a transfer
knows no device, a device no backend, and a backend no SGLang. So each part can be read, and tested, without
those above it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("policy", "io_backends", "bench")

#: Folders from the bottom up: a module imports from its own folder's level and from those before it. The
#: longest one that a module is in counts; the modules right in ``io_backends`` are the backends.
LEVELS = (
    "policy",
    "io_backends.plan",
    "io_backends.device",
    "io_backends.virtual",
    "io_backends",
    "io_backends.sglang",
    "bench",
)
#: What a folder must not import, however deep inside a function.
NEVER = {
    "policy": {"torch", "sglang", "numpy", "cuda", "triton"},
    "io_backends.plan": {"torch", "sglang", "cuda", "triton"},
}


def modules() -> dict[str, Path]:
    """Every module of the three folders, by its dotted name below ``sglang_hicache``."""
    found = {}
    for path in (each for package in PACKAGES for each in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str, path: Path, *, for_types: bool = True) -> Iterator[str]:
    """What ``module`` imports, at the top and in functions: modules of ours by their name in `MODULES`,
    others by their first name. ``for_types``: also what only a type checker reads.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped |= {id(inner) for each in node.body for inner in ast.walk(each)}
    for node in ast.walk(tree):
        if id(node) in skipped and not for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = package.split(".")
                assert node.level <= len(parents) + 1, f"{path}:{node.lineno} leaves the package"
                kept = parents[: len(parents) - node.level + 1]
                origin = ".".join([*kept, *([node.module] if node.module else [])])
            origin = origin.removeprefix("sglang_hicache.")
            for alias in node.names:
                inner = f"{origin}.{alias.name}" if origin else alias.name
                found = inner if inner in MODULES else origin
                yield found if found in MODULES else found.partition(".")[0]


def level(module: str) -> int:
    inside = [each for each in LEVELS if f"{module}.".startswith(f"{each}.")]
    return LEVELS.index(max(inside, key=len))


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other (Tarjan's strongly connected components of more than one)."""
    found: list[list[str]] = []
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in sorted(graph.get(module, ())):
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            at = stack.index(module)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(graph):
        if module not in number:
            visit(module)
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_goes_upwards(module: str) -> None:
    upwards = {
        other
        for other in imports(module, MODULES[module])
        if other in MODULES and level(other) > level(module)
    }
    assert not upwards


@pytest.mark.parametrize("folder", sorted(NEVER))
def test_what_a_folder_must_not_know(folder: str) -> None:
    inside = {name: path for name, path in MODULES.items() if f"{name}.".startswith(f"{folder}.")}
    known = {name: set(imports(name, path)) & NEVER[folder] for name, path in inside.items()}
    assert not {name: found for name, found in known.items() if found}


def test_policy_stands_alone() -> None:
    inside = {name: path for name, path in MODULES.items() if f"{name}.".startswith("policy.")}
    assert inside
    for name, path in inside.items():
        ours = {other for other in imports(name, path) if other in MODULES}
        assert all(f"{other}.".startswith("policy.") for other in ours), (name, ours)


def test_nothing_imports_in_a_circle() -> None:
    graph = {
        name: {
            other
            for other in imports(name, path, for_types=False)
            # A package is imported by everything in it, before that.
            if other in MODULES and not f"{name}.".startswith(f"{other}.")
        }
        for name, path in MODULES.items()
    }
    assert circles(graph) == []


def test_a_circle_and_an_import_upwards_would_be_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert level("policy.format.load") < level("io_backends.plan.copies") < level("io_backends.device.base")
    assert level("io_backends.hybrid") < level("io_backends.sglang.scheduler.fences") < level("bench.cli")


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
