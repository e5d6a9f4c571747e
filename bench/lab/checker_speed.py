"""How long the race checker takes: ``python -m sglang_hicache.bench.lab.checker_speed
[OPERATIONS]``.

Two programs, with as many operations as asked for:

- *serving*: what a scheduler does. Forwards on one stream write rows and read others; for each, a write-back
  by gather and drain, a load on another stream, and the host reads results. All is fenced.
- *tangle*: eight streams that read and write random rows, a few random fences, and a host that never waits,
  so that nothing can be forgotten because it is known to be done.
"""

from __future__ import annotations

import random
import sys
import time

import numpy as np

from ...io_backends.virtual.races import Checker
from ...io_backends.virtual.ranges import ByteRanges

_ROW = 256
_ROWS = 4096
_HOST, _STAGING = 1 << 32, 1 << 40


def serving(operations: int) -> Checker:
    """Five operations a step on six streams, with 4 to 8 ranges each."""
    checker = Checker()
    schedule, forward, gather, drain, transfer, load = (
        checker.add_stream(name) for name in ("schedule", "forward", "gather", "drain", "transfer", "load")
    )
    loaded = drained = checker.record(load)
    for step in range(operations // 5):
        slots = (np.arange(8) * 97 + step * 8) % _ROWS
        rows = ByteRanges.rows(0, _ROW, _ROW, slots)
        staged = ByteRanges.rows(_STAGING, _ROW, _ROW, np.arange(4) * 2)
        on_host = ByteRanges.rows(_HOST, _ROW, _ROW, (slots + 5) % _ROWS)
        checker.launch(schedule, f"indices {step}", "scheduler.py:1 in prepare", writes=staged)
        checker.wait(forward, checker.record(schedule))
        checker.wait(forward, loaded)
        checker.launch(forward, f"forward {step}", "scheduler.py:2 in run_batch", reads=rows, writes=rows)
        made = checker.record(forward)
        checker.wait(gather, made)
        checker.wait(gather, drained)
        checker.launch(
            gather, f"gather {step}", "hybrid.py:1 in submit", reads=rows, writes=staged, sm_work="d2h"
        )
        checker.wait(drain, checker.record(gather))
        checker.launch(drain, f"drain {step}", "hybrid.py:2 in submit", reads=staged, writes=on_host)
        drained = checker.record(drain)
        checker.wait(transfer, drained)
        checker.wait(schedule, drained)
        checker.wait(load, drained)
        checker.launch(load, f"load {step}", "l2.py:3 in load", reads=on_host, writes=rows)
        loaded = checker.record(load)
        if step % 4 == 3:
            checker.host_waits(made)
        if step % 32 == 31:
            checker.host_waits(loaded)
    return checker


def tangle(operations: int, rows: int = _ROWS) -> Checker:
    """One operation a turn on one of eight streams, reading two and writing two rows; a wait every other
    turn."""
    pick = random.Random(operations)
    checker = Checker()
    streams = [checker.add_stream(f"stream {nth}") for nth in range(8)]
    for nth in range(operations):
        stream = pick.choice(streams)
        if nth % 2:
            checker.wait(stream, checker.record(pick.choice(streams)))
        reads, writes = (
            ByteRanges.of([(row * _ROW, (row + 1) * _ROW) for row in pick.sample(range(rows), 2)])
            for _ in range(2)
        )
        checker.launch(stream, f"operation {nth}", f"program.py:{stream}", reads=reads, writes=writes)
    return checker


PROGRAMS = {"serving": serving, "tangle": tangle}


def main() -> None:
    operations = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    for name, program in PROGRAMS.items():
        begin = time.process_time()
        checker = program(operations)
        seconds = time.process_time() - begin
        races = sum(race.count for race in checker.races)
        print(
            f"{name}: {operations:,} operations in {seconds:.1f} s of one core; each took "
            f"{checker.work / operations:.1f} comparisons; {checker.live:,} accesses kept, {races:,} races"
        )


if __name__ == "__main__":
    main()
