"""How long a forward that must not share the SMs with D2H work is held back by one write.

The stall is the time from the submission, on idle streams, to the event that such a forward waits for: the
last gather enqueued by then for ``hybrid``, the end of the whole transfer for SGLang's SM kernels. What
``hybrid`` leaves for later gaps between forwards is enqueued by polling here, as a scheduler does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sglang_hicache.bench.d2h import QWEN3_8B, Case, Contenders, Row, Submit, Task, bandwidth
from sglang_hicache.io_backends import Transfer, get_backend

TOKENS = (8, 64, 512, 4096, 28672)
"""Qwen3-8B: 1.2 MB to 4.2 GB a write."""


def hybrid_where_forwards_wait(task: Task) -> Iterator[tuple[str, Submit | str]]:
    """``hybrid`` as it runs under a rule that fences forwards."""
    import torch

    device, geometry = task.device, task.geometry
    device_slots = torch.from_numpy(task.rows).cuda()
    backend: Any = get_backend("hybrid")(device, task.options)
    backend.prepare(geometry)

    def submit() -> tuple[int, Any]:
        ready = device.record(device.current_stream())
        transfer = Transfer(geometry, task.host, device_slots, (ready,), ready, True, lambda: None)
        done = backend.submit(transfer, task.stream)
        while done.pending is not None and not done.pending.enqueued():
            backend.advance((ready,))
        return done.copies, done.sm_done

    yield "hybrid, forwards wait", submit


def fence(
    others: tuple[Contenders, ...], *, repeats: int, budget_s: float, say: Callable[[str], None]
) -> list[Row]:
    """Stall and bandwidth by size, ``page_first``, fragmented pages of 8; ``others`` beside ``hybrid``."""
    cases = [Case(QWEN3_8B.name, "page_first", 8, tokens, True) for tokens in TOKENS]
    return bandwidth(
        QWEN3_8B,
        cases,
        repeats=repeats,
        budget_s=budget_s,
        field_of=[hybrid_where_forwards_wait, *others],
        say=say,
    )
