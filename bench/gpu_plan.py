"""A named list of cells, run on a machine that is lent for minutes: whole servers under load.

    python -m sglang_hicache.bench.gpu_plan first --out DIR --budget 480
    python -m sglang_hicache.bench.gpu_plan --list

What was measured is saved after each turn of each server, so that nothing is lost when the machine goes away:
NAME.json, and at the end of each cell NAME.csv, NAME.md, NAME.html and NAME-logs.tar.gz. A cell that fails is
a line in them; the next one is run. With ``--rehearse`` the same plan runs on SGLang's CPU engine with a tiny
model: it shows that the plan runs, and no speed. Exit status 1 if something was wrong, or nothing measured.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_hicache.bench import damaged
from sglang_hicache.bench.measure.devices import gpu_missing
from sglang_hicache.bench.measure.environment import describe
from sglang_hicache.bench.serve import models, report, result, run
from sglang_hicache.bench.serve.arms import CPU_PAGE, CPU_POOL_TOKENS, NONE, Cell, unserved

FA3 = ("--attention-backend", "fa3")
GRAPHS = ("--cuda-graph-max-bs-decode", "32")
"""No workload has more requests in flight; the start is shorter."""

_GIB = 2**30
_SGLANG_RESERVE = 10 * _GIB
"""Host memory that SGLang leaves free (``HICACHE_HOST_MEMORY_RESERVE_BYTES`` of 0.5.23)."""
_SERVER_BYTES = 5 * _GIB
"""Host memory of a server without a host pool, about."""
_MOST_TOUCHED = 100 * _GIB
"""A machine with one GPU has 128 GiB; touching more than it has would end this process."""


@dataclass(frozen=True)
class Step:
    """A cell of a plan.

    Attributes:
        name: of the cell.
        arms, workloads, rounds, at_once: see `run.Ask`.
        model: a name of `models.NAMES`.
        page_size, layout, pool_tokens, ratio, tp, deterministic: see `Cell`.
        options: of every server.
    """

    name: str
    arms: Sequence[str]
    workloads: Sequence[str] = ("chat", "prefill")
    rounds: int = 2
    at_once: int = 8
    model: str = models.HEAVY
    page_size: int = 64
    layout: str = "page_first"
    # Four host pools of a third of 128 GiB of host memory would not leave room for the servers themselves.
    pool_tokens: int = 49_152
    ratio: float = 3.0
    tp: int = 1
    deterministic: bool = False
    options: tuple[str, ...] = field(default=FA3 + GRAPHS)

    def cell(self, folder: Path) -> Cell:
        """The cell, its model written below ``folder``."""
        return Cell(
            self.name,
            models.make(self.model, folder),
            page_size=self.page_size,
            mem_layout=self.layout,
            pool_tokens=self.pool_tokens,
            ratio=self.ratio,
            tp=self.tp,
            deterministic=self.deterministic,
            more=self.options,
        )

    def rehearsal(self) -> Step:
        """The same step on the CPU engine: small, and without the arms that need CUDA."""
        return replace(
            self,
            arms=[arm for arm in self.arms if unserved(arm, cpu=True) is None],
            rounds=min(self.rounds, 2),
            model=models.TINY,
            page_size=self.page_size if self.page_size == 1 else CPU_PAGE,
            pool_tokens=CPU_POOL_TOKENS,
            tp=1,
            options=(),
        )


LIMIT = ("none", "kernel", "direct", "auto", "null")
OURS = ("fenced_kernel", "copy_engine", "hybrid")


def _by_page(name: str, pages: Sequence[int], step: Step) -> list[Step]:
    return [replace(step, name=f"{name}-page{page}", page_size=page) for page in pages]


PLANS: dict[str, list[Step]] = {
    "first": _by_page("kvheavy", (1, 64), Step("", LIMIT)),
    # The pool and the load of shared/gpu_servers; host memory for three host pools at a time.
    "as-by-hand": _by_page(
        "kvheavy",
        (1, 64),
        Step(
            "",
            ("none", "kernel", "auto", "null", "direct"),
            at_once=4,
            pool_tokens=65_536,
            workloads=("chat",),
        ),
    ),
    "workloads": _by_page(
        "kvheavy", (1, 64), Step("", ("none", "kernel", "auto", "null"), workloads=("shared", "decode"))
    ),
    "backends": _by_page("kvheavy", (1, 64), Step("", ("kernel", *OURS), workloads=("chat", "prefill"))),
    "layouts": [
        Step(f"kvheavy-{layout}-page{page}", arms, ("chat", "prefill"), page_size=page, layout=layout)
        for layout, arms in (
            ("layer_first", ("none", "kernel", "auto", "null")),
            ("page_first_direct", ("none", "direct", "auto", "null")),
        )
        for page in (1, 64)
    ],
    "attention": [
        Step(
            f"kvheavy-{name}-page{page}",
            ("none", "kernel", "auto", "null"),
            page_size=page,
            options=options + GRAPHS,
        )
        for name, options in (
            ("triton", ("--attention-backend", "triton")),
            ("flashinfer", ("--attention-backend", "flashinfer")),
            (
                "fa3-flashinfer",
                ("--prefill-attention-backend", "fa3", "--decode-attention-backend", "flashinfer"),
            ),
        )
        for page in (1, 64)
    ],
    # 17 GB of weights each: two at once beside their pools on 80 GB.
    "qwen": _by_page(
        "qwen3-8b",
        (1, 64),
        Step("", ("none", "kernel", "auto", "null"), at_once=2, model="qwen3-8b", workloads=("chat",)),
    ),
    "mla": [
        *_by_page("mlaheavy", (1, 64), Step("", LIMIT, model=models.MLA)),
        # Experts as the original has: 31 GB of weights each.
        *_by_page(
            "deepseek-v2-lite",
            (1, 64),
            Step("", ("none", "kernel", "auto", "null"), at_once=2, model="deepseek-v2-lite"),
        ),
    ],
    "tp2": _by_page("kvheavy-tp2", (1, 64), Step("", LIMIT, tp=2)),
    "bytes": [
        Step(
            f"bytes-{model}-{layout}-page{page}",
            (NONE, "auto", *OURS, damaged.NAME),
            ("chat",),
            rounds=1,
            model=model,
            page_size=page,
            layout=layout,
            pool_tokens=16_384,
            deterministic=True,
        )
        for model, layout in (
            (models.HEAVY, "page_first"),
            (models.MLA, "page_first"),
            (models.HEAVY, "layer_first"),
            (models.HEAVY, "page_first_direct"),
            (models.MLA, "layer_first"),
            (models.MLA, "page_first_direct"),
        )
        for page in (1, 64)
    ],
}
"""By name. A step's servers start together; each is loaded alone."""


