"""Tables of a run: one line a case, one column a contender. As Markdown, HTML, or by rich on a terminal."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...io_backends.registry import AUTO
from ...policy import html
from .cases import Case
from .contenders import names as contender_names
from .results import METRICS, Results, Row
from .sglang_pools import DEFAULTS


@dataclass(frozen=True)
class Table:
    """Texts only; ``notes`` stand below it."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Shape:
    title: str
    cell: Callable[[Row], str]
    notes: tuple[str, ...]
    judged: bool = False
    headline: tuple[str, ...] = ()
    """Metrics for :func:`summary`."""


def _number(row: Row, metric: str, shape: str) -> str:
    return shape.format(row.metrics[metric].median) if metric in row.metrics else ""


def _bandwidth(row: Row) -> str:
    share = f" {row.metrics['link_share'].median:.0%}" if "link_share" in row.metrics else ""
    return f"{row.metrics['gb_per_s'].median:.1f}{share} ±{_spread(row, 'gb_per_s')}"


def _fence(row: Row) -> str:
    held = f" (held {row.metrics['held_ms'].median:.2f})" if "held_ms" in row.metrics else ""
    stall = row.metrics["stall_ms"].median if "stall_ms" in row.metrics else None
    return (f"{stall:.3f}" if stall is not None else "") + held


def _submit(row: Row) -> str:
    if "values_us" in row.metrics:
        return f"{row.metrics['values_us'].median:.0f} ±{_spread(row, 'values_us')}"
    text = f"{row.metrics['submit_us'].median:,.0f}"
    if "plan_us" in row.metrics:
        plan, device = row.metrics["plan_us"].median, row.metrics["device_us"].median
        text += f" ({plan:,.0f}+{device:,.0f})"
    later = row.metrics.get("later_us")
    if later is not None and later.median:
        text += f", later {later.median:,.0f}"
    model = row.metrics.get("model_us")
    if model is not None:
        measured = row.metrics["submit_us"].median + row.metrics["later_us"].median
        text += f", {row.copies:,} entries, model {model.median:,.0f}, {measured / model.median:.0%} Python"
    return text


def _interference(row: Row) -> str:
    return f"{row.metrics['slow_down'].median:.2f}x ±{_spread(row, 'slow_down')}"


def _latency(row: Row) -> str:
    return f"{row.metrics['ack_us'].median:,.0f} ±{_spread(row, 'ack_us')}"


def _sustained(row: Row) -> str:
    kept, asked = row.metrics["kept_gb_per_s"].median, row.metrics["asked_gb_per_s"].median
    done = f"{row.metrics['done_p50_ms'].median:.0f}/{row.metrics['done_p99_ms'].median:.0f}"
    after = "/".join(f"{row.metrics[f'after_forward_p{share}_ms'].median:.1f}" for share in (50, 99))
    return (
        f"{kept:.2f} of {asked:.2f}, {row.metrics['slow_down'].median:.3f}x, "
        f"fence {row.metrics['fence_ms'].median:.2f}/{row.metrics['fence_max_ms'].median:.1f}, "
        f"done {done}, {after}, waiting {row.metrics['waiting_mb'].median:,.0f}, "
        f"held {row.metrics['held_mb'].median:,.0f}"
    )


def _spread(row: Row, metric: str) -> str:
    """Half of greatest less least, as a share of the median."""
    each = row.metrics[metric]
    return f"{(each.high - each.low) / 2 / each.median:.0%}" if each.median else "0%"


