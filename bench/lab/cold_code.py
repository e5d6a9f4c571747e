"""How long a submission of ``hybrid`` takes when its code has left the CPU's caches, and when it has not.

    python -m sglang_hicache.bench.lab.cold_code --out cold_code.json

On this machine's CPU, with a GPU that does nothing (:mod:`~..measure.idle_gpu`): microseconds from the start
of a submission until its first gather and its first copies were asked for, and until it returns. Between two
of them a scheduler runs other Python; here *cold* has numpy go through 256 MiB and Python through a tree of
objects.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...io_backends.policy_files import default_policy
from ..measure import idle_gpu
from ..measure.cases import Case
from ..measure.contenders import contenders
from ..measure.devices import no_collection
from ..measure.one_write import Setting
from ..measure.results import Spread
from .trial import SavedRows, parser_of

WRITES = (
    Case("Qwen3-8B", "page_first", 64, 512, False),
    Case("Qwen3-8B", "page_first", 64, 512, True),
    Case("Qwen3-8B", "page_first", 1, 512, True),
    Case("DeepSeek-V3", "page_first", 16, 512, True),
)


class _Clocked:
    """A device that notes when its first gather and its first copy of a write were asked for."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.at: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def gather(self, *args: Any) -> None:
        self._device.gather(*args)
        self.at.setdefault("gather_us", time.perf_counter_ns())

    def copy(self, *args: Any) -> None:
        self._device.copy(*args)
        self.at.setdefault("copies_us", time.perf_counter_ns())


def other_work() -> Callable[[], None]:
    """What a scheduler might do between two writes, as far as caches see it."""
    numbers = np.zeros(2**25)
    objects = [{str(number): [number, number + 1]} for number in range(20_000)]

    def run() -> None:
        numbers.__iadd__(1)
        json.loads(json.dumps(objects))

    return run


def measure(
    device: Any, case: Case, between: Callable[[], None] | None, repeats: int
) -> Mapping[str, Spread]:
    """Microseconds of each part.

    Args:
        device: an idle one.
        case: the write.
        between: run before each; None: submissions follow each other.
        repeats: of which there are so many.
    """
    clocked = _Clocked(device)
    setting = Setting(clocked, default_policy(), repeats, ("hybrid",))
    task = setting.task(case, setting.memory(case), forwards_wait=False)
    (hybrid,) = contenders(task, ("hybrid",))
    assert hybrid.submit is not None, hybrid.reason
    found: dict[str, list[float]] = {}
    with no_collection():
        for number in range(repeats + 5):
            device.synchronize()
            if between is not None:
                between()
            clocked.at.clear()
            began = time.perf_counter_ns()
            hybrid.submit(lambda event: None)
            clocked.at["thread_us"] = time.perf_counter_ns()
            for name, at in clocked.at.items() if number >= 5 else ():
                found.setdefault(name, []).append((at - began) / 1e3)
    return {name: Spread.of(values) for name, values in found.items()}


def main() -> int:
    """Measure, print, save."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    rows = SavedRows(args.out, cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        idle_gpu.install(Path(folder))
        device = idle_gpu.make_device()
        work = other_work()
        for case in WRITES:
            for name, between in (("warm", None), ("cold", work)):
                spreads = measure(device, case, between, args.repeats)
                rows.add({"write": str(case), "caches": name, **{k: asdict(v) for k, v in spreads.items()}})
                times = ", ".join(f"{key} {spread.median:,.0f}" for key, spread in spreads.items())
                print(f"{case}, {name}: {times}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
