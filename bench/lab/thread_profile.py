"""Where the scheduler's thread spends a write in a whole server, by SGLang's own profiler.

    python -m sglang_hicache.bench.lab.thread_profile kvheavy-page64 --workload prefill --out DIR

A server of a planned cell is started, warmed up and loaded, and profiled for some forwards. Saves CELL-ARM
and the rank in a .trace.json.gz, as SGLang writes it (for a trace viewer), and CELL-ARM.json: for each kind
of call of this project's hooks how often it was made, how long it took, and what of that each function of
Python, each call of CUDA and each operator took itself. The profiler makes Python slower than it is, calls
of CUDA hardly: their parts, and how many there are, are what this is for.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..measure.environment import describe_environment
from ..saved import write_json
from ..serve import workloads
from ..serve.load import ask
from ..serving import ServerError, ServerProcess, open_url
from .cell_server import name_of, need_gpu, parser_of, server_of
from .gpu_plan import say

HOOKS = ("_around_submit", "_around_move", "_before_run_batch")
"""Functions of ``scheduler_hooks`` that SGLang's scheduler thread comes through."""

_HOOKS_FILE = "scheduler_hooks.py"
_PYTHON = re.compile(r"(?:.*[/\\])?([^/\\]+)\((\d+)\): (.+)")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_SHOWN = 16
LIMIT_S = 120
"""Seconds for one load, and for its trace to be written."""


@dataclass(frozen=True)
class FunctionTime:
    """What one function takes of a hook's calls.

    Attributes:
        name: ``file.py: function``, or the name of a call of CUDA or of an operator.
        calls: of it, for each call of the hook.
        self_us: time in it and in none that it calls, for each call of the hook.
    """

    name: str
    calls: float
    self_us: float


@dataclass(frozen=True)
class HookTime:
    """The calls of one hook in a trace, microseconds.

    Attributes:
        hook: its name.
        calls: how many.
        median_us, most_us: of a call.
        parts: of all calls, the longest first.
    """

    hook: str
    calls: int
    median_us: float
    most_us: float
    parts: tuple[FunctionTime, ...]


@dataclass
class _Call:
    name: str
    end: float
    took: float
    inside: float = 0.0
    """Of calls from it."""


def hook_times(events: Iterable[Mapping[str, Any]]) -> list[HookTime]:
    """Of a Chrome trace's events, as torch writes them: complete ones (``ph`` X), in microseconds."""
    threads: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in _CATEGORIES:
            threads.setdefault((event["pid"], event["tid"]), []).append(event)
    found: dict[str, list[float]] = {hook: [] for hook in HOOKS}
    parts: dict[str, dict[str, list[float]]] = {hook: {} for hook in HOOKS}
    for each in threads.values():
        _one_thread(each, found, parts)
    return [
        HookTime(
            hook,
            len(took),
            median(took),
            max(took),
            tuple(
                sorted(
                    (
                        FunctionTime(name, len(own) / len(took), sum(own) / len(took))
                        for name, own in parts[hook].items()
                    ),
                    key=lambda part: -part.self_us,
                )
            ),
        )
        for hook, took in found.items()
        if took
    ]


_CATEGORIES = frozenset({"python_function", "cuda_runtime", "cuda_driver", "cpu_op", "user_annotation"})


def _one_thread(
    events: list[Mapping[str, Any]], found: dict[str, list[float]], parts: dict[str, dict[str, list[float]]]
) -> None:
    """Walk one thread's calls, which lie inside each other."""
    stack: list[_Call] = []
    hook, depth = "", 0  # the outermost one that this is inside of, and how deep it lies

    def leave() -> None:
        nonlocal hook
        call = stack.pop()
        if hook:
            parts[hook].setdefault(call.name, []).append(call.took - call.inside)
            hook = hook if len(stack) > depth else ""

    for event in sorted(events, key=lambda each: (float(each["ts"]), -float(each["dur"]))):
        begin, took = float(event["ts"]), float(event["dur"])
        while stack and stack[-1].end <= begin:
            leave()
        name, is_hook = _named(event)
        if stack:
            stack[-1].inside += took
        if not hook and is_hook is not None:
            hook, depth = is_hook, len(stack)
            found[hook].append(took)
        stack.append(_Call(name, begin + took, took))
    while stack:
        leave()


