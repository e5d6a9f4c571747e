"""What trials on one GPU have in common: the command line, and rows that are saved as they come."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import saved
from ..measure.devices import gpu_missing
from ..measure.environment import describe_environment
from ..measure.results import CPU_WATERMARK


def parser_of(about: str | None, *, out_required: bool = True) -> argparse.ArgumentParser:
    """Options that each has: ``--out FILE`` and ``--cpu``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=out_required)
    parser.add_argument("--cpu", action="store_true", help="exercise the code without a GPU")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options. Exits where there is no GPU and ``--cpu`` is not given."""
    args = parser.parse_args()
    missing = None if args.cpu else gpu_missing()
    if missing is not None:
        parser.error(f"no GPU: {missing} (--cpu exercises the code without one)")
    return args


class SavedRows:
    """Rows, saved after each with what they were measured on, so that who is killed loses none.

    Args:
        out: the JSON file.
        cpu: whether they are measured on the CPU.
    """

    def __init__(self, out: Path, *, cpu: bool) -> None:
        self._out = out
        self._environment = describe_environment(cpu=cpu)
        self._watermark = CPU_WATERMARK if cpu else None
        self._rows: list[Mapping[str, Any]] = []
        for name, value in self._environment.items():
            print(f"{name}: {value}", flush=True)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of plain JSON types."""
        self._rows.append(row)
        found = {"environment": self._environment, "watermark": self._watermark, "rows": self._rows}
        saved.write_json(self._out, found)