_SHAPES = {
    "bandwidth": _Shape(
        "Bandwidth: GB/s, share of the link, half of the spread",
        _bandwidth,
        (
            "End to end on the device's clock, from before the submission on idle streams to completion; "
            "link: one large copy to the host in the same run.",
        ),
        judged=True,
    ),
    "fence": _Shape(
        "Fence: ms that a forward waits which must not share the SMs with one write",
        _fence,
        (
            "The longest wait of one forward, from the fence reached when the submission returned to the "
            "fence released; held: from before the submission to there. Nothing waits for copy engines.",
        ),
        headline=("stall_ms", "held_ms"),
    ),
    "interference": _Shape(
        "Interference: time of a forward beside write-back that never stops, by its time alone",
        _interference,
        (
            "No forward waits here: it is the price of sharing the GPU. half: thread blocks for half of the "
            "SMs; decode steps: the thread that submits the writes waits for the ids of each, a step behind.",
        ),
        headline=("slow_down",),
    ),
    "submit": _Shape(
        "Submit: us of the scheduler's thread for one write",
        _submit,
        (
            "In brackets: planning + device seam (driver, torch, Triton); later: for what was left to gaps "
            "between forwards. host_values: the wait for device indices that copy_engine needs, alone.",
        ),
        headline=("submit_us",),
    ),
    "latency": _Shape(
        "Latency: us from before the submission until the host sees one write complete",
        _latency,
        (),
        judged=True,
        headline=("ack_us",),
    ),
    "sustained": _Shape(
        "Sustained: forwards back to back, each of which leaves rows to write",
        _sustained,
        (
            "GB/s done of those asked for; time of the forwards by their time without write-back; ms that "
            "one waits for write-back, mean/longest; ms from submission to done and from the end of the "
            "forward in flight then to done, p50/p99 each; MB not enqueued and MB not done, most at any "
            "time. SGLang's own copies run without a fence for forwards here.",
        ),
        headline=("kept_gb_per_s", "slow_down"),
    ),
}
_IDLE_NOTE = (
    "model: the same and 0.6 us an entry, which a driver that works takes (published by others, H200, CUDA "
    "13.0): A MODEL. Python: the share of it that was measured here; planning is numpy, which grows with the "
    "entries, and Python calls; the device seam is Python calls for each chunk and for each 256 entries. "
    "Without a GPU the driver, torch's streams and events and Triton's launcher do nothing: what they cost "
    "is not in these figures."
)


def tables(run: Results) -> list[Table]:
    """One table for each measurement of the run, and one of what has no figures."""
    made = []
    for name, shape in _SHAPES.items():
        rows = run.of(name)
        if rows:
            made.append(_table(run, rows, name, shape))
    missing = [row for row in run.rows if not row.metrics]
    if missing:
        made.append(_reasons(missing))
    return made


def summary(run: Results) -> list[Table]:
    """``auto`` beside SGLang's default: in all, for each layout, and the other measurements.

    None without either of them.
    """
    bandwidth = [row for row in run.of("bandwidth") if row.metrics]
    by_layout = {row.case.layout: list[_Pair]() for row in bandwidth}
    for pair in _pairs(bandwidth):
        by_layout[pair[1].case.layout].append(pair)
    found = {layout: pairs for layout, pairs in by_layout.items() if pairs}
    made = [_overview(found)] if found else []
    made += [_beside_default(layout, pairs) for layout, pairs in found.items()]
    others: list[tuple[str, ...]] = []
    for name, shape in _SHAPES.items():
        if name != "bandwidth":
            for metric in shape.headline:
                rows = [row for row in run.of(name) if metric in row.metrics]
                others += _other(name, metric, _pairs(rows))
    if others:
        columns = ("measurement", "layout", "cases", "SGLang's", "auto", "by")
        note = "Medians over the cases that both were measured in. by: auto by SGLang's default."
        made.append(
            Table("auto beside SGLang's default: other measurements", columns, tuple(others), (note,))
        )
    return made


_Pair = tuple[Row, Row]


def _pairs(rows: Sequence[Row]) -> list[_Pair]:
    """SGLang's default and ``auto`` of each case that has both."""
    found = []
    for (case, _), beside in _by_case(rows).items():
        by_name = {row.contender: row for row in beside}
        default = next((by_name[name] for name in DEFAULTS[case.layout] if name in by_name), None)
        if default is not None and AUTO in by_name:
            found.append((default, by_name[AUTO]))
    return found


