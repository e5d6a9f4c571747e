"""Small reads by a kernel; what it moves is in small_reads_cases.py, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from own_process import run_cases

from sglang_hicache.io_backends.device.small_reads import MOST_BYTES, KernelReads


def test_kernel_in_tritons_interpreter(subtests: pytest.Subtests) -> None:
    pytest.importorskip("triton", reason="the kernel is Triton's")
    run_cases(subtests, Path(__file__).with_name("small_reads_cases.py"), {"TRITON_INTERPRET": "1"})


def test_the_host_waits_for_the_kernel_before_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream whose kernels run when somebody waits for it, no sooner."""
    torch = pytest.importorskip("torch")
    buffer = torch.zeros(MOST_BYTES, dtype=torch.uint8)
    queued: list[int] = []

    def wait() -> None:
        for value in queued:
            buffer[:8].view(torch.int32).fill_(value)
        queued.clear()

    stream = SimpleNamespace(synchronize=wait)
    lazy: Any = SimpleNamespace(
        int32=torch.int32, zeros=torch.zeros, cuda=SimpleNamespace(current_stream=lambda: stream)
    )
    monkeypatch.setattr(KernelReads, "_launch", lambda reads, grid, arguments: queued.append(arguments[0]))
    reads = KernelReads(lazy, "cpu", buffer, buffer.data_ptr())
    queued.clear()
    for address in (4096, 8192):
        values = SimpleNamespace(
            numel=lambda: 2,
            element_size=lambda: 4,
            data_ptr=lambda address=address: address,
            is_cuda=True,
            dtype=torch.int32,
            shape=(2,),
        )
        assert reads.read(values).tolist() == [address, address]
