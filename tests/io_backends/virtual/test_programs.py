"""Random programs on the virtual GPU: what runs, and what is reported, are what the graph of fences says.

Stream 0 is the legacy default stream, 1 is blocking, the others are torch's.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_races import Command, HostAccess, HostWait, Launch, Naive, Record, Wait
from programs import EVENTS, STREAMS, Pairs, programs, ranges

from sglang_hicache.io_backends.virtual import gpu as cuda
from sglang_hicache.io_backends.virtual import hardware
from sglang_hicache.io_backends.virtual.gpu import Event, Gpu, Stream
from sglang_hicache.io_backends.virtual.operations import Operation

BLOCKING = frozenset({1})


class Run:
    """A program on the virtual GPU, in one seed's order.

    Attributes:
        program: it, with polls that found an event complete as waits.
        log: (place in the program, nth piece) of each piece of work, as it ran.
        seen: for each place, how many pieces had run when the host got there.
    """

    def __init__(self, seed: int, program: list[Command], polls: st.DataObject) -> None:
        self.program: list[Command] = []
        self.log: list[tuple[int, int]] = []
        self.seen: list[int] = []
        self.gpu: Gpu = cuda.reset(seed)
        self._streams = [self.gpu.default, Stream(blocking=True), *(Stream() for _ in range(2, STREAMS))]
        self._events = [Event() for _ in range(EVENTS)]
        for command in program:
            self._do(command, polls)
        self.gpu.finish()

    def _do(self, command: Command, polls: st.DataObject) -> None:
        place = len(self.program)
        match command:
            case Launch(stream, reads, writes, sm_work):
                self._streams[stream].launch(
                    Operation(
                        str(place),
                        [lambda piece=piece: self.log.append((place, piece)) for piece in range(2)],
                        reads=ranges(reads),
                        writes=ranges(writes),
                        d2h_on_sms=sm_work == "d2h",
                        exclusive_sms=sm_work == "exclusive",
                    )
                )
            case Record(event, stream):
                self._events[event].record(self._streams[stream])
            case Wait(stream, event):
                self._streams[stream].wait_event(self._events[event])
            case HostWait(event):
                if polls.draw(st.booleans()):
                    if not self._events[event].query():
                        return
                else:
                    self._events[event].synchronize()
            case HostAccess(reads, writes):
                self.gpu.host_access(str(place), ranges(reads), ranges(writes))
        self.program.append(command)
        self.seen.append(len(self.log))


@pytest.fixture(autouse=True)
def write_down_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "Checker", Pairs)


@settings(max_examples=200, deadline=None)
@given(programs, st.integers(0, 1000), st.data())
def test_any_program_in_any_order(program: list[Command], seed: int, polls: st.DataObject) -> None:
    run = Run(seed, program, polls)
    naive = Naive(run.program, BLOCKING)
    checker = run.gpu.checker
    assert isinstance(checker, Pairs)
    assert set(checker.pairs) == set(naive.latest())

    launches = [place for place, command in enumerate(run.program) if isinstance(command, Launch)]
    ran = {entry: time for time, entry in enumerate(run.log)}
    assert set(ran) == {(place, piece) for place in launches for piece in range(2)}, "everything runs, once"
    for place in launches:
        assert ran[place, 0] < ran[place, 1]
        for later in launches:
            if naive.ordered(place, later):
                assert ran[place, 1] < ran[later, 0], "as the fences say"
        for later, command in enumerate(run.program):
            if isinstance(command, HostWait | HostAccess) and naive.ordered(place, later):
                assert ran[place, 1] < run.seen[later], "the host saw it complete"
