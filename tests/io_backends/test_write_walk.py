"""A write goes from its backend down into the plan and the device, and back only with what it was asked."""

from __future__ import annotations

import pytest
import write_walk

from sglang_hicache.io_backends.registry import OWN_NAMES


@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_write_goes_one_way(name: str) -> None:
    steps = write_walk.of_backend(name)
    assert (f"io_backends.{name}", "io_backends.device.cpu") in steps
    # The ring was given what tells whether an event is complete.
    up = {step for step in steps if write_walk.goes_up(step)}
    assert up == ({("io_backends.plan.ring", "io_backends.device.cpu")} if name == "hybrid" else set())


def test_a_call_back_up_would_be_seen() -> None:
    assert write_walk.goes_up(("io_backends.plan.chunks", "io_backends.hybrid"))
    assert not write_walk.goes_up(("io_backends.hybrid", "io_backends.plan.chunks"))
