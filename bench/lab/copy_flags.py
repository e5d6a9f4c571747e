"""Batched copies with and without the hint that keeps them off the SMs.

    python -m sglang_hicache.bench.lab.copy_flags --out copy_flags.json [--cpu]

The hint is CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE. For each write: GB/s alone, and how much forwards slow
down beside it, by a device that asks for it and one that does not, in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...io_backends.policy_files import default_policy
from ..measure.cases import Case
from ..measure.devices import gpu_missing, open_bench
from ..measure.environment import describe_environment
from ..measure.interference import interference
from ..measure.one_write import Setting, bandwidth
from ..measure.results import CPU_WATERMARK

WRITES = (
    ("copy_engine", "layer_first", 1),
    ("copy_engine", "layer_first", 16),
    ("copy_engine", "layer_first", 64),
    ("copy_engine", "page_first_direct", 64),
    ("hybrid", "page_first", 1),
)
"""(backend, layout, page size): entries of 2 KiB to 9 MiB."""


def main() -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true", help="exercise the code without a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if (missing := gpu_missing()) is not None and not args.cpu:
        parser.error(f"no GPU: {missing} (--cpu exercises the code without one)")
    environment = describe_environment(cpu=args.cpu)
    for name, value in environment.items():
        print(f"{name}: {value}", flush=True)
    found: list[dict[str, Any]] = []
    for backend, layout, page in WRITES:
        case = Case("Qwen3-8B", layout, page, 64 if args.cpu else 4096, True)
        for hint in (False, True, False, True):
            options = {} if args.cpu else {"prefer_overlap": hint}
            setting = Setting(open_bench(args.cpu, **options), default_policy(), args.repeats, (backend,))
            for row in (*bandwidth(setting, case), *interference(setting, case)):
                found.append({"hint": hint, **asdict(row)})
                numbers = ", ".join(f"{name} {each.median:.4g}" for name, each in row.metrics.items())
                beside = f", {row.forward}" if row.forward else ""
                print(f"hint {hint}: {backend} {case}{beside}: {numbers or row.reason}", flush=True)
            saved = {
                "environment": environment,
                "watermark": CPU_WATERMARK if args.cpu else None,
                "rows": found,
            }
            args.out.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
