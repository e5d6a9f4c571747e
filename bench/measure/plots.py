"""Pictures of a run: bandwidth by bytes an entry, stall by size of the write, slow-down of forwards."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from .cases import MODELS
from .results import Results, Row, Spread

FORMATS = ("png", "svg")

# Okabe and Ito's colours without their yellow, which white paper hides, and three of Paul Tol's: told apart
# without colour vision. The same contender has the same colour and marker everywhere.
_COLOURS = {
    "auto": "#000000",
    "hybrid": "#0072B2",
    "copy_engine": "#009E73",
    "fenced_kernel": "#D55E00",
    "memcpy_loop": "#777777",
    "sglang_staged": "#CC79A7",
    "sglang_kernel": "#E69F00",
    "sglang_kernel_tma": "#882255",
    "sglang_aot": "#56B4E9",
    "sglang_direct": "#332288",
    # Arms of whole servers.
    "none": "#777777",
    "kernel": "#E69F00",
    "direct": "#CC79A7",
    "null": "#56B4E9",
}
_MARKERS = {
    "auto": "X",
    "hybrid": "o",
    "copy_engine": "s",
    "fenced_kernel": "^",
    "memcpy_loop": "p",
    "sglang_staged": "v",
    "sglang_kernel": "D",
    "sglang_kernel_tma": "P",
    "sglang_aot": "<",
    "sglang_direct": ">",
    "none": "p",
    "kernel": "D",
    "direct": "v",
    "null": "<",
}


_ASIDE = 0.05
"""Decades between the points of two contenders at one size of entry."""


def why_not() -> str | None:
    """Why there can be no pictures, or None."""
    try:
        from matplotlib.figure import Figure

        Figure()
    except ImportError:
        return "matplotlib is not installed (pip install matplotlib)"
    except Exception as error:  # beside other versions of what it needs it imports, and fails later
        return f"matplotlib does not work here: {error}"
    return None


def figures(run: Results) -> dict[str, Any]:
    """matplotlib figures by name; none for what was not measured."""
    made: dict[str, Callable[[Results, Sequence[Row]], Any]] = {
        "bandwidth": _bandwidth,
        "fence": _fence,
        "interference": _interference,
        "sustained": _sustained,
    }
    found = {}
    for name, draw in made.items():
        rows = [row for row in run.of(name) if row.metrics]
        if rows:
            found[name] = draw(run, rows)
    return found


def save(run: Results, folder: Path) -> list[Path]:
    """Each figure as PNG and SVG in ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures(run).items():
        for kind in FORMATS:
            path = folder / f"{name}.{kind}"
            figure.savefig(path)
            paths.append(path)
    return paths


def png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


class Marked(Protocol):
    """What a picture is of."""

    environment: dict[str, Any]

    @property
    def watermark(self) -> str | None: ...


