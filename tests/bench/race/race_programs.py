"""Any sequence of requests, rounds, aborts and resets keeps every row right, and nothing races.

Run by test_race.py, as race_cases.py is.
"""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, find, given, note, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from race_cases import experiment, keep_all

from sglang_hicache.bench.race.kept_fences import KeptFences
from sglang_hicache.bench.race.simulation.experiment import Experiment, LeaveOut, Run, left_out
from sglang_hicache.bench.race.simulation.workload import (
    Abort,
    Action,
    Flush,
    NewRequest,
    RunRounds,
    from_text,
    to_text,
)
from sglang_hicache.io_backends.registry import AUTO

pytestmark = pytest.mark.usefixtures("libcuda")

UNIT = 4

ASKS = st.builds(
    NewRequest,
    conversation=st.integers(0, 2),
    keep=st.integers(0, 8),
    fresh=st.integers(1, 6 * UNIT),
    output=st.integers(1, UNIT + 2),
)
ACTIONS = (
    ASKS | st.builds(RunRounds, st.integers(1, 8)) | st.builds(Abort, st.integers(0, 7)) | st.just(Flush())
)
PROGRAMS = st.lists(ACTIONS, min_size=1, max_size=14)
SEEDS = st.integers(0, 10_000)

EXAMPLES = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


def command(backend: str, fences: KeptFences, seed: int, program: list[Action]) -> str:
    """What replays it."""
    options = ["--backend", backend, "--fences", fences, "--page-size", "4", "--seed", str(seed)]
    return shlex.join(["hicache-io", "race", *options, "--program", to_text(program)])


def is_bad(run: Run) -> bool:
    return bool(run.races or run.wrong_rows or run.wrong_reads)


@given(PROGRAMS)
def test_programs_are_text(program: list[Action]) -> None:
    assert from_text(to_text(program)) == program


@pytest.mark.parametrize("word", ["ask:1", "ask:0,0,1,x", "step", "flush:1", "wait:3", "step:-1"])
def test_what_is_no_program(word: str) -> None:
    with pytest.raises(ValueError, match="is not an action"):
        from_text(f"step:1 {word}")


@pytest.mark.parametrize("backend", ["fenced_kernel", "copy_engine", "hybrid", AUTO])
def test_nothing_races_and_every_row_is_right(backend: str) -> None:
    made = experiment(backend)

    @EXAMPLES
    @given(SEEDS, PROGRAMS)
    def check(seed: int, program: list[Action]) -> None:
        note(command(backend, "auto", seed, program))
        run = made.run(seed, keep_all, program)
        assert not is_bad(run), [str(race) for race in run.races]

    check()


def smallest(made: Experiment, leave_out: LeaveOut) -> tuple[int, list[Action]]:
    """The simplest program, and seed, in which something is wrong."""

    def wrong(case: Any) -> bool:
        return is_bad(made.run(case[0], leave_out, case[1]))

    limits = settings(EXAMPLES, max_examples=200, phases=(Phase.generate, Phase.shrink), database=None)
    return find(st.tuples(SEEDS, PROGRAMS), wrong, settings=limits)


@pytest.mark.parametrize("fences", [KeptFences.none, KeptFences.producer])
def test_a_missing_fence_is_shrunk_to_one_that_replays(fences: KeptFences, capsys: Any) -> None:
    made = experiment("fenced_kernel", fences)
    try:
        seed, program = smallest(made, left_out(fences))
    except NoSuchExample:
        pytest.fail("the missing fence was not found")
    with capsys.disabled():
        print(f"\n  {command('fenced_kernel', fences, seed, program)}")
    # One request that is written while a forward runs is enough.
    assert len(program) <= 2
    assert [action for action in program if isinstance(action, NewRequest)]
    again = made.run(seed, left_out(fences), from_text(to_text(program)))
    assert is_bad(again)
