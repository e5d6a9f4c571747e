"""Tables and lists that fit 80 columns: no word is broken while it fits a line, and rows stay apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.box import HORIZONTALS, SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

TableCell = str | Text

_PADDING = 2
_WORD = re.compile(r"^\s*\S+|\S+")
_CLEAR_WITHOUT_LINES = 3


def pairs(rows: Iterable[tuple[str, TableCell]]) -> Table:
    """Names, and beside each what is said of it."""
    grid = Table.grid(padding=(0, _PADDING))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def table(
    out: Console, titles: Sequence[str], rows: Iterable[Sequence[TableCell]], *, right: Sequence[str] = ()
) -> RenderableType:
    """A table, with lines between its rows where they would run together, or a list where a word would be
    broken.

    Args:
        out: what it will be printed on.
        titles: of the columns; the first holds names, which are looked for whole.
        rows: a cell for each title.
        right: titles of columns of numbers.
    """
    rows = [list(row) for row in rows]
    columns = [[title, *(_plain(row[at]) for row in rows)] for at, title in enumerate(titles)]
    least = [max(map(_longest_word, cells)) for cells in columns]
    least[0] = max(map(_longest_line, columns[0]))
    between = (_PADDING + 1) * (len(titles) - 1)
    if rows and sum(least) + between > out.width:
        return _stacked(titles, rows)
    wanted = [max(map(_longest_line, cells)) for cells in columns]
    widths = _shared(least, wanted, out.width - between)
    wraps = widths != wanted or any("\n" in each for cells in columns for each in cells[1:])
    # With a name and what is said of it, the name shows where a row begins.
    lines = wraps and len(titles) > _CLEAR_WITHOUT_LINES
    shown = Table(
        box=HORIZONTALS if lines else SIMPLE_HEAD,
        show_lines=lines,
        show_edge=False,
        padding=(0, _PADDING, 0, 0),
        pad_edge=False,
        header_style="dim",
    )
    for title, width in zip(titles, widths, strict=True):
        # What rich would take from a column that is too wide by itself, it takes from the last one.
        shown.add_column(title, overflow="fold", width=width, justify="right" if title in right else "left")
    for row in rows:
        shown.add_row(*row)
    return shown


def _shared(least: Sequence[int], wanted: Sequence[int], room: int) -> list[int]:
    """Widths of columns: at least `least`, at most `wanted`; the widest wish is met first, until `room` is
    full.
    """
    widths = list(least)
    for _ in range(room - sum(least)):
        at = max(range(len(widths)), key=lambda each: wanted[each] - widths[each])
        if widths[at] >= wanted[at]:
            break
        widths[at] += 1
    return widths


def _stacked(titles: Sequence[str], rows: Iterable[Sequence[TableCell]]) -> Group:
    """Each row as a list of its own."""
    parts: list[RenderableType] = []
    for first, *cells in rows:
        if parts:
            parts.append("")
        parts.append(first if isinstance(first, Text) else Text(first, style="bold"))
        parts.append(
            pairs(
                (f"  {name.replace(chr(10), ' ')}", cell)
                for name, cell in zip(titles[1:], cells, strict=True)
            )
        )
    return Group(*parts)


def _plain(cell: TableCell) -> str:
    return cell.plain if isinstance(cell, Text) else cell


def _longest_word(text: str) -> int:
    # A line's indent stays with its first word.
    return max((cell_len(word) for line in text.splitlines() for word in _WORD.findall(line)), default=0)


def _longest_line(text: str) -> int:
    return max((cell_len(line) for line in text.splitlines()), default=0)
