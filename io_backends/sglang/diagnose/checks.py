"""What ``hicache-io doctor`` looks at: each check gives findings, and changes nothing.

``installation`` is about SGLang and this plug-in, ``machine`` about GPU and driver, ``in_force`` about the
policy. `memory_checks` is about host memory, `server_checks` about one server that would be started.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from ....policy.evidence import GDC_SINCE, PRODUCER_FENCE_SINCE
from ....policy.fact_table import CONDITIONS
from ....policy.facts import Facts
from ....policy.format.errors import PolicyError
from ....policy.format.layers import Policy
from ....policy.format.lint import warnings
from ....policy.terminal import working
from ...device import unavailable
from ...policy_files import policy_in_force
from ...registry import BACKENDS, OWN_NAMES, available_backends, ignored_spec, loading_problem
from .. import versions
from ..no_gpu import fake_libcuda
from .dry_run import Server

OK, WARNING, BAD = "ok", "warning", "bad"
NEW_GPU = "a policy of yours can say which forwards wait on it"

_PLUGIN = "hicache_io"
_GROUP = "sglang.srt.plugins"

_CHECK_POINTS = f"""
import {versions.__name__} as v
print("POINTS", v.check_points(v.current().points, v.installed()) or "")
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        about: what was looked at, in a word or two.
        status: ``ok``, ``warning`` (worth knowing, serves safely) or ``bad`` (unsafe, or does not start).
        text: what was found.
        advice: what to do; empty where there is nothing.
    """

    about: str
    status: str
    text: str
    advice: str = ""


def installation() -> Iterator[Finding]:
    """SGLang, whether the plug-in reaches it, its hook points, and the fences that it has itself."""
    try:
        version = versions.installed()
    except ImportError as error:
        yield Finding(
            "SGLang",
            WARNING,
            f"cannot be imported here: {error}",
            f"{versions.INSTALL}, or run doctor in the server's environment",
        )
        return
    problem = versions.problem_with(version)
    yield Finding("SGLang", BAD if problem else OK, problem or f"{version}, a supported version")
    yield _plug_in()
    if problem is None:
        yield _hook_points(version)
    yield from _upstream_fences(version)


def _plug_in() -> Finding:
    if _PLUGIN not in {point.name for point in entry_points(group=_GROUP)}:
        return Finding(
            "plug-in",
            BAD,
            f"SGLang does not see {_PLUGIN} here",
            "pip install . in a checkout of sglang-hicache-io, into SGLang's environment",
        )
    chosen = os.environ.get("SGLANG_PLUGINS", "")
    if chosen and _PLUGIN not in [name.strip() for name in chosen.split(",")]:
        return Finding(
            "plug-in",
            BAD,
            f"SGLANG_PLUGINS={chosen} leaves {_PLUGIN} out",
            f"add {_PLUGIN} to it, or unset it",
        )
    return Finding("plug-in", OK, f"SGLang loads {_PLUGIN}")


def _hook_points(version: str) -> Finding:
    """Compared in a child: importing the scheduler takes a driver library, and seconds."""
    with tempfile.TemporaryDirectory(prefix="hicache-io-") as scratch:
        try:
            environment = {**os.environ, **fake_libcuda.environment(Path(scratch))}
        except fake_libcuda.NoCompilerError as error:
            return Finding("hook points", WARNING, f"not compared: {error}")
        with working("comparing SGLang's hook points with the published ones"):
            done = subprocess.run(
                [sys.executable, "-c", _CHECK_POINTS],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
    said = [line for line in done.stdout.splitlines() if line.startswith("POINTS")]
    if not said:
        last = (done.stderr.splitlines() or [f"status {done.returncode}"])[-1]
        return Finding(
            "hook points", BAD, f"SGLang's scheduler cannot be imported here: {last}", "reinstall sglang"
        )
    problem = said[0].removeprefix("POINTS").strip()
    return Finding("hook points", BAD if problem else OK, problem or f"all as published in SGLang {version}")


def _upstream_fences(version: str) -> Iterator[Finding]:
    """Read off the installed code, not off the version."""
    found = upstream_fences()
    if found is None:
        yield Finding("SGLang's fences", WARNING, "its cache controller cannot be read here")
        return
    yield Finding(
        "SGLang's fences",
        OK if found["D2H waits for the forward"] else WARNING,
        "; ".join(f"{what}: {'yes' if there else 'no'}" for what, there in found.items()),
        ""
        if found["D2H waits for the forward"]
        else f"SGLang {version} alone may copy rows that are still written: use our backends, or "
        f"{PRODUCER_FENCE_SINCE}",
    )


def upstream_fences() -> dict[str, bool] | None:
    """Which waits the installed SGLang has by itself; None if its sources are not there."""
    spec = find_spec("sglang")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    try:
        names = {
            name: _attributes(Path(folders[0], "srt/managers", name))
            for name in ("cache_controller.py", "scheduler.py")
        }
    except (IndexError, OSError, SyntaxError):
        return None
    controller, scheduler = names["cache_controller.py"], names["scheduler.py"]
    return {
        "H2D waits for the forward": "load_fence_stream" in controller & scheduler,
        "D2H waits for the forward": "write_fence_stream" in controller & scheduler,
        # A scheduler that made forwards wait would have to name the stream that D2H runs on.
        "forwards wait for D2H": bool({"device_to_host_stream", "write_stream"} & scheduler),
    }


def _attributes(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def machine(facts: Facts) -> Iterator[Finding]:
    """GPU, driver, batch copy, which backends work, and FA3's binary."""
    arch = facts["gpu_arch"]
    if arch.value is None:
        yield Finding("GPU", WARNING, arch.source, "only SGLang's CPU engine serves here")
    else:
        gpu = facts.value("gpu_name") or "no GPU"
        software = f"driver {facts['driver']}, CUDA {facts['cuda']}"
        yield Finding("GPU", OK, f"{gpu} ({arch}), {software}" if arch.value != "cpu" else "a CPU server")
        if said := CONDITIONS["gpu_arch"].doubt(arch.value):
            yield Finding("GPU", WARNING, said, NEW_GPU)
    batch = facts["batch_copy"]
    if batch.value is False and arch.value != "cpu":
        yield Finding(
            "batch copy",
            WARNING,
            f"no cuMemcpyBatchAsync: copies go one by one, at 5 to 7 us of CPU each ({batch.source})",
            "update the driver to one for CUDA 12.8 or later",
        )
    else:
        known = "unknown" if batch.value is None else "yes" if batch.value else "no"
        yield Finding("batch copy", WARNING if batch.value is None else OK, f"{known}: {batch.source}")
    yield from _backends("cpu" if facts.value("device") == "cpu" else "cuda", facts)
    yield _fa3_binary(facts)


