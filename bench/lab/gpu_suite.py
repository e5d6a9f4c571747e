"""One call on a machine with a GPU: correctness first, then figures, all of it saved as data.

    python -m sglang_hicache.bench.lab.gpu_suite --out results [--parts tests bench] [--budget 300]

Prints device, driver, CUDA and versions, then runs the parts in that order:

tests      ``pytest -m gpu``; its output in ``gpu_tests.txt``
sanitize   compute-sanitizer's memcheck and racecheck on a small write of each backend, where the tool is
bench      every measurement, or those named with ``--measure``, within the time budget; ``bench.json``, CSV,
           tables, plots and ``report.html``
profile    where the time of one write goes (:mod:`~.profile`); ``profile.json``
calibrate  ``calibration.json`` and ``machine.yaml``

``suite.json`` says how each part went. SGLang takes part where it can be imported, or its bundle
(:mod:`~sglang_hicache.bench.lab.gpu_bundle`) is on ``PYTHONPATH``. Needs neither typer nor rich; without
matplotlib there are no plots. Exit status 1 if a test or the sanitizer failed, or a byte was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...io_backends.registry import BACKENDS
from ...policy.backend_spec import spec_of
from ..calibrate.run import ON_CPU, Plan, calibrate, quicker
from ..measure import report, results, suite, tables
from ..measure.cases import MODELS
from ..measure.contenders import names
from ..measure.devices import gpu_missing
from ..measure.environment import describe_environment
from ..measure.sustained import SECONDS
from . import profile

PARTS = ("tests", "sanitize", "bench", "profile", "calibrate")
GPU_TESTS = (
    "tests/io_backends/device/test_cuda_gpu.py",
    "tests/io_backends/test_fences_gpu.py",
    "tests/io_backends/sglang/scheduler/test_gpu_pools.py",
    "tests/io_backends/sglang/scheduler/test_record_pools_gpu.py",
)
SANITIZER = "compute-sanitizer"
# Failed API calls are not what is looked for: this project checks each of its own, and cuda-python asks the
# driver for functions that it may not have, which would be 34 reports. Nor does racecheck look at SGLang's
# TMA kernel, whose barriers it does not follow (bench/results/2026-11-24-h200/sanitizer_racecheck.txt).
_SANITIZE = {
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": ("--report-api-errors", "no", "--kernel-name-exclude", "kns=hicache_tma_transfer"),
}
_SANITIZER_ERROR = 9
_SANITIZE_S = 240


@dataclass
class PartOutcome:
    """How a part went: ``good``, ``bad`` or ``skipped``, and why."""

    status: str
    detail: str = ""
    seconds: float = 0.0


def say(text: str, done: float = 0, total: float = 0) -> None:
    """One line of progress."""
    print(f"[{done:.0f}/{total:.0f}] {text}" if total else text, flush=True)


def run_tests(args: argparse.Namespace) -> PartOutcome:
    """``pytest -m gpu``."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *GPU_TESTS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    (args.out / "gpu_tests.txt").write_text(done.stdout, encoding="utf-8")
    print(done.stdout[-3000:], flush=True)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    return PartOutcome("bad" if done.returncode else "good", last)


def run_sanitizer(args: argparse.Namespace) -> PartOutcome:
    """memcheck and racecheck, each on a small write of every backend."""
    if shutil.which(SANITIZER) is None:
        return PartOutcome("skipped", f"{SANITIZER} is not on PATH")
    found = []
    for tool, options in _SANITIZE.items():
        command = [SANITIZER, "--tool", tool, *options, "--error-exitcode", str(_SANITIZER_ERROR)]
        # SGLang's JIT may start compilers; they are not what is checked.
        command += ["--target-processes", "application-only", sys.executable, "-m"]
        command += ["sglang_hicache.bench.lab.small_write", "--model", "Qwen3-8B"]
        # From torch's cache a read beyond a tensor still hits memory that is allocated.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=_SANITIZE_S,
                env=environment,
            )
            output, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            partial = error.stdout or b""
            output = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
            code = 124
        (args.out / f"sanitizer_{tool}.txt").write_text(output, encoding="utf-8")
        print(output[-2500:], flush=True)
        found.append((tool, code))
    bad = [tool for tool, code in found if code]
    return PartOutcome("bad" if bad else "good", ", ".join(f"{tool}: exit {code}" for tool, code in found))


