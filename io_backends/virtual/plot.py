"""A picture of timelines: streams as rows, what overlaps, what waits and for whom. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .timeline import NOTE, Category, Slice, Timeline

_COLOURS: dict[Category, str] = {
    "forward": "#4878a8",
    "sm_d2h": "#e07b39",
    "copy_d2h": "#5a9e6f",
    "copy_h2d": "#8c6bb1",
    "host": "#9a9a9a",
    "wait": "#8a8a8a",
}

_STALL = "#c0392b"
"""A forward that waits: what the picture is for."""

_MEANING: dict[Category, str] = {
    "forward": "forward",
    "sm_d2h": "write-back on the SMs",
    "copy_d2h": "copy engine, to the host",
    "copy_h2d": "copy engine, from the host",
    "host": "host thread busy",
    "wait": "waits (and for what)",
}

_ROW_INCHES = 0.42
_BAR = 0.78
"""Height of a bar, of its row's 1."""

_CHARACTER = 0.0048
"""Width of a character of a label, as a fraction of the time axis at the figure's width."""

_VISIBLE = 0.0015
"""Shortest bar that is drawn, as a fraction of the time axis."""


def plot(path: str | Path, runs: Mapping[str, Timeline], *, title: str = "One step of each backend") -> None:
    """Draw timelines under each other on one time axis.

    Args:
        path: where to; its suffix (``.png``, ``.svg``, ``.pdf``) says what kind of picture.
        runs: by name.
        title: above the picture.

    Raises:
        ImportError: matplotlib is not installed; the extra ``plot`` brings it.
        ValueError: there is nothing to draw, or matplotlib does not know the suffix.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not any(timeline.slices for timeline in runs.values()):
        raise ValueError("nothing happened in these runs: there is nothing to draw")
    rows = {name: _busy_tracks(timeline) for name, timeline in runs.items()}
    span = max((slice.end for timeline in runs.values() for slice in timeline.slices), default=0.0)
    heights = [len(tracks) + 0.4 for tracks in rows.values()]
    figure = Figure(figsize=(13, _ROW_INCHES * sum(heights) + 0.45 * len(runs) + 1.5), layout="constrained")
    axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    seen: set[Category] = set()
    for axis, (name, timeline) in zip(axes, runs.items(), strict=True):
        _draw(axis, name, timeline, rows[name], span)
        seen |= {slice.category for slice in timeline.slices}
    axes[-1].set_xlabel("milliseconds of model time")
    axes[-1].set_xlim(0, span * 1.005)
    figure.suptitle(f"{title}: {NOTE}", fontsize=13, fontweight="bold")
    patches = [
        Patch(label=_MEANING[category], **_style(category, stall=False))
        for category in _COLOURS
        if category in seen
    ]
    if any(map(_stalls, runs.values())):
        patches.append(Patch(label="a forward waits for write-back", **_style("wait", stall=True)))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130, metadata=None)


def _busy_tracks(timeline: Timeline) -> list[str]:
    """Rows that do something or make somebody wait; a stream that only waits for others' ends says nothing
    new.
    """
    working = {slice.track for slice in timeline.slices if slice.category != "wait"}
    return [track for track in timeline.tracks if track in working]


def _stalls(timeline: Timeline) -> set[Slice]:
    """Waits of a stream with forwards for a stream that writes back."""
    forwards = {slice.track for slice in timeline.slices if slice.category == "forward"}
    write_back = {slice.track for slice in timeline.slices if slice.category in ("sm_d2h", "copy_d2h")}
    return {
        slice
        for slice in timeline.slices
        if slice.category == "wait"
        and slice.track in forwards
        and slice.source is not None
        and slice.source[0] in write_back - forwards
    }


def _draw(axis: Any, name: str, timeline: Timeline, tracks: list[str], span: float) -> None:
    stalls = _stalls(timeline)
    for slice in sorted(timeline.slices, key=lambda slice: slice.category == "wait"):
        if slice.track not in tracks or slice.end - slice.start <= 0:
            continue
        row = tracks.index(slice.track)
        width = max(slice.end - slice.start, _VISIBLE * span)
        style = _style(slice.category, stall=slice in stalls)
        axis.barh(row, width, left=slice.start, height=_BAR, linewidth=0.6, **style)
        _label(axis, slice, row, span, stall=slice in stalls)
    axis.set_yticks(range(len(tracks)), tracks, fontsize=9)
    axis.set_ylim(len(tracks) - 0.5, -0.6)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
    waited = sum(slice.end - slice.start for slice in stalls)
    said = f"forwards wait {waited:.2f} ms for write-back" if waited else "no forward waits for write-back"
    axis.set_title(f"{name}: {said}", loc="left", fontsize=10.5, fontweight="bold")


def _label(axis: Any, slice: Slice, row: int, span: float, *, stall: bool) -> None:
    room = int((slice.end - slice.start) / span / _CHARACTER)
    middle = (slice.start + slice.end) / 2
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8} if slice.category == "wait" else None
    colour = _STALL if stall else "#444444" if slice.category == "wait" else "white"
    short = slice.name.split(" on ")[0]  # without the stream that it waits for
    fits = [text for text in (slice.name, short) if len(text) <= room]
    if fits:
        axis.text(middle, row, fits[0], ha="center", va="center", fontsize=7.5, color=colour, bbox=box)
    elif stall:
        axis.annotate(
            f"{short}, {slice.end - slice.start:.2f} ms",
            (middle, row + _BAR / 2),
            xytext=(14, -10),
            textcoords="offset points",
            fontsize=7.5,
            color=colour,
            va="center",
            bbox=box,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8},
        )


def _style(category: Category, *, stall: bool) -> dict[str, Any]:
    if category == "wait":
        return {"facecolor": "white", "edgecolor": _STALL if stall else _COLOURS["wait"], "hatch": "////"}
    return {"facecolor": _COLOURS[category], "edgecolor": "white"}
