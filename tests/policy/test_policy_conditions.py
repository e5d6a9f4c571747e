"""Conditions as sets, against brute force; and that a rule is only refused when nothing can reach it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, example
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from policy_strategies import accepted, facts, given, holds, whens

from sglang_hicache.policy.conditions import PageSizes, Versions
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.reach import never_matches, shadows
from sglang_hicache.policy.schema import When

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
def test_page_sizes_are_sets_of_numbers(first: Any, second: Any):
    these = PageSizes.of(written(first))
    assert [size for size in SIZES if these.holds(size)] == [size for size in SIZES if satisfied(first, size)]
    assert these.is_empty() == (not any(satisfied(first, size) for size in SIZES))
    covered = all(satisfied(second, size) for size in SIZES if satisfied(first, size))
    assert these.within(PageSizes.of(written(second))) == covered


def test_a_page_size_is_a_number():
    everything = PageSizes.of([">=1"])
    assert not everything.holds("64")
    assert everything.holds(10**9)


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


def conditions(when: dict[str, Any]) -> dict[str, Any]:
    # model_construct does not validate, so that a contradiction gets this far; it does not normalise either.
    listed = {key: tuple(value) if isinstance(value, list) else (value,) for key, value in when.items()}
    return When.model_construct(**listed).conditions()


@given(whens(), facts)
def test_a_rule_refused_alone_matches_nothing(when: dict[str, Any], known: Facts):
    """Within one machine: a GPU's architecture and the device cpu do not meet."""
    arch, device = known.value("gpu_arch"), known.value("device")
    assume(arch is None or device is None or (arch == "cpu") == (device == "cpu"))
    if never_matches(conditions(when)):
        assert not holds(when, known)


@given(whens(), whens(), facts)
def test_a_rule_refused_for_an_earlier_one_is_covered(
    first: dict[str, Any], second: dict[str, Any], known: Facts
):
    narrower = {**first, **second}  # often covered, seldom by chance alone
    for later in (second, narrower):
        if shadows(conditions(first), conditions(later)) and holds(later, known):
            assert holds(first, known)


def test_the_strategy_reaches_both_sides():
    """The two tests above say nothing if no rule is ever refused, or all are."""
    rule = {"name": "a", "use": {"backend": "hybrid"}, "because": "seen"}
    document = {"version": 1, "default": {"use": {"backend": "hybrid"}, "because": "seen"}}
    seen = set()

    @given(whens(), whens())
    def collect(first: dict[str, Any], second: dict[str, Any]) -> None:
        rules = [{**rule, "when": first}, {**rule, "when": {**first, **second}, "name": "b"}]
        seen.add(accepted({**document, "rules": rules}))

    collect()
    assert seen == {True, False}
