"""SGLang's profiler on one server of a planned cell under load, for a script that reads its trace."""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..serve import workloads
from ..serve.load import ask
from ..serving import ServerProcess, open_url
from .cell_server import name_of, parser_of, server_of
from .gpu_plan import say

LIMIT_S = 120
"""Seconds for one load, and for its trace to be written."""


def profile_parser(about: str | None, steps: int) -> argparse.ArgumentParser:
    """Options of each such script: those of :func:`~.cell_server.parser_of`, and the load and its length."""
    parser = parser_of(about)
    parser.add_argument("--workload", choices=workloads.NAMES, default="prefill")
    parser.add_argument("--steps", type=int, default=steps, help="forwards that are profiled")
    return parser


def events_of(args: argparse.Namespace, activities: Sequence[str]) -> list[dict[str, Any]]:
    """Start the cell's server, warm it up, profile it under load. Returns the trace's events.

    Args:
        args: of :func:`profile_parser`.
        activities: see :func:`profiled`.

    Raises:
        ServerError: it did not come up, or wrote no trace.
    """
    name = name_of(args)
    with server_of(args) as (cell, server):
        make = workloads.maker(args.workload)
        warm_up, load = (make(cell.pool_tokens, cell.model.vocab_size, seed) for seed in (1_000_000, 0))
        asyncio.run(ask(server.url, warm_up, limit_s=LIMIT_S))
        say(f"{name}: profiling {args.steps} forwards")
        return read(profiled(server, load, args.out, name, steps=args.steps, activities=activities))


def read(trace: Path) -> list[dict[str, Any]]:
    """The events of a file that SGLang wrote."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


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
