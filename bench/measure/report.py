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
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; color: #111 }
table { border-collapse: collapse; margin: 0.5em 0; font-variant-numeric: tabular-nums }
th, td { border: 1px solid #ccc; padding: 2px 8px; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; background: #fff; position: sticky; left: 0 }
thead th { background: #f2f2f2 } .scroll { overflow-x: auto; max-width: 100% }
.scroll thead th:first-child { background: #f2f2f2 }
.about td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top }
.about td:first-child { white-space: nowrap; font-weight: bold; position: static }
nav { columns: 22em; margin: 1em 0 } nav a { display: block } img { max-width: 100%; height: auto }
@media (max-width: 40em) {
  body { margin: 1em auto; font-size: 13px }
  th, td { padding: 2px 5px }
  .scroll span { display: block; width: max-content; max-width: 8em; min-width: min-content }
  .scroll span, .about td:first-child { white-space: normal; overflow-wrap: normal }
  .about td:first-child { width: 1% }
  #pictures p { overflow-x: auto } #pictures img { max-width: 60em }
}
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
    # The first lines say it in all; a phone has no room for more before the contents.
    overview, rest = tables.summary(run)[:1], tables.summary(run)[1:]
    return page(title, run, [*rest, *tables.tables(run)], shown, more=rates, terms=terms, first=overview)


def page(
    title: str,
    run: plots.Marked,
    shown: Sequence[tables.Table],
    drawn: str,
    *,
    more: Mapping[str, str] | None = None,
    terms: Mapping[str, str] | None = None,
    problems: Sequence[str] = (),
    first: Sequence[tables.Table] = (),
) -> str:
    """A page: problems, the tables to read first, contents, pictures, all tables, what the numbers are, and
    where it was measured.

    Args:
        title: heading.
        run: its environment and watermark.
        shown: the tables.
        drawn: the pictures, as HTML.
        more: further lines of the environment.
        terms: what each number is, by name.
        problems: what went wrong, a sentence each.
        first: the tables to read first.
    """
    mark = f'<p class="mark">{html.escape(run.watermark)}</p>' if run.watermark else ""
    about = "".join(
        f"<tr><td>{html.escape(name).replace('_', '_<wbr>')}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in {**run.environment, **(more or {})}.items()
    )
    wrong = "".join(f'<p class="mark">{html.escape(problem)}</p>' for problem in problems)
    above, below = ("".join(tables.as_html(each, run.watermark) for each in some) for some in (first, shown))
    said = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in (terms or {}).items())
    glossary = f'<h2 id="numbers">What the numbers are</h2><dl>{said}</dl>' if said else ""
    entries = {tables.anchor(each): each.title for each in (*first, *shown)}
    entries |= {"pictures": "Pictures"} if drawn else {}
    entries |= {"numbers": "What the numbers are"} if said else {}
    entries |= {"where": "Where it was measured"}
    contents = "".join(f'<a href="#{name}">{html.escape(text)}</a>' for name, text in entries.items())
    what = run.environment.get("gpu") or run.environment.get("cpu")
    line = f"{what}, SGLang {run.environment.get('sglang')}, {str(run.environment.get('date'))[:10]}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>hicache-io bench</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>{mark}{wrong}\n"
        f"<p>{html.escape(line)}</p>\n{above}<h2>Contents</h2><nav>{contents}</nav>\n"
        f'<div id="pictures">{drawn}</div>{below}{glossary}\n'
        f'<h2 id="where">Where it was measured</h2><table class="about"><tbody>{about}</tbody></table>{mark}'
        "</body></html>\n"
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
