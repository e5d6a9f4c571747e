"""mypy over the whole package, with the files where they are.

    python -m sglang_hicache.bench.lab.typecheck

mypy takes a module's name from its folders, and no folder is named ``sglang_hicache``: the names are given.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from mypy.build import build
from mypy.errors import CompileError
from mypy.fscache import FileSystemCache
from mypy.main import process_options
from mypy.modulefinder import BuildSource

ROOT = Path(__file__).parents[2]
PACKAGE = "sglang_hicache"


def sources(root: Path = ROOT) -> list[BuildSource]:
    """Every module of the package: path from ``root``, and name."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    folders = sorted({name.split(".")[1] for name in project["tool"]["setuptools"]["packages"]})
    files = [path.relative_to(root) for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    return [
        BuildSource(str(path), ".".join((PACKAGE, *path.with_suffix("").parts)).removesuffix(".__init__"))
        for path in files
    ]


def main() -> int:
    """Print what mypy finds. Returns 1 if it finds anything."""
    options = process_options(["--strict", "-c", ""])[1]
    every = sources()
    try:
        found = build(every, options, fscache=FileSystemCache()).errors
    except CompileError as error:
        found = error.messages
    print("\n".join([*found, f"mypy: {len(found)} messages in {len(every)} files"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
