"""Distributions of a result: seconds to the first token, and between tokens, for each arm."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from ..measure.plots import FORMATS, canvas, legend, log_ticks, style
from .account import SHARES, ArmRound, Distribution
from .result import CellResult, ServeResult
from .tables import about

_SHOWN = (("first_token_s", "ms to the first token"), ("between_tokens_s", "ms between tokens"))

_NOT_OF_NAMES = re.compile(r"[^\w.,+=@-]+")
_LONGEST_NAME = 120

_EVERY = 12
"""Shares from one marker on a line to the next."""


def figures(result: ServeResult) -> dict[str, Any]:
    """matplotlib figures by a name that a file may have, one for each cell and workload: a line for each arm
    and round.
    """
    found: dict[str, Any] = {}
    for cell in result.cells:
        for workload in dict.fromkeys(turn.workload for turn in cell.turns):
            turns = [turn for turn in cell.turns if turn.workload == workload and not turn.cut]
            if any(turn.first_token_s.count for turn in turns):
                found[file_name(f"{cell.name}-{workload}", found)] = _figure(result, cell, workload, turns)
    return found


def file_name(text: str, taken: Container[str] = ()) -> str:
    """``text`` as the name of a file in a folder, and none of ``taken``: names of cells may be anybody's."""
    name = _NOT_OF_NAMES.sub("_", text).lstrip(".")[:_LONGEST_NAME]
    others = (f"{name}-{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain((name,), others) if each not in taken)


def save(result: ServeResult, folder: Path) -> list[Path]:
    """Each figure as PNG and SVG in ``folder``; returns their paths."""
    paths = []
    for name, figure in figures(result).items():
        for kind in FORMATS:
            path = folder / f"{name}.{kind}"
            figure.savefig(path)
            paths.append(path)
    return paths


def _figure(result: ServeResult, cell: CellResult, workload: str, turns: Sequence[ArmRound]) -> Any:
    shown = [each for each in _SHOWN if any(_of(turn, each[0]).count for turn in turns)]
    title = f"{about(cell)}: {workload}; one line a round"
    figure, axes = canvas(result, title, 1, len(shown), (5.2 * len(shown) + 1.2, 4.4))
    for axis, (name, label) in zip(axes.flat, shown, strict=True):
        for turn in turns:
            values = _of(turn, name)
            if values.count:
                first = turn.round == min(each.round for each in turns if each.arm == turn.arm)
                axis.plot(
                    [1e3 * value for value in values.at],
                    [1 - share / 100 for share in SHARES],
                    **{**style(turn.arm), "label": turn.arm if first else None},
                    markersize=4,
                    markevery=_EVERY,
                    linewidth=1,
                )
        # Shares from 1 to 0.001: a tail of one in a hundred is as visible as the median.
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="share of them that took longer")
        axis.set_ylim(8e-4, 1.1)
        log_ticks(axis)
        axis.grid(alpha=0.25)
    legend(figure, list(axes.flat))
    return figure


def _of(turn: ArmRound, name: str) -> Distribution:
    found: Distribution = getattr(turn, name)
    return found
