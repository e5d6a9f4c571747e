"""Who waits for whom, by the events that are recorded and waited for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_in_scheduler import scheduler

from sglang_hicache.io_backends.sglang.errors import RefusedError
from sglang_hicache.io_backends.sglang.launcher import resolution
from sglang_hicache.io_backends.sglang.scheduler.fences import Fences, forwards_of

EXTEND, DECODE = frozenset({"extend"}), frozenset({"decode"})
BOTH = EXTEND | DECODE


class Recorded(NamedTuple):
    stream: str
    nth: int


class Streams:
    """A device of which only the order of records and waits is of interest."""

    def __init__(self, current: str = "schedule") -> None:
        self.current = current
        self.log: list[tuple[str, str, Any]] = []

    def current_stream(self) -> str:
        return self.current

    def record(self, stream: str) -> Recorded:
        event = Recorded(stream, len(self.log))
        self.log.append(("record", stream, event))
        return event

    def wait(self, stream: str, event: Any) -> None:
        self.log.append(("wait", stream, event))

    def waits(self) -> list[tuple[str, Any]]:
        return [(stream, event) for what, stream, event in self.log if what == "wait"]


def fences(device: Streams, *, overlap: bool = True, producer: bool = True) -> Fences:
    return Fences(device, scheduler("forward", enable_overlap=overlap), producer=producer)  # type: ignore[arg-type]


class TestProducerFence:
    def test_it_is_of_the_present_call(self) -> None:
        device = Streams()
        made = fences(device)
        first, second = made.ready(), made.ready()
        assert [event.stream for event in first] == ["forward", "schedule"]
        assert not set(first) & set(second)

    def test_the_last_one_waits_for_no_forward(self) -> None:
        """The host waits for it, for the indices."""
        assert fences(Streams()).ready()[-1].stream == "schedule"

    def test_one_stream_is_one_event(self) -> None:
        assert [event.stream for event in fences(Streams("forward")).ready()] == ["forward"]

    def test_without_overlap_it_is_the_stream_that_forwards_were_launched_on(self) -> None:
        """Also where somebody waits for a write while another stream is current."""
        device = Streams()
        made = fences(device, overlap=False)
        made.before_forward(BOTH)
        device.current = "load"
        assert {event.stream for event in made.ready()} == {"forward", "schedule", "load"}

    def test_left_out_only_the_indices_are_waited_for(self) -> None:
        made = fences(Streams(), overlap=False, producer=False)
        made.before_forward(BOTH)
        assert [event.stream for event in made.ready()] == ["schedule"]


class TestForwardFence:
    def test_under_overlap_the_forward_stream_waits(self) -> None:
        device = Streams()
        made = fences(device)
        made.sm_work("hybrid", BOTH, "gathered")
        assert made.before_forward(DECODE) == 1
        assert device.waits() == [("forward", "gathered")]

    def test_without_overlap_the_current_stream_waits_too(self) -> None:
        """That is where SGLang launches then; with pipeline parallelism it is the forward stream."""
        device = Streams()
        made = fences(device, overlap=False)
        made.sm_work("hybrid", BOTH, "gathered")
        assert made.before_forward(DECODE) == 1
        assert sorted(device.waits()) == [("forward", "gathered"), ("schedule", "gathered")]
        device.current = "forward"
        made.sm_work("hybrid", BOTH, "gathered again")
        made.before_forward(DECODE)
        assert device.waits()[2:] == [("forward", "gathered again")]

    def test_a_stream_that_has_not_waited_does(self) -> None:
        device = Streams("one")
        made = fences(device, overlap=False)
        made.sm_work("hybrid", BOTH, "gathered")
        made.before_forward(DECODE)
        device.current = "two"
        assert made.before_forward(EXTEND) == 1
        assert ("two", "gathered") in device.waits()
        assert made.before_forward(BOTH) == 0

    def test_only_those_that_are_listed(self) -> None:
        made = fences(Streams())
        made.sm_work("hybrid", EXTEND, "gathered")
        made.sm_work("copy_engine", frozenset(), "nobody waits for this")
        made.sm_work("hybrid", BOTH, None)
        assert made.before_forward(DECODE) == 0
        assert made.before_forward(BOTH) == 1

    def test_each_source_and_stream_of_its_own(self) -> None:
        """None of their events covers another."""
        device = Streams()
        made = fences(device)
        engines = [SimpleNamespace() for _ in range(2)]
        for engine in engines:
            made.sm_work(None, BOTH, f"copied {id(engine)}", engine)
        made.sm_work("hybrid", BOTH, "gathered")
        made.sm_work("hybrid", EXTEND, "gathered for a prefill")
        assert made.before_forward(EXTEND) == 4

    @given(
        st.lists(
            st.one_of(
                st.tuples(
                    st.just("work"), st.sampled_from(["a", "b"]), st.sampled_from([EXTEND, DECODE, BOTH])
                ),
                st.tuples(
                    st.just("forward"), st.sampled_from(["one", "two"]), st.sampled_from([EXTEND, DECODE])
                ),
            ),
            max_size=20,
        ),
        st.booleans(),
    )
    def test_no_listed_forward_runs_beside_earlier_sm_work(
        self, program: list[tuple[str, str, frozenset[str]]], overlap: bool
    ) -> None:
        """Work of a source is done in order: waiting for its last is waiting for all of it."""
        device = Streams()
        made = fences(device, overlap=overlap)
        enqueued: dict[tuple[str, frozenset[str]], list[int]] = {}
        for nth, (what, name, forwards) in enumerate(program):
            if what == "work":
                made.sm_work(name, forwards, nth)
                enqueued.setdefault((name, forwards), []).append(nth)
                continue
            device.current = name
            made.before_forward(forwards)
            on = "forward" if overlap else name
            waited = {event for stream, event in device.waits() if stream == on}
            for (_, listed), events in enqueued.items():
                if listed & forwards:
                    assert events[-1] in waited


@pytest.mark.parametrize(
    ("mode", "speculative", "expected"),
    [
        ("DECODE", False, DECODE),
        ("IDLE", False, DECODE),
        ("EXTEND", False, EXTEND),
        ("MIXED", False, EXTEND),
        ("SPLIT_PREFILL", False, EXTEND),
        ("TARGET_VERIFY", False, EXTEND),
        # A speculative step launches drafts (decode), verification and draft extension (extend).
        ("DECODE", True, BOTH),
        ("EXTEND", True, BOTH),
        ("TARGET_VERIFY", True, BOTH),
        ("IDLE", True, BOTH),
        ("PREBUILT", False, frozenset()),
        ("PREBUILT", True, frozenset()),
    ],
)
def test_what_a_batch_launches(
    cpu_sglang: None, mode: str, speculative: bool, expected: frozenset[str]
) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    assert forwards_of(ForwardMode[mode], speculative=speculative) == expected


@pytest.mark.parametrize("option", ["use_ray", "enable_pdmux", "enable_hisparse"])
def test_what_would_pass_the_fences_is_refused(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setattr(resolution, "unavailable", lambda device: None)
    config = SimpleNamespace(device="cuda", **{option: True})
    with pytest.raises(RefusedError, match="--" + option.replace("_", "-")) as refused:
        resolution._refuse_what_is_not_covered(config, "auto")
    assert "start with --hicache-io-backend kernel" in str(refused.value)
    setattr(config, option, False)
    resolution._refuse_what_is_not_covered(config, "auto")
