"""One HTML file of a run that needs nothing else: no script, no style sheet, no picture from elsewhere."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from sglang_hicache.bench.measure import plots, results, tables
from sglang_hicache.bench.measure.results import METRICS, Run

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 110em; padding: 0 1em }
table { border-collapse: collapse; margin: 0.5em 0; font-variant-numeric: tabular-nums }
th, td { border: 1px solid #ccc; padding: 2px 8px; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.scroll { overflow-x: auto } img { max-width: 100% }
.mark { color: #b00020; font-weight: bold } dt { font-weight: bold } dd { margin: 0 0 0.2em 1em }
"""


def as_html(run: Run) -> str:
    """The report."""
    mark = f'<p class="mark">{html.escape(run.watermark)}</p>' if run.watermark else ""
    about = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in run.environment.items()
    )
    rates = "".join(
        f"<tr><td>{name}</td><td>{rate.median:.1f} GB/s ({rate.low:.1f} to {rate.high:.1f})</td></tr>"
        for name, rate in run.ceilings.items()
    )
    shown = "".join(
        f'<div class="scroll">{tables.as_html(each, run.watermark)}</div>' for each in tables.tables(run)
    )
    terms = "".join(
        f"<dt>{name}</dt><dd>{html.escape(each.says)} ({each.unit or 'share'})</dd>"
        for name, each in METRICS.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>hicache-io bench</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>Write-back of KV cache to host memory</h1>{mark}\n"
        f"<table><tbody>{about}{rates}</tbody></table>\n{_pictures(run)}{shown}"
        f"<h2>What the numbers are</h2><dl>{terms}</dl>{mark}</body></html>\n"
    )


def _pictures(run: Run) -> str:
    reason = plots.why_not()
    if reason is not None:
        return f"<p>No pictures: {html.escape(reason)}</p>"
    pictures = []
    for name, figure in plots.figures(run).items():
        data = base64.b64encode(plots.png(figure)).decode()
        pictures.append(f'<p><img alt="{name}" src="data:image/png;base64,{data}"></p>\n')
    return "".join(pictures)


def write_all(run: Run, folder: Path) -> list[Path]:
    """JSON, CSV, Markdown tables, pictures where matplotlib is, and the report; returns what was written."""
    paths = results.save(run, folder)
    as_text = folder / "tables.md"
    as_text.write_text(tables.markdown(run), encoding="utf-8")
    pictures = plots.save(run, folder) if plots.why_not() is None else []
    page = folder / "report.html"
    page.write_text(as_html(run), encoding="utf-8")
    return [*paths, as_text, *pictures, page]
