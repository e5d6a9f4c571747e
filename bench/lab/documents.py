"""The tables in README.md and docs/ that are made from data: each is written again from its source.

    make tables

Such a table stands between ``<!-- NAME ARGUMENT... -->`` and ``<!-- end -->``, where NAME is one of
:data:`MAKERS` and the arguments are paths of saved runs, from the repository's root. A test holds every table
to what this prints, so that no figure is edited by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ...io_backends.policy_files import default_policy
from ..explain.matrix import markdown, matrix
from ..measure import results
from ..serve import result
from . import coverage, experiments, fact_list, stress_table, submission_thread, targets, thread_floor
from .gpu_table import fence_table, of_file, reads_table
from .serve_table import arms_table, speed_table, summary_table, together, verified_table

DOCUMENTS = ("README.md", "docs/*.md")
"""Where tables may stand, from the repository's root."""

_TABLE = re.compile(r"(<!-- (\w+)((?: [^\s>]+)*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _servers(make: Callable[[result.ServeResult], str]) -> Callable[[Sequence[Path]], str]:
    return lambda paths: make(together(map(result.load, paths)))


MAKERS: dict[str, Callable[[Sequence[Path]], str]] = {
    "gpu_table": lambda paths: "\n".join(map(of_file, paths)),
    "gpu_reads": lambda paths: "\n".join(
        reads_table(json.loads(path.read_text(encoding="utf-8"))) for path in paths
    ),
    "gpu_fence": lambda paths: "\n".join(fence_table(results.load(path)) for path in paths),
    "gpu_targets": lambda paths: targets.table(results.merged(map(results.load, paths))),
    "coverage": lambda paths: "\n".join(map(coverage.table, paths)),
    "policy_facts": lambda paths: fact_list.table(),
    "policy_matrix": lambda paths: markdown(matrix(default_policy(), {})),
    "serve_summary": _servers(summary_table),
    "serve_arms": _servers(arms_table),
    "serve_chat": _servers(speed_table),
    "serve_prefill": _servers(lambda runs: speed_table(runs, "prefill")),
    "submission": lambda paths: "\n".join(
        submission_thread.table(json.loads(path.read_text(encoding="utf-8"))["rows"]) for path in paths
    ),
    "thread_floor": lambda paths: "\n".join(
        thread_floor.table(json.loads(path.read_text(encoding="utf-8"))["rows"]) for path in paths
    ),
    "stress": stress_table.table,
    "experiments": lambda paths: experiments.markdown(experiments.add_up(map(result.load, paths))) + "\n",
    "serve_verified": lambda paths: verified_table([result.load(path) for path in paths]),
}
"""What makes the table of each name, from the paths after it."""


def documents(root: Path) -> list[Path]:
    """The documents under the repository's root in which tables may stand, in order."""
    return [path for pattern in DOCUMENTS for path in sorted(root.glob(pattern))]


def names(text: str) -> list[str]:
    """The names of a document's tables, in order."""
    return [name for _, name, _, _, _ in _TABLE.findall(text)]


def rewritten(text: str, root: Path) -> str:
    """A document's text with each table as its data makes it now.

    Args:
        text: Markdown.
        root: what the paths of tables start from.

    Raises:
        OSError, ValueError: data that cannot be read, or no maker of that name.
    """

    def again(table: re.Match[str]) -> str:
        head, name, arguments, _, end = table.groups()
        if name not in MAKERS:
            raise ValueError(f"no table is called {name}; there are {', '.join(MAKERS)}")
        return head + MAKERS[name]([root / path for path in arguments.split()]) + end

    return _TABLE.sub(again, text)


def main() -> None:
    """Write the tables of this checkout's documents again, and name the documents that changed."""
    root = Path.cwd()
    for path in documents(root):
        before = path.read_text(encoding="utf-8")
        after = rewritten(before, root)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.relative_to(root)}: written")


if __name__ == "__main__":
    main()
