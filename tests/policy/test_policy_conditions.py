"""Conditions as sets, against brute force; and that a rule is only refused when nothing can reach it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, example
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from policy_strategies import (
    SURVEY,
    accepted,
    facts_for,
    given,
    holds,
    holds_for,
    tolerated,
    unknowns,
    whens,
    writes,
)

from sglang_hicache.policy.conditions import Flags, Numbers
from sglang_hicache.policy.format.reachability import Reach, never_matches, shadows
from sglang_hicache.policy.format.schema import When
from sglang_hicache.policy.routes import WriteFacts
from sglang_hicache.policy.version_sets import Versions

SIZES = range(1, 40)  # past every number below, so that it stands for all sizes
numbers = st.integers(0, 30)
comparisons = st.tuples(st.sampled_from(["<", "<=", ">", ">=", "==", "!=", ""]), numbers)
page_conditions = st.lists(st.lists(comparisons, min_size=1, max_size=3), min_size=1, max_size=3)


def written(condition: list[list[tuple[str, int]]]) -> list[str]:
    return [",".join(f"{sign}{number}" for sign, number in parts) for parts in condition]


def satisfied(condition: list[list[tuple[str, int]]], size: int) -> bool:
    compare = {
        "<": int.__lt__,
        "<=": int.__le__,
        ">": int.__gt__,
        ">=": int.__ge__,
        "==": int.__eq__,
        "": int.__eq__,
        "!=": int.__ne__,
    }
    return any(all(compare[sign](size, number) for sign, number in parts) for parts in condition)


@given(page_conditions, page_conditions)
@example([[("", 5)], [(">=", 5)]], [[("==", 5)]])  # spans that start alike, one without an end
def test_numbers_are_sets_of_numbers(first: Any, second: Any):
    these = Numbers.of(written(first))
    assert [size for size in SIZES if these.holds(size)] == [size for size in SIZES if satisfied(first, size)]
    assert these.is_empty() == (not any(satisfied(first, size) for size in SIZES))
    covered = all(satisfied(second, size) for size in SIZES if satisfied(first, size))
    assert these.within(Numbers.of(written(second))) == covered


def test_a_number_is_no_text_and_no_flag():
    everything = Numbers.of([">=1"])
    assert not everything.holds("64")
    assert not everything.holds(True)
    assert not everything.holds(0)
    assert everything.holds(10**9)
    assert not Flags(frozenset({True})).holds(1)


releases = st.lists(st.integers(0, 3), min_size=1, max_size=3).map(lambda parts: ".".join(map(str, parts)))


@st.composite
def specifier_sets(draw: st.DrawFn) -> str:
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        sign = draw(st.sampled_from([">=", "<=", "<", ">", "==", "!=", "~="]))
        version = draw(releases)
        if sign == "~=" and "." not in version:
            version += ".0"
        if draw(st.booleans()):
            version += f".post{draw(st.integers(0, 2))}"
        elif sign in ("==", "!=") and draw(st.booleans()):
            version += ".*"
        parts.append(sign + version)
    return ",".join(parts)


@pytest.mark.skipif(not hasattr(SpecifierSet, "is_unsatisfiable"), reason="packaging before 26.1 cannot tell")
@given(specifier_sets(), specifier_sets())
@example("<1.1.1.post1", "<=1.1.1")  # 1.1.1.post0 is in the first alone
@example(">1.post0", ">=1.post1")  # 1.post1.dev0 is in the first alone
def test_version_sets_agree_with_packaging(first: str, second: str):
    these, those = SpecifierSet(first), SpecifierSet(second)
    assert Versions.of([first]).is_empty() == these.is_unsatisfiable()
    assert Versions.of([first]).within(Versions.of([second])) == these.is_subset(those)


@pytest.mark.parametrize(
    ("specifier", "version", "expected"),
    [
        (">=0.3", "0.3", True),
        (">=0.3", "0.2.9", False),
        (">=0.5.23", "0.5.24.dev1+g1", True),
        ("<0.4", "0.4.0rc1", False),
        (">=0.4.6", "0.4.6.post1", True),
        (">0.4.6", "0.4.6.post1", False),
        ("==0.5.23", "0.5.23+cu130", True),
        (">=0", "no version", False),
    ],
)
def test_versions_follow_pep_440(specifier: str, version: str, expected: bool):
    assert Versions.of([specifier]).holds(version) is expected


@pytest.mark.parametrize("entry", [">=1.0rc1,<0.9", "===1.0,<0.5", ">=1!0.1,<0.1", "==1.0+local,<0.5"])
def test_what_cannot_be_decided_is_let_through(entry: str):
    assert not Versions.of([entry]).is_empty()
    assert not Versions.of([entry]).within(Versions.of([">=0.1"]))


def reach(rule: dict[str, Any]) -> Reach:
    # model_construct does not validate, so that a contradiction gets this far; it does not normalise either.
    listed = {
        key: tuple(value) if isinstance(value, list) else (value,) for key, value in rule["when"].items()
    }
    return Reach(When.model_construct(**listed).conditions(), tolerated(rule))


@st.composite
def rules(draw: st.DrawFn, *, beside: dict[str, Any] | None = None) -> dict[str, Any]:
    when = {**(beside["when"] if beside else {}), **draw(whens())}
    return {"when": when, **draw(unknowns(when))}


@given(st.data(), writes)
def test_a_rule_refused_alone_matches_nothing(data: st.DataObject, write: WriteFacts):
    """Within one machine: a GPU's architecture and the device cpu do not meet."""
    rule = data.draw(rules())
    known = data.draw(facts_for(rule))
    arch, device = known.value("gpu_arch"), known.value("device")
    assume(arch is None or device is None or (arch == "cpu") == (device == "cpu"))
    found = reach(rule)
    if never_matches(found.conditions, found.unknown):
        assert not (holds(rule, known) and holds_for(rule, write))


@given(st.data(), writes)
def test_a_rule_refused_for_an_earlier_one_is_covered(data: st.DataObject, write: WriteFacts):
    first = data.draw(rules())
    # The second is often covered, which it seldom is by chance alone.
    for later in (data.draw(rules()), data.draw(rules(beside=first))):
        known = data.draw(facts_for(later))
        if shadows(reach(first), reach(later)) and holds(later, known) and holds_for(later, write):
            assert holds(first, known)
            assert holds_for(first, write)


def test_the_strategy_reaches_both_sides():
    """The two tests above say nothing if no rule is ever refused, or all are."""
    rule = {"use": {"backend": "hybrid"}, "because": "seen"}
    document = {"version": 1, "default": {"use": {"backend": "hybrid"}, "because": "seen"}}
    seen = set()

    @given(st.data(), **SURVEY)
    def collect(data: st.DataObject) -> None:
        first = data.draw(rules())
        second = data.draw(rules(beside=first))
        both = [{**rule, **first, "name": "a"}, {**rule, **second, "name": "b"}]
        seen.add(accepted({**document, "rules": both}))

    collect()
    assert seen == {True, False}
