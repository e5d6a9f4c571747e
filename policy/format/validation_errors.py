"""pydantic's errors in the words of a policy's author."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from ..names import nearest
from .errors import PolicyError
from .schema import Default, PolicyFile, Rule, Use, When
from .validators import PROBLEM, PathStep
from .yaml_positions import place


def first_problem(error: ValidationError, tree: Any, filename: str) -> PolicyError:
    """The first problem in the order of the file, worded for the user."""
    found = error.errors(include_url=False, include_input=False)
    # A misspelled key is reported twice, as unknown and as missing: only the first helps.
    misspelled = {entry["loc"][:-1] for entry in found if entry["type"] == "extra_forbidden"}
    found = [entry for entry in found if entry["type"] != "missing" or entry["loc"][:-1] not in misspelled]
    # Another version may well have other keys, so nothing else counts then.
    found = [entry for entry in found if entry["loc"] == ("version",)] or found
    problems = []
    for entry in found:
        path, is_key, message, hint = _worded(entry)
        line, column = place(tree, path, key=is_key)
        problems.append(PolicyError(filename, message, line=line, column=column, hint=hint))
    return min(problems, key=lambda each: (each.line or 0, each.column or 0))


def _worded(entry: Any) -> tuple[tuple[PathStep, ...], bool, str, str | None]:
    """Path, whether the key is meant, message and hint of one of pydantic's errors."""
    path, kind = tuple(entry["loc"]), entry["type"]
    name = next((str(step) for step in reversed(path) if isinstance(step, str)), "the file")
    if kind == PROBLEM:
        context = entry["ctx"]
        return (*path, *context["at"]), context["key"], context["message"], context["hint"]
    if kind == "extra_forbidden":
        keys = list(_model_at(path[:-1]).model_fields)
        hint = nearest(str(path[-1]), keys)
        valid = "" if hint else f"; valid: {', '.join(keys)}"
        return path, True, f"unknown key '{path[-1]}'{_inside(path)}{valid}", hint
    if kind == "missing":
        return path, False, f"'{path[-1]}' is missing{_inside(path)}", None
    if kind == "tuple_type":
        return path, False, f"{name} must be a list; [] is an empty one", None
    if kind == "model_type":
        what = "a rule" if isinstance(path[-1], int) else name
        return (
            path,
            False,
            f"{what} must be a mapping; {{}} is an empty one"
            if name == "when"
            else f"{what} must be a mapping",
            None,
        )
    return path, False, f"{name} has a value that cannot be used", None


def _inside(path: tuple[PathStep, ...]) -> str:
    match path[:-1]:
        case ():
            return ""
        case ("rules", _):
            return " in this rule"
        case parents:
            return f" in {parents[-1]}"


def _model_at(path: tuple[PathStep, ...]) -> type[BaseModel]:
    """The model that describes the mapping at `path`."""
    match path:
        case ():
            return PolicyFile
        case ("default",):
            return Default
        case (*_, "use"):
            return Use
        case (*_, "when"):
            return When
        case _:
            return Rule
