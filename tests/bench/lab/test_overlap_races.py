"""The overlap loop on the virtual device, in any order: right bytes with all fences, reports without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from pools import MemoryPool, make_pool

from sglang_hicache.bench.lab.pace_model import LoopDevice, NoIds, task_of
from sglang_hicache.bench.measure.cases import Case
from sglang_hicache.bench.measure.overlap import ForwardStep, run
from sglang_hicache.bench.measure.writers import OwnWriter
from sglang_hicache.io_backends import get_backend
from sglang_hicache.io_backends.plan.ring import Ring
from sglang_hicache.io_backends.routes import one_route
from sglang_hicache.io_backends.virtual import gpu as cuda
from sglang_hicache.io_backends.virtual.gpu import Stream
from sglang_hicache.io_backends.virtual.operations import Operation
from sglang_hicache.io_backends.virtual.races import Race
from sglang_hicache.io_backends.virtual.ranges import ByteRanges

TOKENS, STEPS, RING_TOKENS = 20, 6, 24
SEEDS = range(25)


def forward(pool: MemoryPool, slots: np.ndarray) -> Operation:
    """Makes the rows of ``slots`` from what they hold now; until then they hold something else."""
    rows = [each for part in pool.device for each in part]
    made = [each[slots].copy() for each in rows]
    where = [
        ByteRanges.rows(address, part.device_row_stride, part.row_bytes, slots)
        for part in pool.geometry.components
        for address in part.device_rows
    ]
    for each in rows:
        each[slots] = 0x77

    def make(nth: int) -> None:
        rows[nth][slots] = made[nth]

    return Operation(
        "forward",
        [partial(make, nth) for nth in range(len(rows))],
        writes=ByteRanges.union(where),
        exclusive_sms=True,
    )


def loop(
    seed: int, leave_out: tuple[str, str] | None = None, mutate: Callable[[Any], None] = lambda backend: None
) -> tuple[bool, list[Race], set[tuple[str, str]]]:
    """Whether all bytes are right, races, and (who waits, for whom) of all waits."""
    gpu = cuda.reset(seed)
    waits: set[tuple[str, str]] = set()

    def left_out(waiting: Stream, recorded_on: Stream, site: str) -> bool:
        waits.add((waiting.name, recorded_on.name))
        return (waiting.name, recorded_on.name) == leave_out

    gpu.leave_out = left_out
    total = TOKENS * STEPS
    pool = make_pool(
        "page_first", layers=2, page_size=1, row_bytes=(64, 64), pages=total, device_slots=total, seed=seed
    )
    device = LoopDevice()
    backend: Any = get_backend("hybrid")(device, {"staging_mb": 1})
    # Room for a step's rows and a little more: each gap's gathers lie on the last one's.
    backend._ring = Ring(RING_TOKENS * pool.geometry.bytes_per_token, device.query)
    mutate(backend)
    rng = np.random.default_rng(seed)
    host, rows = rng.permutation(total), rng.permutation(total)
    expected = pool.expected(host, rows)
    for each in pool.host:
        each[...] = 0
    streams = tuple(Stream() for _ in range(4))
    for stream, name in zip(streams, ("schedule", "forward", "results", "transfer"), strict=True):
        stream.name = name
    # By step, where the loop says tokens.
    parts = {nth + 1: slice(nth * TOKENS, (nth + 1) * TOKENS) for nth in range(STEPS)}
    case = Case("tiny", "page_first", 1, TOKENS, True)
    tasks = {
        nth: task_of(case, pool.geometry, host[part], rows[part], device, streams[3])
        for nth, part in parts.items()
    }
    writer = OwnWriter(tasks, one_route(backend, ("extend",)))
    forwards = {nth: forward(pool, rows[part]) for nth, part in parts.items()}

    def launch(step: ForwardStep) -> None:
        cuda.current_stream().launch(forwards[step.tokens])

    steps = [ForwardStep(1, nth) for nth in parts]
    run(device, steps, launch, NoIds(), streams[:3], writer, pool.geometry.bytes_per_token)  # type: ignore[arg-type]
    right = all((got == want).all() for got, want in zip(pool.host, expected, strict=True))
    return right, gpu.races(), waits


def test_with_all_fences_every_order_gives_the_right_bytes() -> None:
    seen: set[tuple[str, str]] = set()
    for seed in SEEDS:
        right, races, waits = loop(seed)
        assert right, seed
        assert not races, (seed, races)
        seen |= waits
    assert ("gather", "drain") in seen, "a gather that lies on memory of an earlier gap"


@pytest.mark.parametrize(
    "fence", [("gather", "forward"), ("forward", "gather"), ("gather", "drain"), ("drain", "gather")]
)
def test_each_fence_is_needed(fence: tuple[str, str]) -> None:
    assert any(not right or races for right, races, _ in (loop(seed, fence) for seed in SEEDS))


def test_a_gather_beside_a_drain_of_its_memory_is_seen_as_wrong_bytes_or_a_race() -> None:
    """Memory handed out as if it were drained."""

    def forget(backend: Any) -> None:
        take = backend._ring.take

        def without_events(*args: Any, **named: Any) -> Any:
            taken = take(*args, **named)
            return None if taken is None else (taken[0], ())

        backend._ring.take = without_events

    assert any(not right or races for right, races, _ in (loop(seed, mutate=forget) for seed in SEEDS))
