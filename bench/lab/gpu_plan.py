"""A named list of cells, run on a machine that is lent for minutes: whole servers under load.

    python -m sglang_hicache.bench.lab.gpu_plan first --out DIR --budget 480
    python -m sglang_hicache.bench.lab.gpu_plan --list

What was measured is saved after each turn of each server, so that nothing is lost when the machine goes away:
NAME.json, and at the end of each cell NAME.csv, NAME.md, NAME.html and NAME-logs.tar.gz. A cell that fails is
a line in them; the next one is run. With ``--rehearse`` the same plan runs on SGLang's CPU engine with a tiny
model: it shows that the plan runs, and no speed. Exit status 1 if something was wrong, or nothing measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from ...io_backends.registry import AUTO
from ..measure.devices import gpu_missing
from ..measure.environment import describe_environment
from ..serve import report, result, run, tables
from ..serve.arms import OTHER_CODE
from . import gpu_bundle
from .gpu_plans import GIB, PLANS, PlannedCell, host_bytes, kv_bytes_per_token

_MOST_TOUCHED = 100 * GIB
"""A machine with one GPU has 128 GiB; touching more than it has would end this process."""


def make_room(wanted: int, say: run.Say) -> None:
    """Touch memory until ``wanted`` bytes are available: a machine may start with little and grow with use.

    SGLang refuses a host pool that is larger than what is available at that moment.
    """
    import psutil

    wanted = min(wanted, _MOST_TOUCHED)
    have = psutil.virtual_memory().available
    if have >= wanted:
        return
    say(f"touching {wanted / GIB:.0f} GiB of host memory: {have / GIB:.0f} GiB are available")
    # All hold their share until the last one has it.
    code = (
        "import numpy, sys; held = numpy.zeros(int(sys.argv[1]), 'u1'); held[::4096] = 1; "
        "print(flush=True); sys.stdin.read()"
    )
    began = time.monotonic()
    fillers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(wanted // 8)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(8)
    ]
    for each in fillers:
        assert each.stdout is not None
        each.stdout.readline()
    for each in fillers:
        each.communicate()
    have = psutil.virtual_memory().available
    say(f"{have / GIB:.0f} GiB are available after {time.monotonic() - began:.0f} s")


def run_plan(
    name: str,
    steps: Sequence[PlannedCell],
    out: Path,
    work: Path,
    budget_s: float,
    *,
    cpu: bool,
    turns_lock: Path | None = None,
    code: Mapping[str, Path] = MappingProxyType({}),
) -> bool:
    """Run the steps as far as the time allows; returns whether all is well.

    Args:
        name: of the plan, and of the files.
        steps: its cells.
        out: where the files go.
        work: for models and logs.
        budget_s: for all of it.
        cpu: on SGLang's CPU engine.
        turns_lock, code: see `run.ServeOptions`.
    """
    budget = run.Budget(budget_s)
    out.mkdir(parents=True, exist_ok=True)
    found = result.ServeResult(describe_environment(cpu=cpu))
    result.save(found, out, name)
    ok = True
    for step in steps:
        say(f"== {step.name}: {', '.join(step.arms)}; {budget.left_s():.0f} s left")
        if budget.left_s() < 20:
            say(f"== {step.name}: not run, no time left")
            ok = False
            continue
        logs = (work / "logs").resolve()
        try:
            cell = replace(step.cell(work / "models"), cpu_engine=cpu)
            if not cpu:
                config = json.loads((Path(cell.model.path) / "config.json").read_text(encoding="utf-8"))
                make_room(host_bytes(step, kv_bytes_per_token(config)), say)

            def save(part: result.CellResult) -> None:
                found.put(part)
                result.save(found, out, name)

            given = run.ServeOptions(
                step.arms,
                step.workloads,
                step.rounds,
                step.at_once,
                logs,
                enough_s=step.enough_s,
                turns_lock=turns_lock,
                code=code,
            )
            save(run.run_cell(cell, given, budget, say, save))
        except Exception:  # the steps after it still run
            traceback.print_exc()
            ok = False
        _pack_logs(logs, out / f"{name}-logs.tar.gz")
        try:
            report.write_all(found, out, name, single_pictures=False)
        except Exception:  # the JSON is there, and a report can be made of it later
            traceback.print_exc()
    for table in tables.tables(found):
        if table.title.endswith((tables.SPEED, tables.AGAINST)):
            print(tables.as_text(table, found.watermark), flush=True)
    for problem in found.problems():
        say(f"PROBLEM: {problem}")
    for cell_result in found.cells:
        for skipped in cell_result.skipped:
            say(f"not run: {cell_result.name}: {skipped}")
    return ok and not found.problems() and any(each.turns for each in found.cells)


def _pack_logs(logs: Path, packed: Path) -> None:
    part = packed.with_suffix(".part")
    with tarfile.open(part, "w:gz") as archive:
        for path in sorted(logs.glob("*.log")):
            archive.add(path, arcname=path.name)
    part.replace(packed)


def say(text: str) -> None:
    """One line, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main(given: Sequence[str] | None = None) -> int:
    """Run a plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", nargs="?", choices=tuple(PLANS))
    parser.add_argument("--list", action="store_true", help="print the plans and their cells")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/hicache-io-plan"), help="for models and logs")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all of it")
    parser.add_argument("--cell", nargs="+", metavar="NAME", help="only these cells")
    parser.add_argument("--arm", nargs="+", metavar="NAME", help="only these arms")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--at-once", type=int, metavar="N", help="servers that are up together")
    parser.add_argument(
        "--turns-lock",
        type=Path,
        metavar="FILE",
        help="the same for plans on other GPUs of this machine: of all, one server is loaded at a time",
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="NAME=CHECKOUT",
        help="another checkout of this project, whose auto is one more arm, auto@NAME",
    )
    parser.add_argument("--rehearse", action="store_true", help="on SGLang's CPU engine, small")
    args = parser.parse_args(given)
    if args.list or args.plan is None:
        for name, steps in PLANS.items():
            print(name)
            for step in steps:
                print(
                    f"  {step.name}: {' '.join(step.arms)}; {' '.join(step.workloads)}; {step.rounds} rounds"
                )
        return 0
    missing = gpu_missing()
    if missing is not None and not args.rehearse:
        parser.error(f"no GPU: {missing} (--rehearse runs on SGLang's CPU engine)")
    steps = [step for step in PLANS[args.plan] if not args.cell or step.name in args.cell]
    if not steps:
        parser.error(f"--cell: of {', '.join(step.name for step in PLANS[args.plan])}")
    code = {}
    for name, _, checkout in (given.partition("=") for given in args.beside):
        if not (Path(checkout) / "pyproject.toml").is_file():
            parser.error(f"--beside {name}={checkout}: no checkout is there")
        site = (args.work / "code" / name).resolve()
        shutil.rmtree(site, ignore_errors=True)
        gpu_bundle.link_project(site, Path(checkout).resolve())
        code[name] = site / "project"
        steps = [replace(step, arms=[*step.arms, f"{AUTO}{OTHER_CODE}{name}"]) for step in steps]
    if args.arm:
        steps = [replace(step, arms=[arm for arm in step.arms if arm in args.arm]) for step in steps]
    if args.rounds:
        steps = [replace(step, rounds=args.rounds) for step in steps]
    if args.at_once:
        steps = [replace(step, at_once=args.at_once) for step in steps]
    if args.rehearse:
        steps = [step.rehearsal() for step in steps]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped on the way out
    ok = run_plan(
        *(args.plan, steps, args.out, args.work, args.budget),
        cpu=args.rehearse,
        turns_lock=args.turns_lock,
        code=code,
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
