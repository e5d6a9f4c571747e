"""Test cases that need a process of their own: another libcuda, or Triton's interpreter.

Both are chosen when something is imported, and would change what other tests of the same process see.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent

SHARD = "CASES_SHARD"
"""Variable that leaves a process one of several shares of a module's cases: ``0/3`` is the first of three."""


def run_cases(
    subtests: pytest.Subtests,
    module: Path,
    environment: Mapping[str, str],
    python: Sequence[str] = (sys.executable,),
) -> None:
    """Run the cases of ``module``, which is not collected by itself, and report each as a subtest.

    ``python`` is the command that runs Python, with or without SGLang imported already.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = subprocess.run(
            [*command, str(module)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        said = f"{module.name}: see its own output\n{done.stdout[-20_000:]}{done.stderr[-4_000:]}"
        if not report.exists():
            pytest.fail(said, pytrace=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = 0
    for case in cases:
        with subtests.test(case.get("name")):
            for kind in ("failure", "error"):
                if (problem := case.find(kind)) is not None:
                    bad += 1
                    pytest.fail(problem.text or kind, pytrace=False)
            if (skipped := case.find("skipped")) is not None:
                pytest.skip(skipped.get("message") or "")
    if not cases or (done.returncode != 0) != (bad > 0):
        pytest.fail(said, pytrace=False)


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
