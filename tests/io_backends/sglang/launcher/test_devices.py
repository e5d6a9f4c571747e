"""Which devices a server may ask for, as the launching process sees it."""

from __future__ import annotations

import sys

import pytest

from sglang_hicache.io_backends.device import unavailable

pytestmark = pytest.mark.usefixtures("cpu_sglang")


def test_the_cpu_engine_and_nvidia_gpus_are_served() -> None:
    assert unavailable("cpu") is None
    assert unavailable("cuda") is None


@pytest.mark.parametrize("device", ["npu", "xpu", "mps"])
def test_other_devices_are_named_and_refused(device: str) -> None:
    assert f"'{device}' is not supported" in (unavailable(device) or "")


def test_rocm_which_sglang_calls_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "only NVIDIA GPUs" in (unavailable("cuda") or "")


def test_a_missing_cuda_python_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules makes an import fail.
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert "pip install cuda-python" in (unavailable("cuda") or "")
