"""An SGLang release that is not installed: its tree in front of the path, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from repository import VERSIONS

from sglang_hicache.io_backends.sglang.no_gpu import fake_libcuda


def answers(
    script: Path, release: str, arch: str, lines: list[list[str]], folder: Path, *path: Path
) -> list[dict[str, Any]]:
    """What ``script`` says of each argument list.

    Args:
        script: takes an architecture and reads the lists as JSON; prints ``ANSWERS``, and the release
            that ran with an answer for each list.
        release: one of `versions.SUPPORTED`.
        arch: of the GPU that it says is there.
        lines: argument lists.
        folder: for the stand-in driver library.
        path: more folders to import from.
    """
    done = subprocess.run(
        [sys.executable, str(script), arch],
        input=json.dumps(lines),
        env={
            **os.environ,
            **fake_libcuda.environment(folder / "libcuda"),
            "PYTHONPATH": os.pathsep.join(map(str, [VERSIONS / release, *path])),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert said, done.stderr[-3000:]
    ran, found = json.loads(said[0].removeprefix("ANSWERS "))
    assert ran == release
    assert len(found) == len(lines)
    return list(found)
