"""One HTML file of a run that needs nothing else: no script, no style sheet, no picture from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...policy import html
from . import plots, results, tables
from .results import METRICS, Results

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 110em; padding: 0 1em }
table { border-collapse: collapse; margin: 0.5em 0; font-variant-numeric: tabular-nums }
th, td { border: 1px solid #ccc; padding: 2px 8px; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.scroll { overflow-x: auto } img { max-width: 100% }
.mark { color: #b00020; font-weight: bold } dt { font-weight: bold } dd { margin: 0 0 0.2em 1em }
"""


def as_html(run: Results) -> str:
    """The report of a run."""
    rates = {
        name: f"{rate.median:.1f} GB/s ({rate.low:.1f} to {rate.high:.1f})"
        for name, rate in run.ceilings.items()
    }
    reason = plots.why_not()
    shown = f"<p>No pictures: {html.escape(reason)}</p>" if reason else pictures(plots.figures(run))
    terms = {name: f"{each.says} ({each.unit or 'share'})" for name, each in METRICS.items()}
    title = "Write-back of KV cache to host memory"
    return page(title, run, tables.tables(run), shown, more=rates, terms=terms)


def page(
    title: str,
    run: plots.Marked,
    shown: Sequence[tables.Table],
    drawn: str,
    *,
    more: Mapping[str, str] | None = None,
    terms: Mapping[str, str] | None = None,
    problems: Sequence[str] = (),
) -> str:
    """A page: where it was measured, problems, pictures, tables, and what the numbers are.

    Args:
        title: heading.
        run: its environment and watermark.
        shown: the tables.
        drawn: the pictures, as HTML.
        more: further lines of the environment.
        terms: what each number is, by name.
        problems: what went wrong, a sentence each.
    """
    mark = f'<p class="mark">{html.escape(run.watermark)}</p>' if run.watermark else ""
    about = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in {**run.environment, **(more or {})}.items()
    )
    wrong = "".join(f'<p class="mark">{html.escape(problem)}</p>' for problem in problems)
    below = "".join(f'<div class="scroll">{tables.as_html(each, run.watermark)}</div>' for each in shown)
    said = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in (terms or {}).items())
    glossary = f"<h2>What the numbers are</h2><dl>{said}</dl>" if said else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>hicache-io bench</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>{mark}{wrong}\n"
        f"<table><tbody>{about}</tbody></table>\n{drawn}{below}{glossary}{mark}</body></html>\n"
    )


def pictures(figures: Mapping[str, Any]) -> str:
    """Figures as HTML that holds them."""
    shown = []
    for name, figure in figures.items():
        data = base64.b64encode(plots.png(figure)).decode()
        shown.append(f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></p>\n')
    return "".join(shown)


def write_all(run: Results, folder: Path) -> list[Path]:
    """JSON, CSV, Markdown tables, pictures where matplotlib is, and the report; returns what was written."""
    paths = results.save(run, folder)
    as_text = folder / "tables.md"
    as_text.write_text(tables.markdown(run), encoding="utf-8")
    drawn = plots.save(run, folder) if plots.why_not() is None else []
    as_page = folder / "report.html"
    as_page.write_text(as_html(run), encoding="utf-8")
    return [*paths, as_text, *drawn, as_page]
