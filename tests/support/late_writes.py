"""Writes to the host that are copied when they are taken as done and not before, which is as late as any
backend may read. Rows are numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Event:
    """Of a write."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def query(self) -> bool:
        return self._write.done

    def synchronize(self) -> None:
        self._write.finish()

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class Write:
    """One call of ``submit_device_to_host``.

    Attributes:
        parts: kind of rows, device slots, and what those rows held.
    """

    def __init__(self, rows: Rows, transfers: Any) -> None:
        self.rows = rows
        self.done = False
        self.parts = []
        for each in transfers:
            kind = str(each.host_pool.pool_label)
            device = each.device_indices.numpy().copy()
            self.parts.append((kind, device, rows.device[kind][device].copy()))

    def finish(self) -> None:
        """Copies now."""
        if self.done:
            return
        self.done = True
        for kind, device, expected in self.parts:
            found = self.rows.device[kind][device]
            self.rows.wrong[kind] += int((found != expected).sum())
            self.rows.written[kind] += len(device)


class Rows:
    """What rows hold, by kind; ``wrong`` and ``written`` count those of writes.

    Args:
        sizes: device slots of each kind.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.device = {kind: np.zeros(size, dtype=np.int64) for kind, size in sizes.items()}
        self.wrong = dict.fromkeys(sizes, 0)
        self.written = dict.fromkeys(sizes, 0)


class Engine:
    """In place of ``L2TransferEngine``: loads are done at once."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.writes: list[Write] = []

    def submit_device_to_host(self, transfers: Any) -> Any:
        from sglang.srt.mem_cache.l2_transfer import TransferCompletion

        write = Write(self.rows, transfers)
        self.writes.append(write)
        return TransferCompletion(Event(write), Event(write), False)
