"""A policy file to a checked `Policy`, or one clear error: ``FILE:LINE:COL: message (did you mean 'x'?)``.

ruamel.yaml's round-trip loader keeps the place of every key and value; pydantic checks the values; this
module joins the two and words the errors. Only the first problem of a file is reported: the next is often its
consequence.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarbool import ScalarBoolean

from sglang_hicache.policy.fields import PROBLEM, Step
from sglang_hicache.policy.schema import Default, Policy, PolicyFile, Rule, Use, When
from sglang_hicache.policy.vocabulary import nearest, with_hint

SHIPPED = "shipped default"
#: Names a policy file when ``--hicache-io-policy`` and ``hicache-io --policy`` do not.
POLICY_VARIABLE = "SGLANG_HICACHE_IO_POLICY"


class PolicyError(ValueError):
    """A policy file that cannot be used. ``line`` and ``column`` start at 1, and are None when the file
    itself is the trouble; ``hint`` is the nearest valid name or None. ``str()`` is the one line a user sees.
    """

    def __init__(
        self,
        filename: str,
        message: str,
        *,
        line: int | None = None,
        column: int | None = None,
        hint: str | None = None,
    ) -> None:
        place = filename if line is None else f"{filename}:{line}:{column}"
        super().__init__(f"{place}: {with_hint(message, hint)}")
        self.filename = filename
        self.line = line
        self.column = column
        self.message = message
        self.hint = hint

    def to_dict(self) -> dict[str, Any]:
        """The parts and the whole, as plain JSON types."""
        names = ("filename", "line", "column", "message", "hint")
        return {**{name: getattr(self, name) for name in names}, "text": str(self)}


def policy_in_force(path: str | os.PathLike[str] | None = None) -> Policy:
    """The policy of the file at `path`; without one, of the file that the variable SGLANG_HICACHE_IO_POLICY
    names; without either, the shipped default. Raises PolicyError.
    """
    if path is None:
        path = os.environ.get(POLICY_VARIABLE) or None  # set but empty counts as not set
    return default_policy() if path is None else load_policy(path)


def default_policy() -> Policy:
    """The policy that this package ships."""
    text = files("sglang_hicache.policy").joinpath("default.yaml").read_text(encoding="utf-8")
    return Policy(load_policy_text(text, "default.yaml").file, SHIPPED)


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy in the file at `path`. Raises PolicyError, also for a file that cannot be read."""
    name = os.fspath(path)
    if not name:  # an unset shell variable; as a path it would be the current directory
        raise PolicyError("policy file", "the name is empty")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PolicyError(name, "there is no such file") from None
    except IsADirectoryError:
        raise PolicyError(name, "is a directory, not a policy file") from None
    except UnicodeDecodeError as error:
        raise PolicyError(name, f"is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise PolicyError(name, f"cannot be read: {error.strerror}") from None
    return load_policy_text(text, name)


def load_policy_text(text: str, filename: str) -> Policy:
    """The policy written in `text`; `filename` is what errors call it. Raises PolicyError."""
    tree = _parse(text, filename)
    if tree is None:
        raise PolicyError(filename, "is empty; a policy has version, rules and default", line=1, column=1)
    if not isinstance(tree, dict):
        raise PolicyError(filename, "is not a mapping with version, rules and default", line=1, column=1)
    plain = _Plain(tree, filename).convert(tree, ())
    try:
        return Policy(PolicyFile.model_validate(plain), filename)
    except ValidationError as error:
        raise _first(error, tree, filename) from None


def _parse(text: str, filename: str) -> Any:
    """ruamel's tree for `text`, whose mappings and lists know where each entry stands."""
    try:
        return YAML().load(text)
    except DuplicateKeyError as error:
        # ruamel's own text quotes both values, over several lines when they are mappings.
        mark = error.problem_mark
        key = text.splitlines()[mark.line][mark.column :].split(":")[0].strip("\"' ")
        raise _at(mark, filename, f"the key '{key}' is there twice") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _at(mark, filename, f"not YAML: {' '.join(str(error.problem).split())}") from None
    except ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        what = f"not YAML: the character {chr(error.character)!r} is not allowed"
        raise PolicyError(filename, what, line=line, column=column) from None
    except RecursionError:
        raise PolicyError(filename, "is nested too deeply for a policy", line=1, column=1) from None
    except (YAMLError, ValueError) as error:  # ValueError: a date or number that is none, such as 2020-99-99
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise PolicyError(filename, f"not YAML that can be read: {what}", line=1, column=1) from None


def _at(mark: Any, filename: str, message: str) -> PolicyError:
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    return PolicyError(filename, message, line=line, column=column)


class _Plain:
    """ruamel's tree as plain Python values, which pydantic reads."""

    def __init__(self, tree: Any, filename: str) -> None:
        self._tree = tree
        self._filename = filename
        # By identity: an alias is converted once, so that a few lines of nested aliases stay a few objects.
        self._done: dict[int, Any] = {}

    def convert(self, node: Any, path: tuple[Step, ...]) -> Any:
        if isinstance(node, (dict, list)):
            if id(node) in self._done:
                done = self._done[id(node)]
                if done is None:
                    raise self._error("an alias stands for something that contains it", path)
                return done
            self._done[id(node)] = None
            self._done[id(node)] = plain = self._container(node, path)
            return plain
        if node is None or isinstance(node, bool):
            return node
        if isinstance(node, ScalarBoolean):  # an anchored true or false: an int to Python
            return bool(node)
        for kind in (int, float, str):
            if isinstance(node, kind):
                return kind(node)
        raise self._error("only texts, numbers, true and false can stand here", path)

    def _container(self, node: Any, path: tuple[Step, ...]) -> Any:
        if isinstance(node, list):
            return [self.convert(entry, (*path, index)) for index, entry in enumerate(node)]
        for key in node:
            if not isinstance(key, str):
                raise self._error(f"the key {key!r} is not a word", (*path, key), key=True)
        return {str(key): self.convert(entry, (*path, key)) for key, entry in node.items()}

    def _error(self, message: str, path: tuple[Step, ...], *, key: bool = False) -> PolicyError:
        line, column = _place(self._tree, path, key=key)
        return PolicyError(self._filename, message, line=line, column=column)


def _place(tree: Any, path: tuple[Step, ...], *, key: bool = False) -> tuple[int, int]:
    """Line and column, from 1, of the value at `path` (of its key with `key`); of what holds it if it is not
    there.
    """
    line, column = tree.lc.line, tree.lc.col
    node = tree
    for depth, step in enumerate(path):
        marks = getattr(getattr(node, "lc", None), "data", None) or {}
        if step not in marks:  # not written in the file (missing), or merged in by "<<"
            break
        mark, child = marks[step], node[step]
        at_key = child is None or (
            key and depth == len(path) - 1
        )  # ruamel places an empty value on the next line
        line, column = mark[:2] if at_key else mark[-2:]
        node = child
    return line + 1, column + 1


def _first(error: ValidationError, tree: Any, filename: str) -> PolicyError:
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
        line, column = _place(tree, path, key=is_key)
        problems.append(PolicyError(filename, message, line=line, column=column, hint=hint))
    return min(problems, key=lambda each: (each.line or 0, each.column or 0))


def _worded(entry: Any) -> tuple[tuple[Step, ...], bool, str, str | None]:
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


def _inside(path: tuple[Step, ...]) -> str:
    match path[:-1]:
        case ():
            return ""
        case ("rules", _):
            return " in this rule"
        case parents:
            return f" in {parents[-1]}"


def _model_at(path: tuple[Step, ...]) -> type[BaseModel]:
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