def kv_bytes_per_token(config: Mapping[str, Any]) -> int:
    """Bytes of bfloat16 KV cache of one token, from a model's config.json."""
    layers = int(config["num_hidden_layers"])
    if config.get("kv_lora_rank"):
        return 2 * layers * (int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"]))
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    return 2 * 2 * layers * int(config.get("num_key_value_heads") or heads) * width


def host_bytes(step: Step, token_bytes: int) -> int:
    """Host memory that the servers of a step need at most, together."""
    most = 0
    for together in run.groups(step.arms, step.at_once):
        pools = sum(arm != NONE for arm in together)
        pool = int(step.pool_tokens * step.ratio * token_bytes)
        most = max(most, pools * pool + len(together) * _SERVER_BYTES)
    return most + _SGLANG_RESERVE


def make_room(wanted: int, say: run.Say) -> None:
    """Touch memory until ``wanted`` bytes are available: a machine may start with little and grow with use.

    SGLang refuses a host pool that is larger than what is available at that moment.
    """
    import psutil

    wanted = min(wanted, _MOST_TOUCHED)
    have = psutil.virtual_memory().available
    if have >= wanted:
        return
    say(f"touching {wanted / _GIB:.0f} GiB of host memory: {have / _GIB:.0f} GiB are available")
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
    say(f"{have / _GIB:.0f} GiB are available after {time.monotonic() - began:.0f} s")


def run_plan(name: str, steps: Sequence[Step], out: Path, work: Path, budget_s: float, *, cpu: bool) -> bool:
    """Run the steps as far as the time allows; returns whether all is well.

    Args:
        name: of the plan, and of the files.
        steps: its cells.
        out: where the files go.
        work: for models and logs.
        budget_s: for all of it.
        cpu: on SGLang's CPU engine.
    """
    clock = run.Clock(budget_s)
    out.mkdir(parents=True, exist_ok=True)
    found = result.Result(describe(cpu=cpu))
    result.save(found, out, name)
    ok = True
    for step in steps:
        say(f"== {step.name}: {', '.join(step.arms)}; {clock.left_s():.0f} s left")
        if clock.left_s() < 20:
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

            given = run.Ask(step.arms, step.workloads, step.rounds, step.at_once, logs)
            save(run.run_cell(cell, given, clock, say, save))
        except Exception:  # the steps after it still run
            traceback.print_exc()
            ok = False
        _pack_logs(logs, out / f"{name}-logs.tar.gz")
        try:
            report.write_all(found, out, name, single_pictures=False)
        except Exception:  # the JSON is there, and a report can be made of it later
            traceback.print_exc()
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
    if args.arm:
        steps = [replace(step, arms=[arm for arm in step.arms if arm in args.arm]) for step in steps]
    if args.rounds:
        steps = [replace(step, rounds=args.rounds) for step in steps]
    if args.rehearse:
        steps = [step.rehearsal() for step in steps]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped on the way out
    ok = run_plan(args.plan, steps, args.out, args.work, args.budget, cpu=args.rehearse)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
