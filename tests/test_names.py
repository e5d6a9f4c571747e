"""One meaning for each name: no two modules of the package define a public class, or a type, of one name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("policy", "io_backends", "bench")

#: Names that more than one module may define, which modules, and why.
SAME = {
    # What stands in for torch.cuda is called what torch calls it; the seam's are whatever a device's are.
    "Event": {"io_backends/device/base.py", "io_backends/virtual/gpu.py"},
    "Stream": {"io_backends/device/base.py", "io_backends/virtual/gpu.py"},
}


def types(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Classes and type aliases that a module defines at its top, also under a condition."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for name in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(name, ast.Name) and name.id[0].isupper() and not name.id.isupper():
                    yield name.id
        elif isinstance(node, ast.If | ast.Try):
            yield from types(node.body)
            yield from types(node.orelse)
            if isinstance(node, ast.Try):
                yield from types([inner for handler in node.handlers for inner in handler.body])


def defined() -> dict[str, set[str]]:
    """Modules by the public type that they define."""
    found = defaultdict(set)
    for path in (each for package in PACKAGES for each in (ROOT / package).rglob("*.py")):
        for name in types(ast.parse(path.read_text(encoding="utf-8")).body):
            if not name.startswith("_"):
                found[name].add(path.relative_to(ROOT).as_posix())
    return found


def test_no_two_modules_define_a_type_of_one_name() -> None:
    shared = {name: modules for name, modules in defined().items() if len(modules) > 1}
    assert shared == SAME


def test_types_are_found_wherever_they_are_defined() -> None:
    source = """
from typing import Any, Literal
if Any:
    class Kind: ...
else:
    Kinds = list
try:
    import enum
except ImportError:
    class Fallback: ...
Clock = tuple[int, ...]
Mode: Any = Literal["read"]
LIMIT = 3
class Outer:
    class Inner: ...
def make():
    class Local: ...
"""
    assert list(types(ast.parse(source).body)) == ["Kind", "Kinds", "Fallback", "Clock", "Mode", "Outer"]
