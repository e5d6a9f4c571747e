"""What every row should hold, in the order in which the scheduler asked for it; and whether it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ....io_backends.virtual import gpu
from .cache import Cache
from .forward import Ints, Words


class Ledger:
    """Follows rows from forwards to the host and back.

    Attributes:
        wrong_rows: host rows, of all layers and components, that held something else when SGLang took their
            write as done, or at the end.
        writes, loads: transfers that were submitted.
        rows_written: host slots in them.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._device = np.zeros(cache.setup.tokens + 2 * cache.setup.page_size, dtype=np.uint64)
        slots = max(pool.size for pool in cache.host_pools)
        self._host = np.zeros(slots, dtype=np.uint64)
        self._known = np.zeros(slots, dtype=bool)
        self._in_flight: list[tuple[Any, Ints]] = []
        self.wrong_rows = 0
        self.writes = 0
        self.loads = 0
        self.rows_written = 0

    def watch(self) -> None:
        """Follow transfers of the cache's engine, whoever else is around them."""
        engine = self._cache.controller.l2_transfer_engine
        write, load = engine.submit_device_to_host, engine.submit_host_to_device
        engine.submit_device_to_host = lambda transfers: self._around_write(write, transfers)
        engine.submit_host_to_device = lambda transfers, **named: self._around_load(load, transfers, **named)

    def forward_writes(self, slots: Ints, tags: Words) -> None:
        """A forward that writes these device rows is launched."""
        self._device[slots] = tags

    def _around_write(self, submit: Callable[[Any], Any], transfers: Any) -> Any:
        """Around ``submit_device_to_host``: the host rows get what the device rows were given last."""
        host, device = _slots(transfers[0].host_indices), _slots(transfers[0].device_indices)
        self._host[host] = self._device[device]
        self._known[host] = False
        self.writes += 1
        self.rows_written += len(host)
        completion = submit(transfers)
        self._in_flight.append((completion.finish_event, host))
        return completion

    def _around_load(self, submit: Callable[..., Any], transfers: Any, **named: Any) -> Any:
        """Around ``submit_host_to_device``."""
        host, device = _slots(transfers[0].host_indices), _slots(transfers[0].device_indices)
        self._device[device] = self._host[host]
        self.loads += 1
        return submit(transfers, **named)

    def ignore(self, host_indices: Any) -> None:
        """Nobody will read these host rows."""
        self._host[_slots(host_indices)] = 0

    def check_acknowledged(self) -> None:
        """SGLang has polled: look at the rows of each write that it has taken as done since the last call."""
        waiting = {id(ack.finish_event) for ack in self._cache.controller.ack_write_queue}
        left = []
        for event, host in self._in_flight:
            if id(event) in waiting:
                left.append((event, host))
            else:
                self._check(host)
                self._known[host] = True
        self._in_flight = left

    def check_all(self) -> None:
        """At the end: rows that SGLang took as written still hold what they should."""
        self._check(np.flatnonzero(self._known))

    def forget(self) -> None:
        """The cache is empty: nobody will ask for any row.

        SGLang resets it while copies to the host may still run. They read rows that others may have by then,
        and what they make of them is worth nothing: their host rows are free too, and whoever gets one writes
        it by the same streams, later. So no race is made of it.
        """
        self._known[:] = False
        self._in_flight.clear()
        gpu.gpu.checker.free("rows of the cache", "reset", (), memory=self._cache.device_bytes())

    def _check(self, host: Ints) -> None:
        host = host[self._host[host] != 0]
        if len(host):
            gpu.gpu.host_access("look at host rows", reads=self._cache.host_bytes(host))
            self.wrong_rows += self._cache.wrong_on_host(host, self._host[host])


def _slots(indices: Any) -> Ints:
    return np.asarray(indices, dtype=np.int64)
