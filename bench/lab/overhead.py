"""What the plug-in costs a server that does not use it: one with it, one without, HiCache off in both.

``python -m sglang_hicache.bench.lab.overhead --out FILE`` starts both on SGLang's CPU engine, where they take
turns under the same load (`hicache-io stress --compare`), so that whatever drifts meanwhile hits both alike.
The difference is judged against the spread of the turns. The figures say nothing about a GPU.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .. import serving, tiny_model
from ..demo.output import console

WITH, WITHOUT = "with the plug-in", "without"

WARM_UP_WAVES = 2
"""The first wave is half as large as the others, and has no prompt that was asked before."""

_PLUGIN_MODULE = "sglang_hicache.io_backends.sglang.plugin"

LEFT_OUT = {"SGLANG_PLUGINS": "none"}
"""SGLang then loads only a plug-in of that name, and there is none."""


def main(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go, as JSON.")],
    waves: Annotated[int, typer.Option(min=6, help="Turns of each server, the warm-up included.")] = 26,
    cache: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the tiny model is kept between runs.")
    ] = Path(".demo"),
) -> None:
    """Exit status 0: the difference is within the noise; 1: it is not, or a server failed."""
    # Servers are stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    env = {**serving.cpu_engine_env(cache / "libcuda"), **tiny_model.environment()}
    # An idle scheduler would keep a core busy beside the other server.
    options = [*serving.base_args(tiny_model.write(cache / "tiny-llama"), cpu_engine=True), "--sleep-on-idle"]
    with tempfile.TemporaryDirectory(prefix="hicache-overhead-") as folder:
        envs = {WITH: env, WITHOUT: {**env, **LEFT_OUT}}
        loads = {name: _loads_plugin(given) for name, given in envs.items()}
        if loads != {WITH: True, WITHOUT: False}:
            console.print(f"whether SGLang loads the plug-in: {loads}; is it installed here?", style="red")
            raise typer.Exit(1)
        console.print("starting two servers")
        with (
            serving.ServerProcess(options, log=Path(folder, "with.log"), env=envs[WITH]) as first,
            serving.ServerProcess(options, log=Path(folder, "without.log"), env=envs[WITHOUT]) as second,
        ):
            result = _compared(first.url, second.url, waves, Path(folder, "stress.json"))
    figures = {name: _figures(server["waves"]) for name, server in zip(envs, result["servers"], strict=True)}
    good = result["ok"] and all(
        within_noise(figures[WITH][kind], figures[WITHOUT][kind]) for kind in figures[WITH]
    )
    out.write_text(
        json.dumps({"ok": good, "figures": figures, "warm_up_waves": WARM_UP_WAVES, "run": result}, indent=1)
        + "\n",
        encoding="utf-8",
    )
    console.print(_table(figures))
    console.print(
        "Within the noise." if good else "The difference is more than the noise, or a server failed."
    )
    if not good:
        raise typer.Exit(1)


def _loads_plugin(env: Mapping[str, str]) -> bool:
    """Whether SGLang loads the plug-in in a process with these variables."""
    code = (
        "import sys; from sglang.srt.plugins import load_plugins; load_plugins(); print('\\n', *sys.modules)"
    )
    ask = [sys.executable, "-c", code]
    said = subprocess.run(ask, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True, check=True)
    return _PLUGIN_MODULE in said.stdout.split()


def _compared(first: str, second: str, waves: int, out: Path) -> dict[str, Any]:
    command = [str(Path(sysconfig.get_path("scripts"), "hicache-io")), "stress", first, "--compare", second]
    subprocess.run([*command, "--waves", str(waves), "--out", str(out)], check=False)
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


def _figures(waves: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """One figure a turn, in the order of the turns."""
    counted = waves[WARM_UP_WAVES:]
    return {
        "requests_per_s": [round(wave["requests"] / wave["seconds"], 3) for wave in counted],
        "request_p50_s": [wave["request_p50_s"] for wave in counted],
    }


def within_noise(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the median of the turns' differences could be noise.

    Turns are compared in pairs (the same wave, one right after the other). The median difference counts as
    noise when zero is between the quartiles of the differences: of 24 pairs, at least 6 on either side. Were
    there no difference at all, that would fail once in 150 times (a sign test).
    """
    low, _, high = statistics.quantiles([a - b for a, b in zip(first, second, strict=True)], n=4)
    return low <= 0 <= high


def _table(figures: dict[str, dict[str, list[float]]]) -> Table:
    table = Table(title="HiCache off, SGLang's CPU engine: median of turns (quartiles)", box=SIMPLE_HEAD)
    table.add_column("")
    table.add_column("requests a second", justify="right")
    table.add_column("request p50, ms", justify="right")
    for name, kinds in figures.items():
        table.add_row(
            name, _spread(kinds["requests_per_s"], 1), _spread([1000 * s for s in kinds["request_p50_s"]], 1)
        )
    return table


def _spread(values: Sequence[float], digits: int) -> str:
    low, median, high = (f"{value:.{digits}f}" for value in statistics.quantiles(values, n=4))
    return f"{median} ({low} to {high})"


if __name__ == "__main__":
    typer.run(main)
