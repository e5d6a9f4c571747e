"""What figures were measured on: hardware, versions, git state and command line."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

_DISTRIBUTIONS = ("torch", "triton", "numpy", "cuda-bindings", "sglang", "sglang-kernel")


def describe_environment(*, cpu: bool) -> dict[str, Any]:
    """Plain JSON types; ``ran_on`` is ``GPU`` or ``CPU``."""
    found: dict[str, Any] = {"ran_on": "CPU" if cpu else "GPU"}
    if not cpu:
        found |= _gpu()
    found |= {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name.replace("-", "_"): _version(name) for name in _DISTRIBUTIONS},
        "git": git_state(),
        "command": command_line(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
    return found


def _gpu() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found: dict[str, Any] = {
        "gpu": properties.name,
        "sm_count": properties.multi_processor_count,
        "gpu_arch": f"sm{properties.major}{properties.minor}",
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "driver": None,
    }
    asked = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.sm,clocks.mem,pcie.link.gen.max,pcie.link.width.max",
    ]
    try:
        done = subprocess.run([*asked, "--format=csv,noheader"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return found
    # One line a GPU; the machine may have more than the one measured on, of the same driver.
    found["nvidia_smi"] = done.stdout.splitlines()[0].strip()
    found["driver"] = found["nvidia_smi"].split(",")[0]
    return found


def cpu_name() -> str:
    """The CPU's name as Linux has it."""
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def git_state() -> str | None:
    """Commit of the checkout that this module is in, ``-dirty`` where files differ; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        asked = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def command_line() -> str:
    """What was typed, as far as Python knows, without folders of this machine (:func:`without_folders`)."""
    program = Path(sys.argv[0])
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = f"python -m {spec.name}" if spec is not None and spec.name != "__main__" else program.name
    return shlex.join([*name.split(), *map(without_folders, sys.argv[1:])])


_ABSOLUTE = re.compile(r"(^(?:-\w)?|(?<=[=,:;]))(?:~[\w-]*)?/(?!/)[^,:;=]*")
"""An absolute path at the start of an argument, or behind what separates values; not a URL's."""


def without_folders(argument: str) -> str:
    """``argument`` with every absolute path in it cut to its last part: figures are published, and the rest
    says something of this machine only.

    ``--out=/home/me/results/bench.json`` becomes ``--out=bench.json``. URLs and relative paths stay.
    """
    return _ABSOLUTE.sub(lambda path: path[1] + PurePosixPath(path[0][len(path[1]) :]).name, argument)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
