"""Where the scheduler's thread spends a write in a whole server, by SGLang's own profiler.

    python -m sglang_hicache.bench.lab.thread_profile kvheavy-page64 --workload prefill --out DIR

A server of a planned cell is started, warmed up and loaded, and profiled for some forwards. Saves CELL-ARM
and the rank in a .trace.json.gz, as SGLang writes it (for a trace viewer), and CELL-ARM.json: for each kind
of call of this project's hooks how often it was made, how long it took, and what of that each function of
Python, each call of CUDA and each operator took itself. The profiler makes Python slower than it is, calls
of CUDA hardly: their parts, and how many there are, are what this is for.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ..measure.environment import describe_environment
from ..saved import write_json
from ..serving import ServerError
from .cell_server import name_of, need_gpu
from .gpu_plan import say
from .profiled_server import events_of, profile_parser

HOOKS = ("_around_submit", "_around_move", "_before_run_batch")
"""Functions of ``scheduler_hooks`` that SGLang's scheduler thread comes through."""

_HOOKS_FILE = "scheduler_hooks.py"
_PYTHON = re.compile(r"(?:.*[/\\])?([^/\\]+)\((\d+)\): (.+)")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_SHOWN = 16


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


def main(given: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = profile_parser(__doc__, steps=40)
    args = parser.parse_args(given)
    need_gpu(parser)
    name = name_of(args)
    try:
        times = hook_times(events_of(args, ("CPU", "GPU")))
    except ServerError as error:
        say(f"{name}: {error}")
        return 2
    print(text(times))
    saved = {"environment": describe_environment(cpu=False), "hooks": [asdict(each) for each in times]}
    write_json(args.out / f"{name}.json", saved)
    return 0


if __name__ == "__main__":
    sys.exit(main())
