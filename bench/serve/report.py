"""Writes a result: JSON, CSV, Markdown tables, pictures, and one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from ..measure.plots import why_not
from ..measure.report import page, pictures
from ..measure.tables import markdown_of
from . import plots, result, tables
from .result import ServeResult

STEM = "serve"


def write_all(
    found: ServeResult, folder: Path, stem: str = STEM, *, single_pictures: bool = True
) -> list[Path]:
    """Write everything; returns the paths.

    Args:
        found: the result.
        folder: where to.
        stem: of the files' names.
        single_pictures: write each picture as files of its own, too.
    """
    made = tables.tables(found)
    as_csv, as_text, as_page = (folder / f"{stem}.{kind}" for kind in ("csv", "md", "html"))
    paths = [result.save(found, folder, stem), as_csv, as_text]
    as_csv.write_text(result.to_csv(found), encoding="utf-8")
    as_text.write_text(markdown_of(made, found.watermark), encoding="utf-8")
    drawn = {} if why_not() is not None else plots.figures(found)
    as_page.write_text(
        page("SGLang servers under load", found, made, pictures(drawn), problems=found.problems()),
        encoding="utf-8",
    )
    return [*paths, *(plots.save(found, folder) if drawn and single_pictures else []), as_page]
