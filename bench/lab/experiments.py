"""What servers without fences survived so far, added up over saved runs.

    python -m sglang_hicache.bench.lab.experiments bench/results/*/experiments*.json [--json]

Of the plans ``experiments`` and ``experiments-bytes`` of the GPU plans: `fenced_kernel` with none of its
fences, with the producer's alone, and with all. One row for each GPU, SGLang kernel package, attention
backend, page size and arm: time under load, bytes written, requests, errors, servers that died, and answers
that were not those of a server without HiCache, where that can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..serve import result
from ..serve.arms import EXPERIMENTS

COLUMNS = ("load", "written", "requests", "errors", "died", "answers not as without HiCache")


@dataclass
class ArmTotals:
    """Of all turns of one arm.

    Attributes:
        gpu, kernel, attention, layout, page_size, deterministic, fences: what was the same.
        seconds: of load.
        written_bytes: to host memory, by SGLang's own metric.
        requests, errors: answered, and not.
        died: runs whose server did not live to the end.
        compared, differing: answers compared with a server without HiCache, and those that were not its.
    """

    gpu: str
    kernel: str
    attention: str
    layout: str
    page_size: int
    deterministic: bool
    fences: str
    seconds: float = 0.0
    written_bytes: float = 0.0
    requests: int = 0
    errors: int = 0
    died: int = 0
    compared: int = 0
    differing: int = 0


def add_up(runs: Iterable[result.ServeResult]) -> list[ArmTotals]:
    """One sum for each setting and arm, in the order met."""
    sums: dict[tuple[object, ...], ArmTotals] = {}
    for run in runs:
        for cell in run.cells:
            for arm, facts in cell.arms.items():
                if arm not in EXPERIMENTS:
                    continue
                key = (
                    str(run.environment.get("gpu", run.environment.get("cpu"))),
                    str(run.environment.get("sglang_kernel")),
                    attention_of(facts.args),
                    _after(facts.args, "--hicache-mem-layout") or "",
                    int(_after(facts.args, "--page-size") or 0),
                    "--enable-deterministic-inference" in facts.args,
                    EXPERIMENTS[arm],
                )
                found = sums.setdefault(key, ArmTotals(*key))
                found.died += facts.problem is not None
                for turn in cell.turns:
                    if turn.arm == arm:
                        found.seconds += turn.seconds
                        found.written_bytes += turn.written.written_bytes or 0.0
                        found.requests += turn.requests
                        found.errors += turn.errors
                        found.compared += turn.compared or 0
                        found.differing += (turn.compared or 0) - (turn.same or 0)
    return list(sums.values())


def attention_of(args: list[str]) -> str:
    """Attention backends in a server's options, prefill's and decode's."""
    both = _after(args, "--attention-backend")
    prefill, decode = (
        _after(args, f"--{phase}-attention-backend") or both for phase in ("prefill", "decode")
    )
    return f"{prefill}" if prefill == decode else f"{prefill} + {decode}"


def _after(args: list[str], option: str) -> str | None:
    return args[args.index(option) + 1] if option in args else None


def markdown(sums: Iterable[ArmTotals]) -> str:
    """A table for the documents."""
    lines = [
        "| GPU, sglang-kernel | attention | layout | page | fences | " + " | ".join(COLUMNS) + " |",
        "| --- " * (5 + len(COLUMNS)) + "|",
    ]
    for each in sums:
        compared = f"{each.differing} of {each.compared}" if each.compared else "not compared"
        attention = f"{each.attention}, deterministic" if each.deterministic else each.attention
        lines.append(
            f"| {each.gpu}, {each.kernel} | {attention} "
            f"| {each.layout} | {each.page_size} | {each.fences} | {each.seconds / 60:,.1f} min "
            f"| {each.written_bytes / 1e9:,.0f} GB | {each.requests:,} | {each.errors} | {each.died} "
            f"| {compared} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Add up, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sums = add_up(result.load(path) for path in args.files)
    print(json.dumps([asdict(each) for each in sums], indent=1) if args.json else markdown(sums))
    return 0


if __name__ == "__main__":
    sys.exit(main())