def run_bench(args: argparse.Namespace) -> PartOutcome:
    """The measurements; figures are saved after each case."""
    ask = suite.MeasureOptions(
        measurements=tuple(args.measure or suite.GRIDS),
        cpu=args.cpu,
        only={
            name: given
            for name, given in (
                ("tokens", args.tokens),
                ("models", args.model),
                ("page_sizes", args.page_size),
            )
            if given
        },
        wanted=args.backend,
        options=_options(args.option or ()),
        repeats=args.repeats,
        budget_s=args.budget,
        quick=args.quick,
        stand_ins=tuple(args.forward) if args.forward else None,
        seconds=args.seconds,
    )

    def keep(run: results.Results) -> None:
        results.save(run, args.out)

    run = suite.measure(ask, say, keep)
    written = report.write_all(run, args.out)
    print(tables.markdown(run))
    wrong = [f"{row.contender} in {row.case}: {row.reason}" for row in run.wrong()]
    if wrong:
        return PartOutcome("bad", "; ".join(wrong))
    return PartOutcome("good", f"{len(run.rows)} rows in {', '.join(path.name for path in written)}")


def _options(given: Sequence[str]) -> dict[str, dict[str, int | str]]:
    """``BACKEND.NAME=VALUE`` by backend and name. Checked, so that a typing error measures nothing."""
    found: dict[str, dict[str, int | str]] = {}
    for text in given:
        path, _, value = text.partition("=")
        backend, _, name = path.partition(".")
        number = int(value) if value.isdigit() else value
        spec_of(BACKENDS, backend).check_option(name, number)
        found.setdefault(backend, {})[name] = number
    return found


def run_profile(args: argparse.Namespace) -> PartOutcome:
    """Where the time of one write goes."""
    parts = profile.profile(args.out / "profile.json", cpu=args.cpu)
    return PartOutcome("good", f"{len(parts)} parts")


def run_calibrate(args: argparse.Namespace) -> PartOutcome:
    """Calibration; nothing is installed."""
    plan = ON_CPU if args.cpu else Plan()
    found = calibrate(quicker(plan) if args.quick else plan, cpu=args.cpu, say=say)
    text = found.text()
    if text is not None:
        (args.out / "machine.yaml").write_text(text, encoding="utf-8")
        print(text)
    saved = json.dumps({**found.to_dict(), "policy": text}, indent=1)
    (args.out / "calibration.json").write_text(saved + "\n", encoding="utf-8")
    refused = "; ".join(f"no number for {name}: {why}" for name, why in found.refused.items())
    return PartOutcome("good" if text is not None else "skipped", refused)


RUNS: dict[str, Callable[[argparse.Namespace], PartOutcome]] = {
    "tests": run_tests,
    "sanitize": run_sanitizer,
    "bench": run_bench,
    "profile": run_profile,
    "calibrate": run_calibrate,
}


def main(given: Sequence[str] | None = None) -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--measure", nargs="+", choices=tuple(suite.GRIDS), help="measurements of bench")
    parser.add_argument("--tokens", nargs="+", type=int, help="sizes of write of bench, not each its own")
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), help="models of bench")
    parser.add_argument("--page-size", nargs="+", type=int, help="page sizes of bench")
    parser.add_argument("--backend", nargs="+", choices=names(), help="contenders of bench")
    parser.add_argument("--option", nargs="+", help="BACKEND.NAME=VALUE, such as hybrid.gather_ctas=132")
    parser.add_argument("--forward", nargs="+", help="forwards of interference and sustained, first words")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each loop of sustained")
    parser.add_argument("--budget", type=float, default=300, help="seconds for all measurements of bench")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one or two cases of each measurement")
    parser.add_argument("--cpu", action="store_true", help="try bench, profile, calibrate without a GPU")
    args = parser.parse_args(given)
    if args.cpu and set(args.parts) & {"tests", "sanitize"}:
        parser.error("--cpu goes with --parts bench profile calibrate: tests and sanitize need a GPU")
    missing = gpu_missing()
    if missing is not None and not args.cpu:
        parser.error(f"no GPU: {missing} (--cpu tries bench, profile and calibrate without one)")
    args.out.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(cpu=args.cpu)
    for name, value in environment.items():
        print(f"{name}: {value}", flush=True)
    done: dict[str, PartOutcome] = {}
    for name in args.parts:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        try:
            done[name] = RUNS[name](args)
        except Exception as error:  # the parts after it still run
            traceback.print_exc()
            done[name] = PartOutcome("bad", f"{type(error).__name__}: {error}")
        done[name].seconds = round(time.monotonic() - began, 1)
        print(f"== {name}: {done[name].status} after {done[name].seconds} s: {done[name].detail}", flush=True)
        parts = {each: asdict(part) for each, part in done.items()}
        saved = json.dumps({"environment": environment, "parts": parts}, indent=1)
        (args.out / "suite.json").write_text(saved + "\n", encoding="utf-8")
    return int(any(part.status == "bad" for part in done.values()))


if __name__ == "__main__":
    sys.exit(main())
