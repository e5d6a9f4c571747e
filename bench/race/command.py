"""`hicache-io race`: SGLang's cache and write-back on a virtual GPU, and the races that no fence orders."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ...io_backends.policy_files import policy_in_force
from ...io_backends.registry import AUTO, BACKENDS, UPSTREAM_NAMES
from ...io_backends.sglang.diagnose.serving import refusal
from ...io_backends.sglang.handover.machine_facts import detect
from ...io_backends.sglang.no_gpu import fake_libcuda
from ...io_backends.sglang.versions import INSTALL
from ...policy import completion
from ...policy.decide import Decision, check_backend, decide
from ...policy.fact_table import CONDITIONS
from ...policy.facts import Facts
from ...policy.format.errors import PolicyError
from ...policy.names import ATTENTION_BACKENDS, KV_KINDS, NameProblem, check_name
from ...policy.terminal import console as console_of
from ...policy.terminal import working
from ...policy.text import answer, say
from ..explain.shared import typed_fact
from ..outputs import check_file, refuse, result_console
from .kept_fences import KeptFences

_SGLANG_PATH = "HICACHE_IO_RACE_SGLANG_PATH"
"""What --sglang-path was, for the process that it starts: the command that it suggests names it."""


_PICTURES = (".png", ".svg", ".pdf")

_ATTENTION = completion.one_of(ATTENTION_BACKENDS)

MODES = (
    "overlap",
    "pipeline",
    "synchronize",
    "offload",
    "retraction",
    "no-overlap",
    "speculative",
    "states",
)
"""Of `simulation.modes`, which imports torch."""
LAYOUTS = ("layer_first", "page_first", "page_first_direct")
"""Of `simulation.setups`, which imports torch."""

DEFAULTS = {"attention_backend": "fa3", "gpu_arch": "sm90", "kv_kind": "mha", "device": "cuda"}
"""The setup that crashed (#20611), where nothing else is said."""


def race(
    fences: Annotated[
        KeptFences,
        typer.Option(
            help="auto: what the policy decides. none, producer: leave out fences, to see what they are for; "
            "both: every forward waits."
        ),
    ] = KeptFences.auto,
    backend: Annotated[
        str,
        typer.Option(
            help="Who writes back: ours, auto, or SGLang's own kernel or direct, untouched.",
            autocompletion=completion.one_of((AUTO, *BACKENDS, "kernel", "direct")),
        ),
    ] = AUTO,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"How the server runs forwards and asks for writes: {MODES[0]} (if nothing is said), "
            f"{', '.join(MODES[1:])}; several, or all.",
            show_default=False,
            autocompletion=completion.one_of((*MODES, "all")),
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many orders and workloads to try.")] = 200,
    seed: Annotated[int | None, typer.Option(min=0, help="Replay this one alone.")] = None,
    program: Annotated[
        str | None,
        typer.Option(
            metavar="ACTIONS", help="What happens, instead of each seed's own, as a test printed it."
        ),
    ] = None,
    attention_backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="fa3 if nothing is said.",
            show_default=False,
            autocompletion=_ATTENTION,
        ),
    ] = None,
    prefill_attention_backend: Annotated[
        str | None, typer.Option(metavar="NAME", autocompletion=_ATTENTION)
    ] = None,
    decode_attention_backend: Annotated[
        str | None, typer.Option(metavar="NAME", autocompletion=_ATTENTION)
    ] = None,
    gpu_arch: Annotated[
        str | None,
        typer.Option(
            metavar="ARCH",
            help="sm90 if nothing is said.",
            show_default=False,
            autocompletion=completion.one_of(completion.ARCHITECTURES),
        ),
    ] = None,
    mem_layout: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            help="Of the host pool; page_first if nothing is said.",
            autocompletion=completion.one_of(LAYOUTS),
        ),
    ] = None,
    page_size: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Tokens in a page; 1 if nothing is said.")
    ] = None,
    kv_kind: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="mha (if nothing is said) or mla.",
            autocompletion=completion.one_of(KV_KINDS),
        ),
    ] = None,
    policy: Annotated[str | None, typer.Option(metavar="FILE", help="A policy file, for auto.")] = None,
    sglang_path: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Another SGLang than the installed one: a folder that holds sglang/."
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a timeline of one step (a model) for Perfetto, as JSON."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw that timeline, this project's backends side by side."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Look for missing fences, without a GPU: SGLang's own cache and pools on a virtual device.

    A modelled scheduler, its forwards, writes and loads, in many orders; every row is checked.
    What is drawn or traced takes its times from a cost model, not from a measurement.

    Exit status 0: no race and every row right; 1: there are some; 2: the input is wrong.
    """
    given = {
        "attention_backend": attention_backend,
        "prefill_attention_backend": prefill_attention_backend,
        "decode_attention_backend": decode_attention_backend,
        "gpu_arch": gpu_arch,
        "mem_layout": mem_layout,
        "page_size": page_size,
        "kv_kind": kv_kind,
    }
    if sglang_path is not None:
        raise typer.Exit(_with_sglang(sglang_path))
    facts, decision = _decide(given, backend, fences, policy)
    check_file("--trace", trace)
    check_file("--plot", plot)
    if plot is not None and plot.suffix not in _PICTURES:
        _refuse(f"--plot {plot}: name a file that ends in one of {', '.join(_PICTURES)}")
    with working("importing SGLang's cache"):
        _check_libraries(plot)
    from . import result as race_result
    from .simulation import setups, workload
    from .simulation.experiment import left_out
    from .simulation.published import SIMULATED, published

    version_ = published().version.partition("+")[0]
    if version_ not in SIMULATED:
        _refuse(f"SGLang {published().version} is not simulated; these are: {', '.join(SIMULATED)}")
    modes = _modes(mode, version_, str(facts.value("mem_layout")))
    try:
        actions = None if program is None else workload.from_text(program)
    except ValueError as error:
        _refuse(str(error))
    own = decision.backend in UPSTREAM_NAMES
    progress = console_of(stderr=True)
    progress.print(f"{published()}. Virtual device; no GPU is used.")
    result = race_result.RaceResult()
    chosen = range(seeds) if seed is None else [seed]
    for name in modes:
        experiment = setups.experiment(
            facts, None if own else decision, fences, decision.backend if own else "kernel", name
        )
        began = time.monotonic()
        with working(f"mode {name}") as tell:
            for count, each in enumerate(chosen):
                tell(f"{count} of {len(chosen)} seeds")
                result.add(experiment.run(each, left_out(fences), actions), name)
        result.seconds += time.monotonic() - began
    if not own and result.writes and not result.served_writes:
        _refuse(
            f"{backend} served none of {result.writes:,} writes: SGLang copied this pool itself, and nothing "
            "is known of the backend; choose a --mem-layout, --page-size or --kv-kind that it serves"
        )
    what = f"{backend}, fences {fences.value}" + ("" if own or backend != AUTO else f" ({_routes(decision)})")
    if mode:
        what += f", mode{'s' if len(modes) > 1 else ''} {', '.join(modes)}"
    replay = _replay(race_result.first_bad(result))
    out = result_console(json_)
    if result.races:
        race_result.show_races(out, result)
    out.print(race_result.verdict(result, what))
    if replay is not None and seed is None:
        out.print(f"Replay: {shlex.join(replay)}", soft_wrap=True)
    if trace is not None or plot is not None:
        _draw(facts, trace, plot)
    if json_:
        about = {
            "backend": backend,
            "fences": fences.value,
            "modes": list(modes),
            "exclusive_forwards": list(setups.exclusive_forwards(facts)),
            "sglang": published().to_dict(),
            "versions": {name: version(name) for name in ("sglang-hicache-io", "torch", "numpy")},
            "facts": facts.to_dict(),
            "decision": decision.to_dict(),
        }
        answer(json.dumps(race_result.as_json(result, about, replay), indent=2))
    if not result.good:
        raise typer.Exit(1)


def _refuse(why: str) -> NoReturn:
    refuse(f"hicache-io race: {why}")


def _decide(
    given: dict[str, Any], backend: str, fences: KeptFences, policy: str | None
) -> tuple[Facts, Decision]:
    """Facts, and who writes back with which fences. Exits for wrong input."""
    try:
        known = {name: typed_fact(name, value) for name, value in given.items() if value is not None}
        check_backend(backend, BACKENDS)
        facts = detect({**_defaults(known), **known})
        decision = decide(policy_in_force(policy), facts, backend=backend)
    except (NameProblem, PolicyError) as error:
        _refuse(str(error))
    if said := CONDITIONS["gpu_arch"].doubt(facts.value("gpu_arch")):
        say(f"gpu_arch: {said}")
    layout = str(facts.value("mem_layout"))
    if layout not in LAYOUTS:
        _refuse(f"the copies of layout {layout} have no stand-in; these have: {', '.join(LAYOUTS)}")
    if backend == "kernel_ascend" or (backend == "direct" and layout == "page_first"):
        _refuse(f"SGLang's {backend} does not copy {layout} on this virtual device")
    if fences is KeptFences.both and backend in UPSTREAM_NAMES:
        _refuse(f"SGLang's own {backend} has no fence for forwards that could be kept; use --fences auto")
    problem = refusal(decision, facts, backend=backend)
    if problem is not None:
        _refuse(problem)
    return facts, decision


def _modes(asked: Sequence[str] | None, version_: str, layout: str) -> tuple[str, ...]:
    """The modes that were asked for. Exits for one that is not there."""
    from .simulation.published import SIMULATED

    wanted = dict.fromkeys(asked or ["overlap"])
    if "all" in wanted:
        wanted = dict.fromkeys(MODES)
    try:
        for name in wanted:
            check_name("mode", name, (*MODES, "all"))
    except NameProblem as error:
        _refuse(str(error))
    if wanted.keys() - {"overlap", "states"} and version_ != SIMULATED[-1]:
        _refuse(f"of SGLang {version_} only overlap and states are simulated; the others: of {SIMULATED[-1]}")
    if layout == "layer_first" and "states" in wanted:
        if list(wanted) == ["states"]:
            _refuse("SGLang has no states (mode states) in a host pool of layout layer_first")
        del wanted["states"]
    return tuple(wanted)


def _defaults(known: dict[str, Any]) -> dict[str, Any]:
    defaults = dict(DEFAULTS)
    if {"prefill_attention_backend", "decode_attention_backend"} & known.keys():
        del defaults["attention_backend"]
    return defaults


def _check_libraries(plot: Path | None) -> None:
    """Exits where something is not installed."""
    if find_spec("sglang") is None:
        _refuse(f"SGLang is not installed; {INSTALL}, or --sglang-path DIR")
    if plot is not None and find_spec("matplotlib") is None:
        _refuse("--plot needs matplotlib; pip install matplotlib")
    warnings.filterwarnings("ignore", module=r"sglang\.")
    if not fake_libcuda.loader_finds_libcuda():
        with tempfile.TemporaryDirectory() as folder:
            try:
                library = fake_libcuda.build(Path(folder)) / "libcuda.so.1"
            except fake_libcuda.NoCompilerError as error:
                _refuse(str(error))
            # For this process: what is loaded stays, whatever becomes of the file.
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _with_sglang(folder: Path) -> int:
    """The same command in a process that finds SGLang in ``folder`` first. Returns its exit status."""
    if not (folder / "sglang" / "version.py").is_file():
        if not folder.exists():
            _refuse(
                f"--sglang-path: there is no folder {folder} (in a checkout, make versions unpacks the "
                "supported releases into .sglang-versions/)"
            )
        _refuse(f"{folder} holds no sglang/: --sglang-path is the folder above it")
    arguments = _without(sys.argv[1:], "--sglang-path")
    inherited = os.environ.get("PYTHONPATH")
    path = str(folder.resolve()) + (os.pathsep + inherited if inherited else "")
    command = [sys.executable, "-c", "from sglang_hicache.bench.cli import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": path, _SGLANG_PATH: str(folder)}
    return subprocess.run(command, env=environment, check=False).returncode


def _without(arguments: Sequence[str], *options: str) -> list[str]:
    """``arguments`` without these options and their values."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in options:
            skip = True
        elif argument.partition("=")[0] not in options:
            kept.append(argument)
    return kept


