"""What saved results have in common: files replaced as a whole, and where their figures come from."""

from __future__ import annotations

import csv
import io
import json
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..policy.text import LINES, escaped

_Saved = TypeVar("_Saved")


def write_whole(path: Path, text: str) -> Path:
    """Replace the file as a whole: who is killed in the middle leaves the earlier one. Returns ``path``.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    if path.exists():
        part.chmod(stat.S_IMODE(path.stat().st_mode))
    return part.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> Path:
    """:func:`write_whole` of plain JSON types."""
    return write_whole(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, from_dict: Callable[[Any], _Saved], what: str) -> _Saved:
    """What ``from_dict`` makes of a file.

    Args:
        path: of the file.
        from_dict: raises ValueError, TypeError, KeyError or AttributeError for what is something else.
        what: should be in it, for the message.

    Raises:
        ValueError: the file is not there, or holds something else; the message says which.
    """
    try:
        return from_dict(_printable(json.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not {what} ({error})") from error


def _printable(value: Any) -> Any:
    """Plain JSON types without what a terminal obeys and XML forbids: names in a file may be anybody's."""
    if isinstance(value, str):
        return escaped(value, allowed=LINES)
    if isinstance(value, list):
        return [_printable(each) for each in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(each) for name, each in value.items()}
    return value


def one_line(value: object) -> str:
    """A saved value where it must not begin a line of its own."""
    return " ".join(str(value).split())


def csv_text(
    columns: Sequence[str],
    lines: Iterable[Mapping[str, Any]],
    environment: Mapping[str, Any],
    watermark: str | None,
    notes: Mapping[str, str],
) -> str:
    """CSV below lines with ``#``: watermark, environment (of each value the first line), and notes."""
    out = io.StringIO()
    if watermark:
        out.write(f"# {watermark}\n")
    for name, value in environment.items():
        out.write(f"# {name}: {str(value).splitlines()[0] if str(value) else ''}\n")
    for name, note in notes.items():
        out.write(f"# {name}: {note}\n")
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def check_one_machine(environments: Sequence[Mapping[str, Any]], names: Iterable[str]) -> None:
    """Raise unless all runs were made on one machine.

    Args:
        environments: see :func:`~.measure.environment.describe_environment`; of at least one run.
        names: values in them that must be the same.

    Raises:
        ValueError: one differs.
    """
    for name in names:
        first, *others = (each.get(name) for each in environments)
        for other in others:
            if other != first:
                raise ValueError(f"runs of different machines cannot be one: {name} is {first} and {other}")
