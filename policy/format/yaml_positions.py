"""YAML text to plain Python values, and back from a path among them to its line and column."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarbool import ScalarBoolean

from ..names import shown
from ..text import code_point, unsafe_character
from .errors import PolicyError
from .validators import PathStep

# Far beyond any policy (the deepest place of the format, an option, is in five), and where ruamel.yaml is
# still quick: its scanner's time grows with the square of the depth.
MOST_LEVELS = 32
# Values of a file with its aliases written out: a third party's options may hold aliases of aliases, and what
# prints a policy writes them all.
MOST_VALUES = 100_000
_LARGEST_NUMBER = 2**63 - 1


class _NoPolicyError(ComposerError):
    """YAML that a policy has no use for."""


class _PolicyComposer(Composer):
    """Composes no tree that is deep, and no mapping with a key that is more than a word: ruamel cannot
    construct all of these.
    """

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self.warn_double_anchors = False  # YAML allows it, and the warning has many lines
        self._levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.parser.peek_event().start_mark
        if self._levels >= MOST_LEVELS:
            raise _NoPolicyError(
                None, None, f"is nested more than {MOST_LEVELS} levels deep, too deeply for a policy", mark
            )
        self._levels += 1
        node = super().compose_node(parent, index)
        self._levels -= 1
        if isinstance(parent, MappingNode) and index is None and not isinstance(node, ScalarNode):
            kind = "mapping" if isinstance(node, MappingNode) else "list"
            raise _NoPolicyError(None, None, f"a {kind} is no key of a policy; a key is a word", mark)
        return node


def parse(text: str, filename: str) -> Any:
    """The tree of ruamel.yaml for `text`, whose mappings and lists know where each entry stands.

    Raises:
        PolicyError: it is not YAML, has a key twice, or uses what a policy may not; `filename` is in it.
    """
    yaml = YAML()
    yaml.Composer = _PolicyComposer
    try:
        return yaml.load(text)
    except DuplicateKeyError as error:
        # ruamel's own text quotes both values, over several lines when they are mappings.
        mark = error.problem_mark
        key = text.splitlines()[mark.line][mark.column :].split(":")[0].strip("\"' ")
        raise _at(mark, filename, f"the key '{key}' is there twice") from None
    except _NoPolicyError as error:
        raise _at(error.problem_mark, filename, str(error.problem)) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _at(mark, filename, f"not YAML: {' '.join(str(error.problem).split())}") from None
    except ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        what = f"not YAML: the character {chr(error.character)!r} is not allowed"
        raise PolicyError(filename, what, line=line, column=column) from None
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
        # With how many values each stands for when its aliases are written out.
        self._done: dict[int, tuple[Any, int] | None] = {}

    def convert(self, node: Any, path: tuple[PathStep, ...]) -> Any:
        """`node`, which is at `path`, in plain values. Raises PolicyError for what no policy may hold."""
        return self._converted(node, path)[0]

    def _converted(self, node: Any, path: tuple[PathStep, ...]) -> tuple[Any, int]:
        if isinstance(node, (dict, list)):
            if id(node) in self._done:
                done = self._done[id(node)]
                if done is None:
                    raise self._error("an alias stands for something that contains it", path)
                return done
            self._done[id(node)] = None
            self._done[id(node)] = found = self._container(node, path)
            if found[1] > MOST_VALUES:
                raise self._error(f"its aliases stand for more than {MOST_VALUES:,} values", path)
            return found
        return self._scalar(node, path), 1

    def _scalar(self, node: Any, path: tuple[PathStep, ...]) -> Any:
        if node is None or isinstance(node, bool):
            return node
        if isinstance(node, ScalarBoolean):  # an anchored true or false: an int to Python
            return bool(node)
        if isinstance(node, str):
            self._check_text(node, path)
            return str(node)
        if isinstance(node, int):
            if abs(node) > _LARGEST_NUMBER:  # Python itself refuses to print some of them
                raise self._error("a number that is too large for anything in a policy", path)
            return int(node)
        if isinstance(node, float):
            return float(node)
        raise self._error("only texts, numbers, true and false can stand here", path)

    def _container(self, node: Any, path: tuple[PathStep, ...]) -> tuple[Any, int]:
        if isinstance(node, list):
            entries = [self._converted(entry, (*path, index)) for index, entry in enumerate(node)]
            return [plain for plain, _ in entries], 1 + sum(size for _, size in entries)
        for key in node:
            if not isinstance(key, str):
                large = isinstance(key, int) and abs(key) > _LARGEST_NUMBER
                what = "a number" if large else shown(key)
                raise self._error(f"the key {what} is not a word", (*path, key), key=True)
            self._check_text(key, (*path, key), key=True)
        found = {str(key): self._converted(entry, (*path, key)) for key, entry in node.items()}
        return {key: plain for key, (plain, _) in found.items()}, 1 + sum(size for _, size in found.values())

    def _check_text(self, text: str, path: tuple[PathStep, ...], *, key: bool = False) -> None:
        """Names and reasons of a policy are printed, and logged by servers."""
        found = unsafe_character(text, allowed="" if key else "\n\t")
        if found is not None:
            what = (
                f"the character {code_point(found)} cannot stand in a policy: a terminal obeys it or hides it"
            )
            raise self._error(what, path, key=key)

    def _error(self, message: str, path: tuple[PathStep, ...], *, key: bool = False) -> PolicyError:
        line, column = place(self._tree, path, key=key)
        return PolicyError(self._filename, message, line=line, column=column)


def place(tree: Any, path: tuple[PathStep, ...], *, key: bool = False) -> tuple[int, int]:
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
