"""Batched copies with and without the hint that keeps them off the SMs.

    python -m sglang_hicache.bench.lab.copy_flags --out copy_flags.json [--cpu]

The hint is CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE. For each write: GB/s alone, and how much forwards slow
down beside it, by a device that asks for it and one that does not, in turns.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

from ...io_backends.policy_files import default_policy
from ..measure.cases import Case
from ..measure.devices import open_bench
from ..measure.interference import interference
from ..measure.one_write import Setting, bandwidth
from .trial import SavedRows, parsed, parser_of

WRITES = (
    ("copy_engine", "layer_first", 1),
    ("copy_engine", "layer_first", 16),
    ("copy_engine", "layer_first", 64),
    ("copy_engine", "page_first_direct", 64),
    ("hybrid", "page_first", 1),
)
"""(backend, layout, page size): copies of 2 KiB to 9 MiB."""


def main() -> int:
    """Measure, print, save."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parsed(parser)
    rows = SavedRows(args.out, cpu=args.cpu)
    for backend, layout, page in WRITES:
        case = Case("Qwen3-8B", layout, page, 64 if args.cpu else 4096, True)
        for hint in (False, True, False, True):
            options = {} if args.cpu else {"prefer_overlap": hint}
            setting = Setting(open_bench(args.cpu, **options), default_policy(), args.repeats, (backend,))
            for row in (*bandwidth(setting, case), *interference(setting, case)):
                rows.add({"hint": hint, **asdict(row)})
                numbers = ", ".join(f"{name} {each.median:.4g}" for name, each in row.metrics.items())
                beside = f", {row.forward}" if row.forward else ""
                print(f"hint {hint}: {backend} {case}{beside}: {numbers or row.reason}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