def _overview(by_layout: Mapping[str, Sequence[_Pair]]) -> Table:
    lines = []
    for layout, pairs in by_layout.items():
        by = sorted(
            auto.metrics["gb_per_s"].median / default.metrics["gb_per_s"].median for default, auto in pairs
        )
        words = [_in_short(auto).partition(",")[0] for _, auto in pairs]
        right = [str(words.count(word)) for word in ("yes", "not told apart", "no")]
        shown = f"{statistics.median(by):.2f}x", f"{by[0]:.2f}x to {by[-1]:.2f}x"
        lines.append((layout, str(len(pairs)), *shown, *right))
    return Table(
        "auto beside SGLang's default: GB/s of one write",
        ("layout", "writes", "median", "least to most", "right", "even", "wrong"),
        tuple(lines),
        (
            "right: auto chose the fastest contender that keeps the policy's fences; even: not told apart. "
            "By this write alone: the policy also weighs what a copy takes from the forwards beside it "
            "(measurement interference).",
        ),
    )


def _beside_default(layout: str, pairs: Sequence[_Pair]) -> Table:
    lines = []
    attention = len({auto.case.attention for _, auto in pairs}) > 1
    for default, auto in pairs:
        theirs, ours = (row.metrics["gb_per_s"].median for row in (default, auto))
        case = _case_text(auto.case).replace(f" {layout}", "")
        name = case if attention else case.removesuffix(f" {auto.case.attention}")
        lines.append((name, f"{theirs:.1f}", f"{ours:.1f}", f"{ours / theirs:.2f}x", _in_short(auto)))
    names = ", ".join(dict.fromkeys(default.contender for default, _ in pairs))
    return Table(
        f"{layout}: GB/s of one write",
        ("write", "SGLang's", "auto", "by", "auto right?"),
        tuple(lines),
        (
            f"SGLang's default: {names}. by: auto by it. p: tokens a page; "
            "contig, frag: contiguous, fragmented.",
        ),
    )


def _in_short(auto: Row) -> str:
    """:func:`verdict`, without who was faster."""
    found = verdict(auto)
    return (
        f"no, by {auto.missed_by:.0%}"
        if found.startswith("no:")
        else found.partition(":")[0].partition(" (")[0]
    )


def _other(name: str, metric: str, pairs: Sequence[_Pair]) -> Iterator[tuple[str, ...]]:
    unit = METRICS[metric].unit
    for layout in dict.fromkeys(auto.case.layout for _, auto in pairs):
        here = [each for each in pairs if each[1].case.layout == layout]
        theirs, ours = (
            statistics.median(each[side].metrics[metric].median for each in here) for side in (0, 1)
        )
        by = f"{ours / theirs:.2f}x" if theirs else ""
        yield f"{name} {metric}", layout, str(len(here)), f"{theirs:,.4g} {unit}", f"{ours:,.4g} {unit}", by


def _table(run: Results, rows: Sequence[Row], name: str, shape: _Shape) -> Table:
    measured = [row for row in rows if row.metrics]
    found = dict.fromkeys(row.contender for row in measured)
    # The same order in every table; what is no contender comes last.
    known = contender_names()
    names = sorted(found, key=lambda name: known.index(name) if name in known else len(known))
    lines = []
    for (case, forward), beside in _by_case(rows).items():
        cells = {row.contender: shape.cell(row) for row in beside if row.metrics}
        line = [_case_text(case), *([forward or ""] if _has_forward(rows) else [])]
        line += [cells.get(each, "") for each in names]
        if shape.judged:
            line.append(verdict(next((row for row in beside if row.contender == AUTO), None)))
        if cells:
            lines.append(tuple(line))
    columns = ("case", *(("beside",) if _has_forward(rows) else ()), *names)
    notes = shape.notes + ((_IDLE_NOTE,) if name == "submit" and run.watermark else ())
    return Table(shape.title, columns + (("auto right?",) if shape.judged else ()), tuple(lines), notes)


def verdict(auto: Row | None) -> str:
    """Whether ``auto`` was the fastest safe choice, in words; inside the spread that is not known."""
    if auto is None or auto.auto_right is None:
        return ""
    if auto.auto_right and auto.missed_by and auto.backend != auto.fastest_safe:
        return f"not told apart: {auto.backend}, {auto.fastest_safe}"
    if auto.auto_right:
        return f"yes ({auto.backend})"
    return f"no: {auto.fastest_safe}, {auto.backend} takes {auto.missed_by:.0%} longer"


def _has_forward(rows: Sequence[Row]) -> bool:
    return any(row.forward is not None for row in rows)


