"""What saved runs of `hicache-io stress` showed, one server a row, and their sum.

python -m sglang_hicache.bench.lab.stress_table bench/results/DATE-GPU-stress/*.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..measure.tables import markdown_row

COLUMNS = ("model", "layout", "page", "exact", "load", "answers", "compared", "of them from host", "wrong")


def table(paths: Iterable[Path]) -> str:
    """Markdown. ``exact``: the server was deterministic, and every token had to be the same; ``wrong`` counts
    errors too.

    Raises:
        OSError, ValueError: a file cannot be read, or holds something else.
    """
    rows = [
        _row(server) for path in paths for server in json.loads(path.read_text(encoding="utf-8"))["servers"]
    ]
    sums = [sum(column) for column in list(zip(*rows, strict=True))[4:]]
    lines = [markdown_row(COLUMNS), markdown_row(["---"] * len(COLUMNS))]
    lines += [markdown_row([*map(str, row[:4]), *_counts(row[4:])]) for row in rows]
    return "\n".join([*lines, markdown_row(["all", "", "", "", *_counts(sums)])]) + "\n"


def _row(server: Mapping[str, Any]) -> tuple[Any, ...]:
    about = server["server"]
    return (
        Path(about["model_path"]).name,
        f"`{about['hicache_mem_layout']}`",
        about["page_size"],
        "yes" if about["enable_deterministic_inference"] else "no",
        server["loaded_s"],
        server["ok"],
        server["checked"],
        server["checked_from_host"],
        server["wrong"] + server["errors"],
    )


def _counts(row: Iterable[float]) -> list[str]:
    seconds, *counts = row
    return [f"{seconds / 60:.1f} min", *(f"{count:,}" for count in counts)]


def main() -> None:
    """Print the table of some files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    print(table(parser.parse_args().files), end="")


if __name__ == "__main__":
    main()
