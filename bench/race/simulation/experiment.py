"""Runs of the simulation, one a seed: which races are there, and which rows are wrong."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from ....io_backends.virtual import gpu
from ....io_backends.virtual.order import Order
from ....io_backends.virtual.races import Race
from ....policy.decide import Decision
from ..kept_fences import KeptFences
from . import hooks
from .batches import Options
from .cache import Cache
from .scheduler import Scheduler
from .workload import Action, Player, program

D2H_STREAMS = frozenset({"transfer", "gather", "drain", "indices", "background"})
"""Streams of the write-back: SGLang's, and those that backends and the virtual device make."""

PRODUCERS = frozenset({"forward", "schedule"})
"""Streams whose work makes what the write-back reads."""

LeaveOut = Callable[[Any, Any, str], bool]


def left_out(fences: KeptFences) -> LeaveOut:
    """Which waits to forget, by what they are for, whoever asked for them (SGLang's own included)."""

    def leave_out(waiting: Any, recorded_on: Any, site: str) -> bool:
        producer = waiting.name in D2H_STREAMS and recorded_on.name in PRODUCERS
        # Without overlap forwards run on the schedule stream.
        forward = waiting.name in PRODUCERS and recorded_on.name in D2H_STREAMS
        return (producer and fences == KeptFences.none) or (
            forward and fences in (KeptFences.none, KeptFences.producer)
        )

    return leave_out


@dataclass(frozen=True, slots=True)
class Run:
    """What one seed gave.

    Attributes:
        wrong_rows: host rows that held something else than the forward wrote.
        wrong_reads: rows of a context that a forward found to hold something else.
        writes, loads: transfers.
        served_writes: pools' parts of writes that the decision's backends copied; 0 for SGLang alone.
    """

    seed: int
    races: Sequence[Race]
    wrong_rows: int
    wrong_reads: int
    writes: int
    loads: int
    counts: dict[str, int] = field(default_factory=dict)
    served_writes: int = 0


class Experiment:
    """A setup, and who writes back.

    Args:
        cache: SGLang's.
        decision: this project's hooks do what it says; None: SGLang alone.
        exclusive: of ``extend`` and ``decode``, the forwards that must not share the SMs with write-back
        work.
        scheduler: which loop runs; see :mod:`~.modes`.
        unsafe_fences: ``--hicache-io-unsafe-fences``.
    """

    def __init__(
        self,
        cache: Cache,
        decision: Decision | None,
        exclusive: Iterable[str],
        scheduler: type[Scheduler] = Scheduler,
        *,
        unsafe_fences: str | None = None,
    ) -> None:
        self.cache = cache
        self.decision = decision
        self._unsafe_fences = unsafe_fences
        self._exclusive = frozenset(exclusive)
        self._scheduler = scheduler

    def run(
        self,
        seed: int,
        leave_out: LeaveOut,
        actions: Sequence[Action] | None = None,
        *,
        order: Order | None = None,
        options: Options | None = None,
        mutate: Callable[[Any], None] = lambda active: None,
    ) -> Run:
        """One run.

        Args:
            seed: of the actions, the options and the order of everything that no fence orders.
            leave_out: see :attr:`~sglang_hicache.io_backends.virtual.gpu.Gpu.leave_out`.
            actions: instead of the seed's.
            order, options: instead of the seed's.
            mutate: called with what ``hooks.attach`` gave, to break it.
        """
        rng = random.Random(seed)
        unit = max(self.cache.setup.page_size, 4)
        device = gpu.reset(seed, order)
        chosen = Options(
            chunk=rng.choice((0, 2, 3)) * unit, mixed=rng.random() < 0.5, exclusive=self._exclusive
        )
        scheduler = self._scheduler(self.cache, options or chosen, rng)
        if self.decision is not None:
            active = hooks.attach(scheduler, self.cache, self.decision, self._unsafe_fences)
            mutate(active)
        scheduler.ledger.watch()
        device.leave_out = leave_out
        player = Player(scheduler, self.cache.setup.tokens * 3 // 4, count(1))
        try:
            player.play(program(seed, unit) if actions is None else actions)
            self._settle(scheduler)
            races = device.races()
        finally:
            hooks.detach(self.cache)
        return Run(
            seed,
            races,
            scheduler.ledger.wrong_rows,
            scheduler.wrong_reads,
            scheduler.ledger.writes,
            scheduler.ledger.loads,
            dict(device.counts),
            0 if self.decision is None else active.writeback.counters.served_writes,
        )

    def _settle(self, scheduler: Scheduler) -> None:
        """The server idles until SGLang has taken every transfer as done."""
        controller = self.cache.controller
        for _ in range(10_000):
            if not controller.ack_write_queue and not controller.ack_load_queue:
                break
            scheduler.step()
        else:
            raise RuntimeError("a transfer is never complete")
        gpu.gpu.finish()
        scheduler.ledger.check_acknowledged()
        scheduler.ledger.check_all()
