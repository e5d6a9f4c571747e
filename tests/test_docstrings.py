"""Docstrings of what is public in ``io_backends`` and ``policy``: each is there, and names what is raised.

The form of docstrings is ruff's to check (``make lint``). A method that implements another class's, by name,
may leave its description to that one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from repository import ROOT

FOLDERS = ("io_backends", "policy")
Function = ast.FunctionDef | ast.AsyncFunctionDef

NOT_CAUGHT = {"AssertionError", "Exit"}
"""For what cannot be, and typer's for an exit status, which a command's module says: nobody catches them."""


@dataclass(frozen=True)
class Public:
    """A function or method whose name and classes begin with no underscore.

    Attributes:
        where: file and line, for the report.
        owner: the class's name, or none.
        node: its syntax.
    """

    where: str
    owner: str
    node: Function

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""


def in_tree(tree: ast.AST, path: str, owner: str = "") -> Iterator[Public]:
    """Those of a module or class, without what stands inside of functions."""
    for node in ast.iter_child_nodes(tree):
        name = getattr(node, "name", "_")
        if isinstance(node, ast.ClassDef) and not name.startswith("_"):
            yield from in_tree(node, path, name)
        elif isinstance(node, Function) and (not name.startswith("_") or name in ("__init__", "__call__")):
            yield Public(f"{path}:{node.lineno} {owner}{'.' if owner else ''}{name}", owner, node)
        elif isinstance(node, ast.If | ast.Try):
            yield from in_tree(node, path, owner)


def sources() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
        for folder in FOLDERS
        for path in sorted(ROOT.joinpath(folder).rglob("*.py"))
    }


def raised(function: Function) -> set[str]:
    """Names of exceptions that its own body makes and raises, and does not catch itself."""

    def walk(nodes: list[ast.AST], caught: frozenset[str]) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, Function | ast.Lambda | ast.ClassDef):
                continue
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func).rpartition(".")[2]
                # A function that makes the exception is named like one, and says itself what it makes.
                if name[:1].isupper() and name not in caught:
                    yield name
            elif isinstance(node, ast.Try):
                types = {
                    each.id
                    for handler in node.handlers
                    for each in ast.walk(handler.type or ast.Name("BaseException"))
                    if isinstance(each, ast.Name)
                }
                yield from walk([*node.body], caught | types)
                yield from walk([*node.handlers, *node.orelse, *node.finalbody], caught)
            else:
                yield from walk(list(ast.iter_child_nodes(node)), caught)

    return set(walk([*function.body], frozenset()))


def described(function: Public, interfaces: dict[str, list[str]], owners: dict[str, str]) -> str:
    """Its own docstring, or those of the methods that it implements; of ``__init__`` also its class's."""
    if function.node.name == "__init__":
        return function.doc + owners.get(function.owner, "")
    return function.doc or "\n".join(interfaces.get(function.node.name, []) if function.owner else [])


def gaps(trees: dict[str, ast.Module]) -> tuple[list[str], list[str]]:
    """Public functions that nothing describes; those that raise what is not named."""
    found = [each for path, tree in trees.items() for each in in_tree(tree, path)]
    interfaces: dict[str, list[str]] = {}
    for each in found:
        if each.owner and each.doc:
            interfaces.setdefault(each.node.name, []).append(each.doc)
    owners = {
        node.name: ast.get_docstring(node) or ""
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    undescribed, unnamed = [], []
    for each in found:
        text = described(each, interfaces, owners)
        if not text and not each.node.name.startswith("__") and not _is_setter(each.node):
            undescribed.append(each.where)
        missing = {name for name in raised(each.node) - NOT_CAUGHT if name not in text}
        if missing:
            unnamed.append(f"{each.where} raises {', '.join(sorted(missing))}")
    return undescribed, unnamed


def _is_setter(function: Function) -> bool:
    return any(isinstance(each, ast.Attribute) and each.attr == "setter" for each in function.decorator_list)


UNDESCRIBED, UNNAMED = gaps(sources())


def test_what_is_public_is_described() -> None:
    assert UNDESCRIBED == []


def test_what_is_raised_is_named() -> None:
    assert UNNAMED == []


@pytest.mark.parametrize(
    ("text", "undescribed", "unnamed"),
    [
        ("def f(): pass", ["f"], []),
        ("def _f(): raise ValueError('no')", [], []),
        ("def f():\n  'Does it.'\n  raise ValueError('no')", [], ["ValueError"]),
        ("def f():\n  'Raises ValueError.'\n  if 1:\n    raise ValueError('no')", [], []),
        ("def f():\n  'Does it.'\n  try:\n    raise KeyError('no')\n  except KeyError:\n    pass", [], []),
        (
            "def f():\n  'Does it.'\n  try:\n    g()\n  except KeyError:\n    raise OSError('no')",
            [],
            ["OSError"],
        ),
        ("class A:\n  'One.'\n  def f(self): pass", ["A.f"], []),
        ("class A:\n  'One.'\n  def f(self): pass\nclass B:\n  'Two.'\n  def f(self): 'Does it.'", [], []),
        ("class A:\n  'One.'\n  def __init__(self): raise TypeError('no')", [], ["TypeError"]),
        ("class A:\n  'Raises TypeError.'\n  def __init__(self): raise TypeError('no')", [], []),
        ("def f():\n  'Does it.'\n  def g(): raise ValueError('no')\n  return g", [], []),
    ],
)
def test_the_check_finds_what_is_missing(text: str, undescribed: list[str], unnamed: list[str]) -> None:
    found = gaps({"a.py": ast.parse(text)})
    assert [each.split()[1] for each in found[0]] == undescribed
    assert [each.split(" raises ")[1] for each in found[1]] == unnamed
