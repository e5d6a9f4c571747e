"""YAML text to plain Python values, and back from a path among them to its line and column."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarbool import ScalarBoolean

from sglang_hicache.policy.errors import PolicyError
from sglang_hicache.policy.fields import Step


def parse(text: str, filename: str) -> Any:
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


class Plain:
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
        line, column = place(self._tree, path, key=key)
        return PolicyError(self._filename, message, line=line, column=column)


def place(tree: Any, path: tuple[Step, ...], *, key: bool = False) -> tuple[int, int]:
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