def _named(event: Mapping[str, Any]) -> tuple[str, str | None]:
    """What to call an event, and the hook that it is."""
    name = _ADDRESS.sub("", str(event["name"]))
    python = _PYTHON.fullmatch(name) if event["cat"] == "python_function" else None
    if python is None:
        return name, None
    file, _, function = python.groups()
    hook = function if file == _HOOKS_FILE and function in HOOKS else None
    return f"{file}: {function}", hook


def text(times: Sequence[HookTime]) -> str:
    """A table for each hook."""
    lines = []
    for each in times:
        lines.append(
            f"{each.hook}: {each.calls:,} calls, median {each.median_us:,.0f} us, "
            f"most {each.most_us:,.0f} us; of a call:"
        )
        lines += [
            f"  {part.self_us:8,.1f} us  {part.calls:6,.1f} calls  {part.name[:52]}"
            for part in each.parts[:_SHOWN]
        ]
    return "\n".join(lines)


def read(trace: Path) -> list[HookTime]:
    """Of a file that SGLang wrote."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        return hook_times(json.load(file)["traceEvents"])


def profiled(
    server: ServerProcess,
    load: workloads.Workload,
    out: Path,
    prefix: str,
    *,
    steps: int,
    activities: Sequence[str] = ("CPU", "GPU"),
) -> Path:
    """Profile ``steps`` forwards of a server under load. Returns the first rank's trace.

    Args:
        server: that is up.
        load: asked meanwhile.
        out: for the trace.
        prefix: of its name.
        steps: forwards.
        activities: of SGLang's profiler; with ``CPU``, Python's functions too.

    Raises:
        ServerError: the server would not, or wrote none.
    """
    wanted = {
        "output_dir": str(out.resolve()),
        "num_steps": steps,
        "activities": list(activities),
        "with_stack": "CPU" in activities,
        "profile_prefix": prefix,
    }
    with open_url(server.url + "/start_profile", method="POST", body=wanted, timeout_s=LIMIT_S) as answer:
        answer.read()
    asyncio.run(ask(server.url, load, limit_s=LIMIT_S))
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        for trace in sorted(out.glob(f"{prefix}-*TP-0*.trace.json.gz")):
            try:
                read(trace)
            except (EOFError, OSError, ValueError):  # it is being written
                continue
            return trace
        time.sleep(1)
    raise server.error("profile", f"no trace of {steps} forwards within {LIMIT_S} s")


def main(given: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = parser_of(__doc__)
    parser.add_argument("--workload", choices=workloads.NAMES, default="prefill")
    parser.add_argument("--steps", type=int, default=40, help="forwards that are profiled")
    args = parser.parse_args(given)
    need_gpu(parser)
    name = name_of(args)
    try:
        with server_of(args) as (cell, server):
            make = workloads.maker(args.workload)
            for number in (1_000_000, 0):
                load = make(cell.pool_tokens, cell.model.vocab_size, number)
                if number:
                    asyncio.run(ask(server.url, load, limit_s=LIMIT_S))
            say(f"{name}: profiling {args.steps} forwards")
            times = read(profiled(server, load, args.out, name, steps=args.steps))
    except ServerError as error:
        say(f"{name}: {error}")
        return 2
    print(text(times))
    saved = {"environment": describe_environment(cpu=False), "hooks": [asdict(each) for each in times]}
    write_json(args.out / f"{name}.json", saved)
    return 0


if __name__ == "__main__":
    sys.exit(main())
