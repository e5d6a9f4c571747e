"""One write's walk through the modules, as calls are made.

    python tests/support/write_walk.py [BACKEND]

Prints each call from one of this project's modules into another, in order, of a write of 300 tokens on plain
memory; calls that repeat the one before are left out. ``<`` is a call that goes back up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from import_graph import level
from pools import make_pool

from sglang_hicache.io_backends import Transfer, get_backend
from sglang_hicache.io_backends.device.cpu import CpuDevice

_PACKAGE = "sglang_hicache."


def walk(run: Callable[[], object]) -> list[tuple[str, str]]:
    """(caller's module, callee's module) of each call between two of our modules while ``run`` runs."""
    found: list[tuple[str, str]] = []

    def note(frame: Any, what: str, _: object) -> None:
        if what != "call" or frame.f_back is None:
            return
        pair = tuple(each.f_globals.get("__name__", "") for each in (frame.f_back, frame))
        if pair[0] != pair[1] and all(name.startswith(_PACKAGE) for name in pair):
            step = (pair[0].removeprefix(_PACKAGE), pair[1].removeprefix(_PACKAGE))
            if found[-1:] != [step]:
                found.append(step)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def goes_up(step: tuple[str, str]) -> bool:
    """Whether a call is into a module above the caller's."""
    return level(step[1]) > level(step[0])


def of_backend(name: str) -> list[tuple[str, str]]:
    """Of one write of that backend, prepared and warm."""
    pool = make_pool("page_first", layers=2, page_size=16, row_bytes=(64, 64), pages=20, device_slots=320)
    device = CpuDevice()
    backend = get_backend(name)(device, {})
    backend.prepare(pool.geometry)
    stream = device.current_stream()
    slots = np.random.default_rng(0).permutation(320)[:300]
    transfer = Transfer(pool.geometry, slots, slots[::-1].copy(), (), None, False, lambda: None)
    backend.submit(transfer, stream)
    return walk(lambda: backend.submit(transfer, stream))


def main() -> None:
    """See the module."""
    steps = of_backend(sys.argv[1] if sys.argv[1:] else "hybrid")
    for step in steps:
        print(f"{step[0]:>28} {'<' if goes_up(step) else '>'} {step[1]}")
    print(f"{len(steps)} calls between modules, {sum(map(goes_up, steps))} of them back up")


if __name__ == "__main__":
    main()
