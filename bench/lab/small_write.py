"""One small write by each of this project's backends, every byte checked: what compute-sanitizer is run on.

    compute-sanitizer --tool memcheck python -m sglang_hicache.bench.lab.small_write

Exit status 1 if a byte was wrong or a backend failed.
"""

from __future__ import annotations

import argparse
import sys

from ...io_backends.policy_files import default_policy
from ...io_backends.registry import OWN_NAMES
from ..measure.cases import LAYOUTS, MODELS, Case
from ..measure.contenders import contenders
from ..measure.devices import gpu_missing, open_bench
from ..measure.one_write import Setting, check

CASES = [Case(model, layout, 16, 64, True) for model in ("Qwen3-8B", "DeepSeek-V3") for layout in LAYOUTS]


def main() -> int:
    """Write, check, and say what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", nargs="+", choices=OWN_NAMES, default=OWN_NAMES)
    parser.add_argument(
        "--model", nargs="+", choices=sorted({case.model for case in CASES}), default=list(MODELS)
    )
    args = parser.parse_args()
    setting = Setting(open_bench(gpu_missing() is not None), default_policy(), 1, args.backend)
    bad = 0
    for case in CASES:
        if case.model not in args.model:
            continue
        memory = setting.memory(case)
        memory.refill()
        for forwards_wait in (False, True):
            task = setting.task(case, memory, forwards_wait=forwards_wait)
            for each in contenders(task, setting.wanted):
                wrong = each.reason if each.submit is None else check(memory, task, each.submit)
                # A layout that a backend does not serve, or SGLang missing, is no failure.
                bad += each.submit is not None and wrong is not None
                fenced = "forwards wait" if forwards_wait else "no forward waits"
                print(f"{case}: {each.name}, {fenced}: {wrong or 'every byte right'}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
