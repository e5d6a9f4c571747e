"""Who imports whom in this project's three folders: read off the sources, nothing is imported.

    python tests/support/import_graph.py [FOLDER]

prints, of a checkout (this one without FOLDER), how many files, lines and floors there are, which modules
import each other in a circle, and which imports go upwards.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
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


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the three folders, by its dotted name below ``sglang_hicache``."""
    found = {}
    for path in (each for package in PACKAGES for each in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: Mapping[str, Path], *, for_types: bool = True) -> Iterator[str]:
    """What ``module`` imports, at the top and in functions: modules of ours by their name in ``known``,
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
            for alias in node.names:
                ours = alias.name.removeprefix("sglang_hicache.")
                yield ours if ours in known else alias.name.partition(".")[0]
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
                found = inner if inner in known else origin
                yield found if found in known else found.partition(".")[0]


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


def graph_of(known: Mapping[str, Path], *, for_types: bool = False) -> dict[str, set[str]]:
    """Modules by who imports them; but for packages, which everything in them imports before that."""
    return {
        name: {
            other
            for other in imports(name, path, known, for_types=for_types)
            if other in known and not f"{name}.".startswith(f"{other}.")
        }
        for name, path in known.items()
    }


def floors(graph: Mapping[str, set[str]], folder: str) -> int:
    """How many modules of a folder stand on each other at most; a circle counts as one."""
    inside = {name: each for name, each in graph.items() if name.startswith(f"{folder}.")}
    together = {name: min(group) for group in circles(inside) for name in group}
    on: dict[str, set[str]] = {}
    for name, others in inside.items():
        here = together.get(name, name)
        there = {together.get(other, other) for other in others if other in inside}
        on.setdefault(here, set()).update(there - {here})

    @functools.cache
    def height(name: str) -> int:
        return 1 + max(map(height, on[name]), default=0)

    return max(map(height, on), default=0)


def upwards(known: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Imports of a module whose level is above the importer's."""
    return [
        (name, other)
        for name, path in known.items()
        for other in sorted(set(imports(name, path, known)))
        if other in known and level(other) > level(name)
    ]


def main() -> None:
    """See the module."""
    known = modules(Path(sys.argv[1]) if sys.argv[1:] else ROOT)
    graph = graph_of(known)
    for folder in PACKAGES:
        paths = [path for name, path in known.items() if f"{name}.".startswith(f"{folder}.")]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        print(f"{folder}: {len(paths)} files, {lines:,} lines, {floors(graph, folder)} floors")
    for group in circles(graph):
        print(f"circle: {', '.join(group)}")
    found = upwards(known)
    print(f"{len(circles(graph))} circles, {len(found)} imports upwards")


if __name__ == "__main__":
    main()
