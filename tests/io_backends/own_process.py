"""Test cases that need a process of their own: another libcuda, or Triton's interpreter.

Both are chosen when something is imported, and would change what other tests of the same process see.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

HERE = Path(__file__).parent

SHARD = "CASES_SHARD"
"""Variable that leaves a process one of several shares of a module's cases: ``0/3`` is the first of three."""


def run_cases(module: str | Path, environment: Mapping[str, str], *options: str) -> None:
    """Run the cases of ``module`` (a file beside this one, or a path; not collected by itself).

    Fails if one of them fails.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(HERE / module)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.fail(
            f"{module}: see its own output\n{done.stdout[-20_000:]}{done.stderr[-4_000:]}", pytrace=False
        )


def fake_driver(folder: Path) -> dict[str, str]:
    """Compile the stand-in libcuda.so.1 into ``folder``; the variables that make a child process load it."""
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C compiler for the stand-in libcuda.so.1 (Debian, Ubuntu: apt-get install gcc)")
    library = folder / "libcuda.so.1"
    flags = ["-O1", "-Wall", "-Wno-pedantic", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    subprocess.run([compiler, *flags, "-o", str(library), str(HERE / "fake_cuda.c")], check=True)
    inherited = os.environ.get("LD_LIBRARY_PATH", "")
    return {"LD_LIBRARY_PATH": f"{folder}:{inherited}" if inherited else str(folder)}
