"""`hicache-io stress` on a GPU: a server of a planned cell is started, put under load, and stopped.

    python -m sglang_hicache.bench.lab.gpu_stress bytes-kvheavy-page_first-page1 --duration 7m --out DIR

Saves CELL-ARM.json, what `hicache-io stress` saves, and CELL-ARM.log, the server's. Where the cell is
deterministic, every answer must be exact. Exit status: that of `hicache-io stress`.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ...io_backends.registry import AUTO
from ..measure.devices import gpu_missing
from ..serve.arms import ARMS, server_args, server_env
from ..serving import ServerError, ServerProcess
from .gpu_plan import make_room, say
from .gpu_plans import PLANS, host_bytes, kv_bytes_per_token


def main(given: Sequence[str] | None = None) -> int:
    """Run it."""
    cells = {step.name: step for steps in PLANS.values() for step in steps}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cell", choices=tuple(cells), metavar="CELL", help="of gpu_plan --list")
    parser.add_argument("--arm", choices=ARMS, default=AUTO)
    parser.add_argument("--duration", default="5m", help="of load, as hicache-io stress takes it")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/hicache-io-stress"), help="for the model")
    args = parser.parse_args(given)
    missing = gpu_missing()
    if missing is not None:
        parser.error(f"no GPU: {missing} (make stress is the same on SGLang's CPU engine)")
    stress: list[subprocess.Popen[bytes]] = []

    def stop(*_: object) -> None:
        """The load ends early and saves what it has; the server is stopped on the way out."""
        if not stress:
            sys.exit(143)
        stress[0].terminate()

    signal.signal(signal.SIGTERM, stop)
    args.out.mkdir(parents=True, exist_ok=True)
    step = cells[args.cell]
    cell = step.cell(args.work / "models")
    config = json.loads((Path(cell.model.path) / "config.json").read_text(encoding="utf-8"))
    make_room(host_bytes(step, kv_bytes_per_token(config)), say)
    name = f"{args.cell}-{args.arm}"
    options = server_args(cell, args.arm)
    env = server_env(args.arm, args.work / "plug-ins")
    say(f"{name}: starting a server: {' '.join(options)}")
    try:
        with ServerProcess(options, log=args.out / f"{name}.log", env=env, start_timeout_s=400) as server:
            say(f"{name}: up after {server.start_s:.0f} s; load of {args.duration}")
            command = [sys.executable, "-c", "from sglang_hicache.bench import cli; cli.main()", "stress"]
            command += [server.url, "--duration", args.duration, "--out", str(args.out / f"{name}.json")]
            command += ["--tie", "0"] if cell.deterministic else []
            stress.append(subprocess.Popen(command))
            return stress[0].wait()
    except ServerError as error:
        say(f"{name}: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