def _backends(device: str, facts: Facts) -> Iterator[Finding]:
    reason = unavailable(device) or (facts["gpu_arch"].source if facts.value("gpu_arch") is None else None)
    for name in available_backends():
        if (problem := loading_problem(name)) is not None:
            yield Finding(name, WARNING, problem, "reinstall what provides it")
            continue
        if (problem := ignored_spec(name)) is not None:
            yield Finding(name, WARNING, problem, "name the entry point as the spec is named")
            continue
        spec = BACKENDS[name]
        where = f"layouts {_listed(spec.layouts)}"
        if spec.kv_kinds is not None:
            where += f"; KV cache of kind {_listed(spec.kv_kinds)}"
        if reason is not None:
            yield Finding(name, WARNING, f"not on a GPU here: {reason}")
        elif name not in OWN_NAMES:
            yield Finding(name, OK, f"a third party's; {where}")
        else:
            yield Finding(name, OK, where)


def _listed(names: frozenset[str] | None) -> str:
    return "as it says for each pool" if names is None else ", ".join(sorted(names))


def _fa3_binary(facts: Facts) -> Finding:
    binary, kernels = facts["fa3_binary"], facts.value("sgl_kernel")
    if binary.value != "sgl_kernel":
        return Finding(
            "FA3 binary",
            WARNING,
            f"kernels-community/sgl-flash-attn3 ({binary.source}): nobody has examined it beside D2H",
            "fences stay as for any FA3; unset SGLANG_USE_SGL_FA3_KERNEL to use SGLang's own",
        )
    if kernels is not None and Version(str(kernels)) < GDC_SINCE:
        return Finding(
            "FA3 binary",
            WARNING,
            f"sgl-kernel {kernels}: FA3 without the dependency wait (ACQBULK), as most likely in #20611",
            f"sglang-kernel {GDC_SINCE} or later; nobody has shown that it cures them",
        )
    return Finding("FA3 binary", OK, f"SGLang's own, sgl-kernel {facts['sgl_kernel']}")


def in_force(path: str | None, asked: Server | None = None) -> tuple[list[Finding], Policy | None]:
    """The policy in the file at ``path``, else that of the server asked about, else that of any server here;
    and what is odd about it.
    """
    try:
        policy = asked.policy_in_force() if asked and path is None else policy_in_force(path)
    except PolicyError as error:
        return [Finding("policy", BAD, str(error), "a server does not start with it")], None
    odd = [Finding("policy", WARNING, each.message) for each in warnings(policy)]
    return odd or [Finding("policy", OK, f"{policy.source}, {len(policy.rules)} rules")], policy


def worst(findings: Mapping[str, list[Finding]]) -> str:
    """``bad`` if anything is, else ``warning``, else ``ok``."""
    statuses = {each.status for section in findings.values() for each in section}
    return next((status for status in (BAD, WARNING) if status in statuses), OK)
