"""Models small enough to be measured on a CPU in milliseconds."""

from __future__ import annotations

import pytest

from sglang_hicache.bench.measure import cases
from sglang_hicache.bench.measure.cases import KvShape


@pytest.fixture(autouse=True)
def no_policy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_HICACHE_IO_MACHINE_POLICY", "")
    monkeypatch.delenv("SGLANG_HICACHE_IO_POLICY", raising=False)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Names of an MHA and an MLA model of two and three layers."""
    monkeypatch.setitem(cases.MODELS, "tiny", KvShape("tiny", "mha", 2, 2, (64, 64)))
    monkeypatch.setitem(cases.MODELS, "tiny-mla", KvShape("tiny-mla", "mla", 3, 1, (96,)))
    return "tiny", "tiny-mla"
