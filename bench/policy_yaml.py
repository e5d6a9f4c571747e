"""Policies as YAML in lines of 80 columns, for people to read and change."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import FoldedScalarString

from ..policy.text import wrapped

COLUMNS = 80
_NEVER = 1 << 20


def as_yaml(policy: Mapping[str, Any]) -> str:
    """A policy, of plain types. What is one word, or has lines or characters of its own, may be longer."""
    yaml = YAML()
    # ruamel ends a line with the first word past its width.
    yaml.width = _NEVER
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump(_mapping(policy, 0), out)
    return out.getvalue()


def _mapping(value: Mapping[str, Any], column: int) -> CommentedMap:
    return CommentedMap(
        {key: _laid_out(each, column + 2, COLUMNS - column - len(f"{key}: ")) for key, each in value.items()}
    )


def _laid_out(value: Any, column: int, room: int) -> Any:
    """As ruamel writes it in lines that are short.

    Args:
        value: of a mapping or a list.
        column: where its parts begin if they have lines of their own.
        room: what is left of the line that it may be on.
    """
    if isinstance(value, Mapping):
        return _mapping(value, column)
    if isinstance(value, list):
        if any(isinstance(each, Mapping) for each in value):
            return [_laid_out(each, column + 2, 0) for each in value]
        row = CommentedSeq(value)
        if sum(len(f"'{each}', ") for each in value) <= room:
            row.fa.set_flow_style()
        return row
    # Only such a text is the same when its lines are joined again.
    whole = isinstance(value, str) and value == " ".join(value.split()) and value.isprintable()
    return _folded(value, column) if whole and len(f"'{value}'") > room else value


def _folded(text: str, column: int) -> Any:
    folded: Any = FoldedScalarString(text)
    folded.fold_pos, at = [], -1
    for line in wrapped(text, COLUMNS - column)[:-1]:
        at += len(line) + 1
        folded.fold_pos.append(at)
    return folded
