"""`hicache-io demo`: real servers, real HiCache traffic, and a check that shows a damaged write-back."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ...io_backends.registry import AUTO, OWN_NAMES, available_backends, unknown_backend
from ...io_backends.sglang.no_gpu.fake_libcuda import NoCompilerError
from ...io_backends.sglang.versions import INSTALL
from ...policy import completion
from ...policy.names import MEM_LAYOUTS, NameProblem, check_name
from ...policy.terminal import styled, tell
from ...policy.text import answer
from .. import damaged, serving, tiny_model
from ..json_option import Json
from ..outputs import check_folder, refuse, result_console
from ..workload import EvictingWorkload
from . import identity
from .identity import DemoRun, DemoSetup
from .output import RunProgress, as_json, console, show_runs, verdict


def demo(
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="A backend to try; may be repeated. All of this project's, and auto, by default.",
            autocompletion=completion.one_of(lambda: (AUTO, *available_backends())),
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Serve this model on this machine's NVIDIA GPU instead."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            help="--hicache-mem-layout; SGLang's own default without it.",
            autocompletion=completion.one_of(MEM_LAYOUTS),
        ),
    ] = None,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens a KV cache page.")] = 16,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the tiny model is kept between runs.")
    ] = None,
    keep_logs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the servers' logs in this folder.")
    ] = None,
    json_: Json = False,
) -> None:
    """Serve a model with each backend and compare every output with a server without HiCache.

    Without --model it needs no GPU: a tiny random model on SGLang's CPU engine.

    Exit status 0: all outputs identical, with tokens from the host tier, and a damaged write-back noticed.
    """
    backends = backend or [*OWN_NAMES, AUTO]
    _check_input(backends, layout, model)
    check_folder("--cache", cache)
    check_folder("--keep-logs", keep_logs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped on the way out
    with ExitStack() as cleanup:
        logs = keep_logs or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="hicache-demo-")))
        began = time.monotonic()
        about = _about(model is None)
        console.print(styled(("hicache-io demo", "bold"), f": {_sentence(about)}"))
        setup = _prepare(model, layout, page_size, cache or _default_cache(), logs)
        runs, failures = _run_all(setup, backends)
        shown = result_console(json_)
        reference = runs.get("reference")
        if reference is not None:
            failures |= _problems(runs, reference)
            if len(runs) > 1:
                show_runs(shown, runs, reference)
        for name, why in failures.items():
            tell(shown, styled((f"{name} failed", "bold red"), f": {why}"))
        seconds = time.monotonic() - began
        shown.print(verdict(setup, failures, seconds))
        if json_:
            result = {
                "ok": not failures,
                "failures": failures,
                "seconds": round(seconds, 1),
                **about,
                "page_size": page_size,
                "mem_layout": layout,
                "workload": asdict(setup.workload),
                "runs": [as_json(run, reference) for run in runs.values() if reference],
            }
            answer(json.dumps(result, indent=2))
    if failures:
        raise typer.Exit(1)


def _refuse(why: str) -> NoReturn:
    refuse(f"hicache-io demo: {why}")


def _check_input(backends: list[str], layout: str | None, model: str | None) -> None:
    for name in backends:
        if name != AUTO and name not in available_backends():
            _refuse(unknown_backend(name))
    try:
        if layout is not None:
            check_name("layout", layout, MEM_LAYOUTS)
    except NameProblem as problem:
        _refuse(str(problem))
    if find_spec("sglang") is None:
        _refuse(f"SGLang is not installed; {INSTALL}")
    if model is not None:
        import torch

        if not torch.cuda.is_available():
            _refuse("--model needs an NVIDIA GPU, and torch sees none; leave it out for the CPU engine")


def _default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "sglang-hicache-io")


def _about(cpu_engine: bool) -> dict[str, Any]:
    """Where this runs: engine, hardware, versions."""
    if cpu_engine:
        hardware = f"{_cpu_name()}, {os.cpu_count()} cores"
    else:
        import torch

        hardware = f"{torch.cuda.get_device_name()}, {torch.cuda.device_count()} GPUs"
    versions = {"python": sys.version.split()[0]}
    for name in ("sglang-hicache-io", "sglang", "sglang-kernel", "torch"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"engine": "cpu" if cpu_engine else "gpu", "hardware": hardware, "versions": versions}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _sentence(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    engine = "SGLang's CPU engine, no GPU" if about["engine"] == "cpu" else "GPU"
    return f"{engine} ({about['hardware']}); {versions}"


def _prepare(model: str | None, layout: str | None, page_size: int, cache: Path, logs: Path) -> DemoSetup:
    if model is None:
        with console.status("writing the tiny model"):
            try:
                env = {**serving.cpu_engine_env(cache / "libcuda"), **tiny_model.environment()}
            except NoCompilerError as error:
                _refuse(str(error))
            path = str(tiny_model.write(cache / "tiny-llama"))
        setup = DemoSetup(path, True, page_size, layout, env, logs, EvictingWorkload(tiny_model.VOCAB_SIZE))
    else:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model).get_text_config()
        # A GPU's kernels round otherwise in another batch, or when a prefix is computed again, and the next
        # token may then be another. So one request at a time, and a reference that evicts nothing.
        workload = EvictingWorkload(config.vocab_size, clients=1)
        setup = DemoSetup(model, False, page_size, layout, {}, logs, workload, reference_pool_tokens=32_768)
    load = setup.workload
    console.print(
        f"{load.conversations} conversations of {load.turns} turns, {load.clients} at once, with prompts of "
        f"{load.prompt_tokens} tokens and more, on a device pool of {setup.device_pool_tokens:,}: when a "
        "conversation goes on, its KV cache has left the device.\n"
        f"Each server takes 20 to 30 s to start. Logs: {logs}"
    )
    return setup


def _with_damaged(setup: DemoSetup) -> DemoSetup:
    """Also know the backend that is wrong on purpose."""
    folder = setup.logs / "third-party"
    return replace(setup, env={**setup.env, **damaged.environment(folder.resolve())})


def _run_all(setup: DemoSetup, backends: list[str]) -> tuple[dict[str, DemoRun], dict[str, str]]:
    """Every run by name, and why those that gave no answers failed."""
    plan: dict[str, str | None] = {
        "reference": None,
        **{name: name for name in backends},
        "damaged": damaged.NAME,
    }
    runs: dict[str, DemoRun] = {}
    failures: dict[str, str] = {}
    with RunProgress(list(plan), setup.workload.requests) as progress:
        for name, backend in plan.items():
            try:
                given = _with_damaged(setup) if backend == damaged.NAME else setup
                runs[name] = identity.run(given, name, backend, status=progress.of(name))
            except serving.ServerError as error:
                failures[name] = str(error)
                progress.of(name)("failed", 0, 0)
                if backend is None:
                    break  # nothing to compare the others with
    return runs, failures


def _problems(runs: dict[str, DemoRun], reference: DemoRun) -> dict[str, str]:
    problems = {}
    for name, run in runs.items():
        why = None if run is reference else run.problem(reference)
        if why is not None:
            tail = "\n".join(f"  {line}" for line in serving.log_tail(run.log))
            problems[name] = f"{why}\nthe server's last lines:\n{tail}"
    return problems