def _by_case(rows: Sequence[Row]) -> dict[tuple[Case, str | None], list[Row]]:
    found: dict[tuple[Case, str | None], list[Row]] = {}
    for row in rows:
        found.setdefault((row.case, row.forward), []).append(row)
    return found


def _case_text(case: Case) -> str:
    shape = "frag" if case.fragmented else "contig"
    return f"{case.model} {case.layout} p{case.page_size} {case.tokens:,} {shape} {case.attention}"


def _reasons(missing: Sequence[Row]) -> Table:
    """What could not be measured, equal reasons together."""
    groups: dict[tuple[str, str, str], int] = {}
    for row in missing:
        key = (row.measurement, row.contender, row.reason or "no reason given")
        groups[key] = groups.get(key, 0) + 1
    lines = tuple((name, who, str(count), why) for (name, who, why), count in groups.items())
    return Table("Not measured", ("measurement", "contender", "rows", "why"), lines)


def markdown(run: Results) -> str:
    """Every table of a run, with the watermark above each."""
    return markdown_of(tables(run), run.watermark)


def markdown_of(shown: Sequence[Table], watermark: str | None) -> str:
    """Every table, with the watermark above each."""
    parts = []
    for table in shown:
        parts.append(f"### {table.title}\n")
        if watermark:
            parts.append(f"**{watermark}.**\n")
        parts += [markdown_row(table.columns), markdown_row(["---"] * len(table.columns))]
        parts += [markdown_row(line) for line in table.lines]
        parts += ["", *table.notes, ""]
    return "\n".join(parts)


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_html(table: Table, watermark: str | None) -> str:
    """A table element with its title."""
    head = _html_row("th", table.columns)
    body = "".join(f"{_html_row('td', line)}\n" for line in table.lines)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
    mark = f'<p class="mark">{html.escape(watermark)}</p>' if watermark else ""
    return (
        f'<h2 id="{anchor(table)}">{html.escape(table.title)}</h2>{mark}\n'
        f'<div class="scroll" tabindex="0"><table><thead>{head}</thead>\n'
        f"<tbody>{body}</tbody></table></div>{notes}\n"
    )


def _html_row(tag: str, cells: Sequence[str]) -> str:
    """A row whose first text is an element: a style says of one how wide it is at most, and of no cell."""
    first, *others = map(html.escape, cells)
    return "<tr>" + "".join(f"<{tag}>{each}</{tag}>" for each in (f"<span>{first}</span>", *others)) + "</tr>"


def anchor(table: Table) -> str:
    """What a link on the page leads to it by."""
    return re.sub(r"\W+", "-", table.title.lower()).strip("-")


def _beside_each_other(table: Table, width: int) -> Iterator[list[Sequence[str]]]:
    """The table's lines, titles first, in parts of so many columns as fit ``width``, each behind the first
    column: a table of all contenders in every case is wider than most terminals.
    """
    rows: list[Sequence[str]] = [table.columns, *table.lines]
    firsts = ["\n".join(textwrap.wrap(row[0], max(width // 2, 20), break_long_words=False)) for row in rows]
    left = max(len(line) for first in firsts for line in first.splitlines() or [""])
    part: list[int] = []
    used = left
    for at in range(1, len(table.columns)):
        wants = 3 + max(len(line) for row in rows for line in row[at].splitlines() or [""])
        if part and used + wants > width:
            yield [[first, *(row[each] for each in part)] for first, row in zip(firsts, rows, strict=True)]
            part, used = [], left
        part.append(at)
        used += wants
    yield [[first, *(row[each] for each in part)] for first, row in zip(firsts, rows, strict=True)]


def print_each(shown_tables: Sequence[Table], watermark: str | None, console: Any) -> None:
    """Tables on a rich console, each with the watermark in its title."""
    from ..layout import table as fitted  # by rich, which a machine that only measures may not have

    for each in shown_tables:
        console.print(each.title + (f"\n{watermark}" if watermark else ""), style="italic")
        for lines in _beside_each_other(each, console.width):
            console.print(fitted(console, lines[0], lines[1:], right=lines[0][1:]))
        for note in each.notes:
            console.print(note, style="dim")
