"""The virtual CUDA keeps CUDA's promises, and only those."""

from __future__ import annotations

import pytest
import virtual_cuda
from virtual_cuda import Event, Hang, Stream

SEEDS = range(50)


def orders(fenced: bool) -> set[str]:
    """What two streams write down, over many seeds; with a fence, b after a."""
    seen = set()
    for seed in SEEDS:
        virtual_cuda.reset(seed)
        one, other = Stream(), Stream()
        log: list[str] = []
        one.enqueue(lambda to=log: to.append("a"))
        if fenced:
            other.wait_stream(one)
        other.enqueue(lambda to=log: to.append("b"))
        one.enqueue(lambda to=log: to.append("c"))
        one.synchronize()
        other.synchronize()
        seen.add("".join(log))
    return seen


def test_streams_run_in_order_and_beside_each_other() -> None:
    assert orders(fenced=False) == {"abc", "bac", "acb"}


def test_a_fence_orders_what_follows_it() -> None:
    assert orders(fenced=True) == {"abc", "acb"}


@pytest.mark.parametrize("seed", SEEDS)
class TestEvent:
    def test_never_recorded_is_complete_and_nothing_to_wait_for(self, seed: int) -> None:
        virtual_cuda.reset(seed)
        stream, event = Stream(), Event()
        assert event.query()
        stream.wait_event(event)
        event.record(held := Stream())
        held.held = True
        stream.synchronize()

    def test_recorded_again_it_means_the_new_place(self, seed: int) -> None:
        virtual_cuda.reset(seed)
        first, second, waiting = Stream(), Stream(), Stream()
        second.held = True
        event = first.record_event()
        waiting.wait_event(event)
        event.record(second)
        # Who waited before waits for the first place only.
        waiting.synchronize()
        assert not event.query()
        waiting.wait_event(event)
        with pytest.raises(Hang):
            waiting.synchronize()

    def test_it_is_complete_when_its_place_is_reached(self, seed: int) -> None:
        virtual_cuda.reset(seed)
        stream, done = Stream(), []
        stream.enqueue(lambda: done.append(1))
        event = stream.record_event()
        stream.enqueue(lambda: done.append(2))
        while not event.query():
            pass
        assert 1 in done

    def test_time(self, seed: int) -> None:
        virtual_cuda.reset(seed)
        stream, begin, end = Stream(), Event(enable_timing=True), Event(enable_timing=True)
        begin.record(stream)
        stream.enqueue(lambda: None)
        with pytest.raises(ValueError, match="must be recorded"):
            begin.elapsed_time(end)
        stream.held = True
        end.record(stream)
        with pytest.raises(ValueError, match="must be completed"):
            begin.elapsed_time(end)
        stream.held = False
        end.synchronize()
        assert begin.elapsed_time(end) == 2
        with pytest.raises(ValueError, match="enable_timing"):
            begin.elapsed_time(Event())


def test_a_seed_is_an_order() -> None:
    def order(seed: int) -> list[int]:
        virtual_cuda.reset(seed)
        log: list[int] = []
        streams = [Stream() for _ in range(4)]
        for nth, stream in enumerate(streams * 3):
            stream.enqueue(lambda nth=nth: log.append(nth))
        for stream in streams:
            stream.synchronize()
        return log

    assert order(7) == order(7)
    assert len({tuple(order(seed)) for seed in SEEDS}) > 10
