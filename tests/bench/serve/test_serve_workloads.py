"""What the servers of `bench serve` are asked."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hicache.bench.serve import workloads
from sglang_hicache.bench.serve.workloads import Lane, Turn, Workload
from sglang_hicache.policy.names import NameProblem

POOLS = st.integers(1024, 131_072)
NAMED = st.sampled_from(workloads.NAMES)


@settings(max_examples=40, deadline=None)
@given(NAMED, POOLS, st.integers(2, 1000), st.integers(0, 2**31))
def test_a_workload_overflows_the_device_pool_and_each_conversation_fits(
    name: str, pool: int, vocab: int, seed: int
) -> None:
    made = workloads.maker(name)(pool, vocab, seed)
    assert made.name == name
    # Between two turns of a conversation what the others said must push it out.
    assert made.distinct_tokens() > 1.4 * pool
    assert made.longest() < 0.5 * pool
    for lane in made.lanes:
        assert 0 < lane.clients <= len(lane.conversations)
        for turn in (turn for each in lane.conversations for turn in each):
            assert turn.output_tokens >= 1
            assert 0 <= turn.seen_tokens < len(turn.new_ids)
            assert all(0 <= token < vocab for token in turn.new_ids[:50])


@settings(max_examples=20, deadline=None)
@given(NAMED, POOLS, st.integers(0, 2**31))
def test_the_same_seed_asks_the_same_and_another_one_something_else(name: str, pool: int, seed: int) -> None:
    make = workloads.maker(name)
    assert make(pool, 512, seed) == make(pool, 512, seed)
    assert make(pool, 512, seed) != make(pool, 512, seed + 1)


def test_at_the_pool_of_the_first_runs_chat_is_what_was_asked_there() -> None:
    shape = workloads.maker("chat")(65_536, 512, 0).shape()
    lane = shape["lanes"]["chat"]
    assert (lane["conversations"], lane["turns"], lane["clients"], lane["output_tokens"]) == (48, 4, 16, 64)
    assert abs(lane["first_prompt_tokens"] - 1024) <= 21
    assert shape["requests"] == 192


def test_prefill_answers_one_token_and_shares_nothing() -> None:
    made = workloads.maker("prefill")(65_536, 512, 0)
    turns = [turn for each in made.lanes[0].conversations for turn in each]
    assert {turn.output_tokens for turn in turns} == {1}
    assert len({tuple(turn.new_ids[:16]) for turn in turns}) == len(turns) == made.requests


def test_shared_sends_a_system_prompt_again_after_the_others() -> None:
    made = workloads.maker("shared")(65_536, 512, 0)
    (lane,) = made.lanes
    starts = [tuple(each[0].new_ids[:64]) for each in lane.conversations]
    groups = len(set(starts))
    assert starts == starts[:groups] * 4
    assert [each[0].seen_tokens > 0 for each in lane.conversations] == [False] * groups + [True] * 3 * groups
    again = lane.conversations[groups][0]
    assert again.new_ids[: again.seen_tokens] == lane.conversations[0][0].new_ids[: again.seen_tokens]


def test_decode_has_writers_beside() -> None:
    decoders, writers = workloads.maker("decode")(65_536, 512, 0).lanes
    assert decoders.conversations[0][0].output_tokens == 512
    assert {turn.output_tokens for each in writers.conversations for turn in each} == {1}
    assert len(writers.conversations[0][0].new_ids) > 30 * len(decoders.conversations[0][0].new_ids) * 0.9


def test_turns_of_all_come_before_the_next_turn_of_any() -> None:
    lane = Lane("x", [[Turn([1], 1)] * 2, [Turn([1], 1)], [Turn([1], 1)] * 2], 2)
    assert list(lane.order()) == [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1)]
    assert lane.requests == 5


def test_a_warm_up_is_the_beginning() -> None:
    made = workloads.maker("chat")(65_536, 512, 0)
    begun = workloads.warm_up(made)
    assert begun.requests == 8
    assert begun.lanes[0].conversations[0] == made.lanes[0].conversations[0][:2]
    assert isinstance(begun, Workload)


@pytest.mark.parametrize("name", workloads.NAMES)
def test_a_warm_up_of_the_host_pool_has_as_many_tokens_or_all(name: str) -> None:
    made = workloads.maker(name)(49_152, 512, 0)
    begun = workloads.warm_up(made, 3 * 49_152)
    assert begun.distinct_tokens() >= min(3 * 49_152, made.distinct_tokens())
    for lane, whole in zip(begun.lanes, made.lanes, strict=True):
        assert lane.conversations == whole.conversations[: len(lane.conversations)]
        assert lane.clients == whole.clients
    assert begun.distinct_tokens() < 1.3 * 3 * 49_152
    assert workloads.warm_up(made, 10**9).requests == made.requests


def test_a_prefill_turn_is_long_where_the_pool_is_that_of_a_gpu() -> None:
    assert workloads.maker("prefill")(49_152, 512, 0).requests == 240
    assert workloads.maker("prefill")(2048, 512, 0).requests == 48


def test_an_unknown_workload_gets_the_nearest_name() -> None:
    with pytest.raises(NameProblem, match="did you mean 'prefill'"):
        workloads.maker("prefil")
