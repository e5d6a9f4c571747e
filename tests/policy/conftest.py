"""No test of the policy reads what the machine it runs on has set up."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_policy_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SGLANG_HICACHE_IO_POLICY", raising=False)
    monkeypatch.setenv("SGLANG_HICACHE_IO_MACHINE_POLICY", "")
