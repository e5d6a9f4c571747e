"""A long stress test of every backend without a GPU: real servers on SGLang's CPU engine, one by one.

``python -m sglang_hicache.bench.stress.on_cpu_engine --duration 5m --out bench/results/DATE-cpu-stress``,
from a checkout. What it saves is marked as the CPU engine's: it shows right bytes and endurance, no speed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ...io_backends.registry import AUTO, OWN_NAMES
from .. import serving, tiny_model
from ..demo.output import console


def main(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where BACKEND.json goes.")],
    backend: Annotated[
        list[str] | None, typer.Option(help="May be repeated; all of this project's, and auto, by default.")
    ] = None,
    duration: Annotated[str, typer.Option(metavar="TIME", help="For each backend.")] = "5m",
    cache: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the tiny model is kept between runs.")
    ] = Path(".demo"),
    pool_tokens: Annotated[int, typer.Option(min=1024, help="Capacity of the device pool.")] = 4096,
) -> None:
    """Exit status 0: every backend survived with right outputs; 1: one did not."""
    out.mkdir(parents=True, exist_ok=True)
    # Servers are stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    env = {**serving.cpu_engine_env(cache / "libcuda"), **tiny_model.environment()}
    model = tiny_model.write(cache / "tiny-llama")
    bad = []
    with tempfile.TemporaryDirectory(prefix="hicache-stress-") as logs:
        for name in backend or [*OWN_NAMES, AUTO]:
            options = serving.base_args(
                model, cpu_engine=True, max_total_tokens=pool_tokens, hicache=serving.HiCache(name)
            )
            log = Path(logs, f"{name}.log")
            console.print(f"{name}: starting a server")
            with serving.ServerProcess(options, log=log, env=env) as server:
                command = [str(Path(sysconfig.get_path("scripts"), "hicache-io")), "stress", server.url]
                done = subprocess.run(
                    [*command, "--duration", duration, "--out", str(out / f"{name}.json")], check=False
                )
            if done.returncode != 0:
                bad.append(name)
                console.print("\n".join(serving.log_tail(log)))
    if bad:
        console.print(f"Bad: {', '.join(bad)}.", style="bold red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