def _replay(bad: tuple[str, int] | None) -> list[str] | None:
    """The command that runs one seed as this run did."""
    if bad is None:
        return None
    mode, seed = bad
    again = _without(sys.argv[1:], "--seeds", "--seed", "--trace", "--plot", "--mode")
    if mode != "overlap":
        again += ["--mode", mode]
    elsewhere = ["--sglang-path", os.environ[_SGLANG_PATH]] if _SGLANG_PATH in os.environ else []
    return ["hicache-io", *again, *elsewhere, "--seed", str(seed)]


def _routes(decision: Decision) -> str:
    """Backends and the forwards that wait, in short."""
    return "; ".join(
        f"{route.backend}, forwards that wait: {'+'.join(route.fence_forward) or 'none'}"
        for route in decision.routes
    )


def _draw(facts: Facts, trace: Path | None, plot: Path | None) -> None:
    from .timeline import timelines

    runs = timelines(facts)
    if trace is not None:
        from ...io_backends.virtual.timeline import write_chrome_trace

        write_chrome_trace(trace, runs)
        say(f"{trace}: open it at https://ui.perfetto.dev (times are a model's)")
    if plot is not None:
        from ...io_backends.virtual.plot import plot as draw

        draw(plot, runs)
        say(f"{plot}: times are a model's")
