"""The stand-in driver library: for child processes, whatever this process has loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sglang_hicache.io_backends.sglang.no_gpu import fake_libcuda


@pytest.mark.usefixtures("libcuda")
def test_children_get_it_also_when_this_process_has_it_loaded(tmp_path: Path) -> None:
    import os

    env = {**os.environ, **fake_libcuda.environment(tmp_path)}
    code = "import ctypes; ctypes.CDLL('libcuda.so.1')"
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
