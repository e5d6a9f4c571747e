"""What every row and state should hold, in the order in which the scheduler asked for it; whether it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ....io_backends.virtual import gpu
from ....io_backends.virtual.ranges import ByteRanges
from .cache import Cache
from .forward import Ints, Words


class HostSlots(Protocol):
    """Host rows of one kind: of keys and values (:class:`~.cache.Cache`), or states."""

    def host_bytes(self, slots: Ints) -> ByteRanges: ...

    def wrong_on_host(self, slots: Ints, tags: Words) -> int: ...


class _Slots:
    """What the slots of one kind should hold, on the device and on the host; 0: nothing that is known."""

    def __init__(self, device: int, host: int, memory: HostSlots) -> None:
        self.device = np.zeros(device, dtype=np.uint64)
        self.host = np.zeros(host, dtype=np.uint64)
        self.written = np.zeros(host, dtype=bool)
        self._memory = memory

    def wrong(self, slots: Ints) -> int:
        """How many of these host rows, of all layers and components, hold something else."""
        slots = slots[self.host[slots] != 0]
        if not len(slots):
            return 0
        gpu.gpu.host_access("look at host rows", reads=self._memory.host_bytes(slots))
        return self._memory.wrong_on_host(slots, self.host[slots])


class Ledger:
    """Follows rows and states from forwards to the host and back.

    Attributes:
        wrong_rows: host rows, of all layers and components, that held something else when SGLang took their
            write as done, or at the end.
        writes, loads: transfers that were submitted.
        rows_written: host slots in them.
        states_written: host slots of states in them.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        tokens = cache.setup.tokens + 2 * cache.setup.page_size
        self._rows = _Slots(tokens, max(pool.size for pool in cache.host_pools), cache)
        self._states: _Slots | None = None
        if cache.states is not None:
            self._states = _Slots(cache.states.slots, cache.states.host_pool.size, cache.states)
        self._in_flight: list[tuple[Any, list[tuple[_Slots, Ints]]]] = []
        self.wrong_rows = 0
        self.writes = 0
        self.loads = 0
        self.rows_written = 0
        self.states_written = 0

    @property
    def device_states(self) -> Words:
        """What each slot of states was given last, uint64 [slots]. Of a model that has linear layers."""
        assert self._states is not None
        return self._states.device

    def watch(self) -> None:
        """Follow transfers of the cache's engine, whoever else is around them."""
        engine = self._cache.controller.l2_transfer_engine
        write, load = engine.submit_device_to_host, engine.submit_host_to_device
        engine.submit_device_to_host = lambda transfers: self._around_write(write, transfers)
        engine.submit_host_to_device = lambda transfers, **named: self._around_load(load, transfers, **named)

    def forward_writes(self, slots: Ints, tags: Words) -> None:
        """A forward that writes these device rows is launched."""
        self._rows.device[slots] = tags

    def _around_write(self, submit: Callable[[Any], Any], transfers: Any) -> Any:
        """Around ``submit_device_to_host``: the host rows get what the device rows were given last."""
        written = []
        for of, host, device in self._by_kind(transfers):
            of.host[host] = of.device[device]
            of.written[host] = False
            written.append((of, host))
            if of is self._rows:
                self.rows_written += len(host)
            else:
                self.states_written += len(host)
        self.writes += 1
        completion = submit(transfers)
        self._in_flight.append((completion.finish_event, written))
        return completion

    def _around_load(self, submit: Callable[..., Any], transfers: Any, **named: Any) -> Any:
        """Around ``submit_host_to_device``."""
        for of, host, device in self._by_kind(transfers):
            of.device[device] = of.host[host]
        self.loads += 1
        return submit(transfers, **named)

    def _by_kind(self, transfers: Sequence[Any]) -> list[tuple[_Slots, Ints, Ints]]:
        """Slots on the host and on the device: of the first transfer's rows, and of states."""
        states = None if self._cache.states is None else self._cache.states.host_pool
        # A checkpoint of rows that are on the host already is written alone.
        found = [(self._rows, transfers[0])] if transfers[0].host_pool is not states else []
        if self._states is not None:
            found += [(self._states, each) for each in transfers if each.host_pool is states]
        return [(of, _slots(each.host_indices), _slots(each.device_indices)) for of, each in found]

    def ignore(self, host_indices: Any) -> None:
        """Nobody will read these host rows."""
        self._rows.host[_slots(host_indices)] = 0

    def check_acknowledged(self) -> None:
        """SGLang has polled: look at the rows of each write that it has taken as done since the last call."""
        waiting = {id(ack.finish_event) for ack in self._cache.controller.ack_write_queue}
        left = []
        for event, written in self._in_flight:
            if id(event) in waiting:
                left.append((event, written))
                continue
            for of, host in written:
                self.wrong_rows += of.wrong(host)
                of.written[host] = True
        self._in_flight = left

    def check_all(self) -> None:
        """At the end: rows that SGLang took as written still hold what they should."""
        for of in self._kinds():
            self.wrong_rows += of.wrong(np.flatnonzero(of.written))

    def forget(self) -> None:
        """The cache is empty: nobody will ask for any row.

        SGLang resets it while copies to the host may still run. They read rows that others may have by then,
        and what they make of them is worth nothing: their host rows are free too, and whoever gets one writes
        it by the same streams, later. So no race is made of it.
        """
        for of in self._kinds():
            of.written[:] = False
        self._in_flight.clear()
        gpu.gpu.checker.free("rows of the cache", "reset", (), memory=self._cache.device_bytes())

    def _kinds(self) -> list[_Slots]:
        return [self._rows, *([] if self._states is None else [self._states])]


def _slots(indices: Any) -> Ints:
    return np.asarray(indices, dtype=np.int64)
