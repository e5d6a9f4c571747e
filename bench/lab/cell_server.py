"""One server of a planned cell on this machine's GPU, for a script that loads it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...io_backends.registry import AUTO
from ..measure.devices import gpu_missing
from ..serve.arms import ARMS, Cell, server_args, server_env
from ..serving import ServerProcess
from .gpu_plan import make_room, say
from .gpu_plans import PLANS, host_bytes, kv_bytes_per_token

_CELLS = {step.name: step for steps in PLANS.values() for step in steps}


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """Options of each such script: the cell, ``--arm``, ``--out`` and ``--work``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", choices=tuple(_CELLS), metavar="CELL", help="of gpu_plan --list")
    parser.add_argument("--arm", choices=ARMS, default=AUTO)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/hicache-io-server"), help="for the model")
    return parser


def need_gpu(parser: argparse.ArgumentParser) -> None:
    """Exits where there is none."""
    missing = gpu_missing()
    if missing is not None:
        parser.error(f"no GPU: {missing}")


@contextmanager
def server_of(args: argparse.Namespace) -> Iterator[tuple[Cell, ServerProcess]]:
    """The cell and its server, which is up; OUT/CELL-ARM.log is its log.

    Args:
        args: of :func:`parser_of`.

    Raises:
        ServerError: it did not come up.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    step = _CELLS[args.cell]
    cell = step.cell(args.work / "models")
    config = json.loads((Path(cell.model.path) / "config.json").read_text(encoding="utf-8"))
    make_room(host_bytes(step, kv_bytes_per_token(config)), say)
    name = name_of(args)
    options = server_args(cell, args.arm)
    say(f"{name}: starting a server: {' '.join(options)}")
    env = server_env(args.arm, args.work / "plug-ins")
    with ServerProcess(options, log=args.out / f"{name}.log", env=env, start_timeout_s=400) as server:
        say(f"{name}: up after {server.start_s:.0f} s")
        yield cell, server


def name_of(args: argparse.Namespace) -> str:
    """Of files: the cell's and the arm's."""
    return f"{args.cell}-{args.arm}"
