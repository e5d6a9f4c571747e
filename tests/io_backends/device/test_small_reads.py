"""Small reads by a kernel; what it moves is in small_reads_cases.py, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_process import run_cases


def test_kernel_in_tritons_interpreter(subtests: pytest.Subtests) -> None:
    pytest.importorskip("triton", reason="the kernel is Triton's")
    run_cases(subtests, Path(__file__).with_name("small_reads_cases.py"), {"TRITON_INTERPRET": "1"})
