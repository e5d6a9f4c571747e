"""`hicache-io stress` on a GPU: a server of a planned cell is started, put under load, and stopped.

    python -m sglang_hicache.bench.lab.gpu_stress bytes-kvheavy-page_first-page1 --duration 7m --out DIR

Saves CELL-ARM.json, what `hicache-io stress` saves, and CELL-ARM.log, the server's. Where the cell is
deterministic, every answer must be exact. Exit status: that of `hicache-io stress`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

from ..serving import ServerError
from .cell_server import name_of, need_gpu, parser_of, server_of
from .gpu_plan import say


def main(given: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = parser_of(__doc__)
    parser.add_argument("--duration", default="5m", help="of load, as hicache-io stress takes it")
    args = parser.parse_args(given)
    need_gpu(parser)
    stress: list[subprocess.Popen[bytes]] = []

    def stop(*_: object) -> None:
        """The load ends early and saves what it has; the server is stopped on the way out."""
        if not stress:
            sys.exit(143)
        stress[0].terminate()

    signal.signal(signal.SIGTERM, stop)
    name = name_of(args)
    try:
        with server_of(args) as (cell, server):
            say(f"{name}: load of {args.duration}")
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
