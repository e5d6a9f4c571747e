"""Sizes, percentiles and words of a stress test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("aiohttp")

from sglang_hicache.bench.stress.account import Book, Times, first_difference
from sglang_hicache.bench.stress.load import CLIENT_SHARE, GROUP, WAVE_SHARE, Load, sized_for
from sglang_hicache.bench.workload import Answer


@given(st.integers(1024, 3_000_000), st.integers(1, 5), st.integers(0, 2**31))
def test_a_load_overflows_the_device_pool_and_fits_its_clients(pool: int, turns: int, seed: int) -> None:
    load = sized_for(pool, vocab_size=512, turns=turns, seed=seed)
    longest = load.shared_tokens + load.own_tokens + (turns - 1) * load.follow_up_tokens
    longest += turns * load.output_tokens
    new = load.conversations * longest - load.conversations * load.shared_tokens * (GROUP - 1) / GROUP
    # Both the new conversations and the old ones that are asked with them.
    assert 2 * new >= pool * min(1.0, WAVE_SHARE)
    assert load.clients == 1 or load.clients * longest <= pool
    assert load.clients >= min(64, int(CLIENT_SHARE * pool / (1.3 * longest)))


@given(st.integers(0, 5), st.integers(0, 2**31))
def test_a_wave_asks_the_one_before_again(number: int, seed: int) -> None:
    load = sized_for(1024, vocab_size=100, seed=seed)
    wave = load.wave(number)
    asked = [(each.wave, each.number) for each in wave]
    assert len(set(asked)) == len(asked) == load.conversations * (2 if number else 1)
    assert {each.wave for each in wave} == ({number, number - 1} if number else {0})
    again = {(each.wave, each.number): each.texts for each in load.wave(number + 1)}
    for each in wave:
        if each.wave == number:
            assert again[each.wave, each.number] == each.texts
    first = [each.texts[0][: load.shared_tokens] for each in load.new(number)]
    assert first[0] == first[min(GROUP, len(first)) - 1]
    assert all(0 <= token < 100 for each in wave for text in each.texts for token in text)


def test_prompts_go_on_with_the_answers_that_were_given() -> None:
    load = Load(2, 3, 3, 8, 2, 4, 1, 50)
    conversation = load.new(0)[0]
    first, second, third = conversation.texts
    assert conversation.prompt([]) == list(first)
    assert conversation.prompt([[7, 8], [9]]) == [*first, 7, 8, *second, 9, *third]


def test_a_conversation_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="has room for 100"):
        sized_for(100_000, vocab_size=512, context_tokens=100, prompt_tokens=90)


@given(st.lists(st.floats(1e-5, 1e4), min_size=1, max_size=200), st.sampled_from([50, 90, 99, 100]))
def test_percentiles_are_two_percent_right(seconds: Sequence[float], percent: int) -> None:
    times = Times()
    times.add(seconds)
    exact = float(np.percentile(seconds, percent, method="inverted_cdf"))
    found = times.percentile(percent)
    assert found is not None
    assert exact * (1 - 1e-9) <= found <= exact * 1.0201


def test_no_times_have_no_percentiles() -> None:
    assert set(Times().to_dict().values()) == {None}


def test_the_first_difference() -> None:
    answer = Answer((1, 2, 3), 10, 0, 0)
    assert first_difference(answer, Answer((1, 2, 3), 10, 4, 6)) is None
    assert first_difference(answer, Answer((1, 5, 4), 10, 0, 0)) == 1


def test_a_book_forgets_what_is_not_asked_again() -> None:
    book = Book()
    for wave in range(3):
        book.keep((wave, 0, 0), Answer((wave,), 1, 0, 0))
    book.forget_before(2)
    assert [book.reference((wave, 0, 0)) is not None for wave in range(3)] == [False, False, True]
    assert book.answers(2, 0, 1) == [(2,)]
    assert book.answers(2, 0, 2) is None
    assert book.answers(1, 0, 0) == []