def canvas(run: Marked, title: str, rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure with its axes, what it was measured on in its title, and the watermark where there is one."""
    # Not pyplot: it keeps figures alive and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    what = run.environment.get("gpu") or run.environment.get("cpu")
    figure.suptitle(f"{title}\n{what}, {str(run.environment.get('date'))[:10]}", fontsize=10)
    if run.watermark:
        figure.text(
            0.5,
            0.45,
            "CPU, NOT GPU SPEED",
            ha="center",
            va="center",
            rotation=25,
            fontsize=34,
            color="red",
            alpha=0.25,
        )
        figure.text(0.5, 0.005, run.watermark, ha="center", va="bottom", fontsize=7, color="red")
        engine: Any = figure.get_layout_engine()
        engine.set(rect=(0, 0.03, 1, 0.97))
    return figure, axes


def colour(name: str) -> str:
    """The contender's colour."""
    return _COLOURS.get(name, "#117733")


def _with_bars(axis: Any, name: str, points: Sequence[tuple[float, Spread]], **more: Any) -> None:
    """Medians with least and greatest, joined by a line."""
    points = sorted(points, key=lambda point: point[0])
    mid = [each.median for _, each in points]
    below = [max(0.0, each.median - each.low) for _, each in points]
    above = [max(0.0, each.high - each.median) for _, each in points]
    look = {"capsize": 2, "linewidth": 1, "elinewidth": 0.8, "markersize": 5, **style(name), **more}
    axis.errorbar([x for x, _ in points], mid, yerr=[below, above], **look)


def _bandwidth(run: Results, rows: Sequence[Row]) -> Any:
    """A panel for each model and layout, with all page sizes of the most measured number of tokens."""
    sizes = [row.case.tokens for row in rows]
    tokens = max(set(sizes), key=lambda size: (sizes.count(size), size))
    rows = [row for row in rows if row.case.tokens == tokens and row.entry_bytes]
    panels = list(dict.fromkeys((row.case.model, row.case.layout) for row in rows))
    columns = max(1, min(3, len(panels)))
    lines = -(-len(panels) // columns) or 1
    figure, axes = canvas(
        run,
        f"Write-back of {tokens:,} tokens (hollow: contiguous slots; points of one size side by side)",
        lines,
        columns,
        (4.6 * columns + 0.6, 3.6 * lines + 1.0),
    )
    flat = list(axes.flat)
    for axis, (model, layout) in zip(flat, panels, strict=False):
        here = [row for row in rows if (row.case.model, row.case.layout) == (model, layout)]
        names = list(dict.fromkeys(row.contender for row in here))
        for index, name in enumerate(names):
            # Side by side: all copy the same entries, and the fast ones would lie on one another.
            aside = 10 ** (_ASIDE * (index - (len(names) - 1) / 2))
            for fragmented in (True, False):
                points = [
                    (float(row.entry_bytes or 0) * aside, row.metrics["gb_per_s"])
                    for row in here
                    if row.contender == name and row.case.fragmented == fragmented
                ]
                # Contiguous slots are one run whatever the page: their points are no line, and hollow.
                more = {} if fragmented else {"linestyle": "none", "markerfacecolor": "none"}
                if points:
                    _with_bars(axis, name, points, **more)
        link = run.ceilings.get("link")
        if link is not None:
            axis.axhline(link.median, color="#444444", linestyle="--", linewidth=0.8)
            axis.annotate(
                "link",
                (0.99, link.median),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=7,
            )
            axis.set_ylim(top=max(axis.get_ylim()[1], 1.12 * link.median))
        axis.set(xscale="log", title=f"{model}, {layout}", xlabel="bytes an entry (drain)", ylabel="GB/s")
        axis.set_ylim(bottom=0)
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.25)
    for axis in flat[len(panels) :]:
        axis.set_axis_off()
    legend(figure, flat[: len(panels)])
    return figure


def _fence(run: Results, rows: Sequence[Row]) -> Any:
    titles = {"stall_ms": "fence reached to released", "held_ms": "from before the submission to released"}
    shown = [metric for metric in titles if any(metric in row.metrics for row in rows)]
    figure, axes = canvas(
        run, "How long one forward waits for one write", 1, len(shown), (4.6 * len(shown) + 1.6, 4.6)
    )
    for axis, metric in zip(axes.flat, shown, strict=True):
        for name in dict.fromkeys(row.contender for row in rows):
            # Nothing waits for copy engines: 0 has no place on this axis.
            points = [
                (row.case.nbytes / 1e6, row.metrics[metric])
                for row in rows
                if row.contender == name
                and metric in row.metrics
                and row.metrics[metric].low > 0
                # A saved run may be of a newer version's model, whose bytes nobody here knows.
                and row.case.model in MODELS
            ]
            if points:
                _with_bars(axis, name, points)
        axis.set(xscale="log", yscale="log", xlabel="MB a write", ylabel="ms")
        axis.set_title(titles[metric], fontsize=9)
        axis.grid(alpha=0.25)
    legend(figure, list(axes.flat))
    return figure


def _interference(run: Results, rows: Sequence[Row]) -> Any:
    """A panel for each layout."""
    layouts = list(dict.fromkeys(row.case.layout for row in rows))
    forwards = list(dict.fromkeys(row.forward or "" for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows))
    figure, axes = canvas(
        run,
        "Forward beside write-back, by its time alone",
        len(layouts),
        1,
        (max(7.0, 2.2 + 1.3 * len(forwards)), 1.2 + 3.4 * len(layouts)),
    )
    step = 0.7 / len(names)
    for axis, layout in zip(axes.flat, layouts, strict=True):
        for index, name in enumerate(names):
            points = [
                (forwards.index(row.forward or ""), row.metrics["slow_down"])
                for row in rows
                if (row.contender, row.case.layout) == (name, layout)
            ]
            moved = [(n + (index - (len(names) - 1) / 2) * step, each) for n, each in points]
            if moved:
                _with_bars(axis, name, moved, linestyle="none")
        axis.axhline(1, color="#444444", linewidth=0.8)
        axis.set_xticks(range(len(forwards)), forwards, fontsize=7)
        # One that is 50 times as long must not hide what is 1.05.
        axis.set(yscale="log", ylabel="times as long")
        low, high = axis.get_ylim()
        ticks = [tick for tick in (0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= tick <= high]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(layout, fontsize=9)
        axis.grid(axis="y", alpha=0.25)
    legend(figure, list(axes.flat))
    return figure


def _sustained(run: Results, rows: Sequence[Row]) -> Any:
    """Bytes not enqueued over the loop: a panel for each case and pattern of forwards."""
    panels = list(dict.fromkeys((row.case, row.forward) for row in rows))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = canvas(
        run,
        "Rows not enqueued, forwards back to back",
        lines,
        columns,
        (3.8 * columns + 1.6, 3.0 * lines + 1),
    )
    flat = list(axes.flat)
    for axis, (case, forward) in zip(flat, panels, strict=False):
        for row in rows:
            if (row.case, row.forward) == (case, forward) and row.series:
                look = {**style(row.contender), "marker": "", "linewidth": 1}
                axis.plot([at / 1e3 for at, _ in row.series], [mb for _, mb in row.series], **look)
        axis.set(xlabel="s", ylabel="MB")
        axis.set_title(f"{case.model}, page {case.page_size}, {forward}", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    for axis in flat[len(panels) :]:
        axis.set_axis_off()
    legend(figure, flat[: len(panels)])
    return figure


def style(name: str) -> dict[str, Any]:
    """Colour, marker and label of a contender or an arm."""
    return {"color": colour(name), "marker": _MARKERS.get(name, "*"), "label": name}


def log_ticks(axis: Any) -> None:
    """Numbers at 1, 2 and 5 of each decade of a logarithmic x axis: where matplotlib labels every tick of a
    short one, they lie on one another."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_xlim()
    steps = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
    axis.xaxis.set_major_locator(LogLocator(subs=steps))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all axes, beside them: at half their height, where no title is."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize=7)
