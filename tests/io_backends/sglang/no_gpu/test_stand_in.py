"""What stands in for a GPU in child processes: the driver library, and what torch says of GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_hicache.io_backends.sglang.no_gpu import fake_libcuda


@pytest.mark.usefixtures("libcuda")
def test_children_get_it_also_when_this_process_has_it_loaded(tmp_path: Path) -> None:
    env = {**os.environ, **fake_libcuda.environment(tmp_path)}
    code = "import ctypes; ctypes.CDLL('libcuda.so.1')"
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


NVML_OF_A_T4 = """
NVMLError = type("NVMLError", (Exception,), {})


def __getattr__(name):
    if not name.startswith("nvml"):
        raise AttributeError(name)
    return lambda *_: (7, 5)
"""

DEVICE_SM = """
import sys
from sglang.srt.utils.common import get_device_sm
from sglang_hicache.io_backends.sglang.no_gpu.stand_in_gpu import stand_in_gpu
import torch

torch.cuda.is_available = lambda: True
torch.cuda.is_initialized = lambda: False
if len(sys.argv) > 1:
    stand_in_gpu(sys.argv[1])
print(get_device_sm())
"""


def test_nvml_of_this_machine_is_not_asked_for_another_ones_gpu(tmp_path: Path) -> None:
    """SGLang asks it before torch, whose answer is the stand-in's."""
    (tmp_path / "pynvml.py").write_text(NVML_OF_A_T4)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def device_sm(*arch: str) -> str:
        command = [sys.executable, "-c", DEVICE_SM, *arch]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()[-1]

    assert device_sm() == "75", "what this machine would say"
    assert device_sm("sm90") == "90"
