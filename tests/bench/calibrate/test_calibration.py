"""From measured times to numbers: what rounds agree on becomes a rule, all else a refusal with a reason."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hicache.bench.calibrate import machine_policy
from sglang_hicache.bench.calibrate.calibration import (
    TOLERANCE,
    Choice,
    InconclusiveError,
    Segment,
    best_value,
    segments,
)
from sglang_hicache.bench.calibrate.run import Calibration, Plan, conclude
from sglang_hicache.io_backends.policy_files import default_policy, policy_in_force
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.routes import WriteFacts
from sglang_hicache.policy.unfenced import losses

SIZES = [2**n for n in range(11, 19)]
Times = dict[str, dict[int, list[float]]]


def crossing(at: int, rounds: int = 3, noise: float = 0.0, seed: int = 0) -> Times:
    """The kernel is best below ``at`` bytes an entry, copy_engine from there; hybrid is never."""
    rng = random.Random(seed)

    def some(ms: float) -> list[float]:
        return [ms * (1 + rng.uniform(-noise, noise)) for _ in range(rounds)]

    return {
        "fenced_kernel": {size: some(10.0) for size in SIZES},
        "copy_engine": {size: some(5.0 if size >= at else 20.0) for size in SIZES},
        "hybrid": {size: some(40.0) for size in SIZES},
    }


def test_the_number_is_the_smallest_size_at_which_it_won() -> None:
    found = segments(crossing(16384))
    assert found == (
        Segment("fenced_kernel", 2048, 2048, 2048),
        Segment("copy_engine", 16384, 16384, 16384),
    )


@given(step=st.integers(1, len(SIZES) - 1), noise=st.floats(0, 0.2), seed=st.integers(0, 999))
def test_noise_that_is_smaller_than_the_gaps_changes_nothing(step: int, noise: float, seed: int) -> None:
    found = segments(crossing(SIZES[step], noise=noise, seed=seed))
    assert [(each.backend, each.at_least) for each in found] == [
        ("fenced_kernel", SIZES[0]),
        ("copy_engine", SIZES[step]),
    ]


def test_ties_go_to_what_takes_less_of_the_sms() -> None:
    tied = {
        name: {1024: [10.0, 10.0], 2048: [10.2, 10.1]} for name in ("fenced_kernel", "hybrid", "copy_engine")
    }
    assert [each.backend for each in segments(tied)] == ["copy_engine"]
    del tied["copy_engine"]
    assert [each.backend for each in segments(tied)] == ["hybrid"]
    barely = {"hybrid": {1024: [10.0 * (1 + TOLERANCE) * 1.001] * 2}, "fenced_kernel": {1024: [10.0] * 2}}
    assert [each.backend for each in segments(barely)] == ["fenced_kernel"]


def test_rounds_one_step_apart_agree_and_the_spread_says_so() -> None:
    times = crossing(16384)
    times["copy_engine"][8192][0] = 5.0  # the first round changes a step earlier
    found = segments(times)
    assert found[1] == Segment("copy_engine", 16384, 8192, 16384)


def test_rounds_that_disagree_give_no_number_and_are_quoted() -> None:
    times = crossing(16384)
    for size in (2048, 4096, 8192):
        times["copy_engine"][size][0] = 5.0
    with pytest.raises(
        InconclusiveError, match=r"the rounds disagree.*round 1: copy_engine from 2,048 bytes"
    ):
        segments(times)
    times = crossing(32768)
    times["copy_engine"][8192][1] = times["copy_engine"][16384][1] = 5.0
    with pytest.raises(InconclusiveError, match=r"disagree about copy_engine.*round 2: .*from 8,192"):
        segments(times)


def test_non_monotone_times_have_no_one_point() -> None:
    times = crossing(16384)
    times["copy_engine"][65536] = [20.0] * 3
    with pytest.raises(InconclusiveError, match=r"round 1 has no one point where it changes"):
        segments(times)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda t: t["hybrid"].pop(4096), "hybrid has no times at 4096"),
        (lambda t: t["hybrid"][4096].clear(), "hybrid has no times at 4096"),
        (lambda t: t["hybrid"][4096].pop(), "the number of rounds differs"),
        (lambda t: [t.pop("hybrid"), t.pop("copy_engine")], "only fenced_kernel was measured"),
        (lambda t: t.clear(), "only nothing was measured"),
        (
            lambda t: [ms.clear() or ms.append(1.0) for s in t.values() for ms in s.values()],
            "one round has no",
        ),
        (lambda t: t["hybrid"].update({4096: [1.0, 0.0, 1.0]}), "not above 0"),
    ],
)
def test_what_is_missing_is_refused(damage: Any, why: str) -> None:
    times = crossing(16384)
    damage(times)
    with pytest.raises(InconclusiveError, match=why):
        segments(times)


@st.composite
def any_times(draw: st.DrawFn) -> Times:
    sizes = draw(st.lists(st.integers(1, 2**20), min_size=1, max_size=5, unique=True))
    names = draw(
        st.lists(st.sampled_from(["copy_engine", "hybrid", "fenced_kernel"]), min_size=2, unique=True)
    )
    rounds = draw(st.integers(2, 4))
    ms = st.lists(st.sampled_from([1.0, 1.02, 1.5, 3.0]), min_size=rounds, max_size=rounds)
    return {name: {size: draw(ms) for size in sizes} for name in names}


@given(any_times())
@settings(max_examples=300)
def test_any_answer_is_one_that_each_round_supports_within_a_step(times: Times) -> None:
    try:
        found = segments(times)
    except InconclusiveError:
        return
    sizes = sorted(next(iter(times.values())))
    assert found[0].at_least == sizes[0]
    assert all(a.at_least < b.at_least for a, b in pairwise(found))
    assert len({each.backend for each in found}) == len(found)
    rounds = len(next(iter(times[found[0].backend].values())))
    for size in sizes:
        chosen = next(each.backend for each in reversed(found) if each.at_least <= size)
        edges = [sizes.index(each.at_least) for each in found[1:]]
        if any(abs(sizes.index(size) - edge) <= 1 for edge in edges):
            continue
        for n in range(rounds):
            fastest = min(sweep[size][n] for sweep in times.values())
            assert times[chosen][size][n] <= fastest * (1 + TOLERANCE)


@given(any_times(), st.randoms())
def test_the_order_of_backends_and_sizes_does_not_matter(times: Times, rng: random.Random) -> None:
    def answer(given: Times) -> object:
        try:
            return segments(given)
        except InconclusiveError:
            return None

    names = list(times)
    rng.shuffle(names)
    shuffled = {}
    for name in names:
        sizes = list(times[name])
        rng.shuffle(sizes)
        shuffled[name] = {size: times[name][size] for size in sizes}
    assert answer(times) == answer(shuffled)


def test_the_best_value_is_the_least_that_is_as_fast_as_any() -> None:
    times = {8: [20.0, 20.0], 16: [10.2, 10.1], 32: [10.0, 10.0], 64: [10.1, 9.9]}
    assert best_value(times) == Choice(16, 16, 16)
    assert best_value({8: [10.2, 12.0], 16: [10.0, 10.0]}) == Choice(16, 8, 16)
    with pytest.raises(InconclusiveError, match="round 1 says 8, round 2 says 32"):
        best_value({8: [10.0, 20.0], 16: [10.0, 20.0], 32: [10.0, 10.0]})
    with pytest.raises(InconclusiveError, match="nothing to compare"):
        best_value({8: [10.0, 10.0]})


# The rules.

GPU = {
    "ran_on": "GPU",
    "gpu": "NVIDIA H200",
    "gpu_arch": "sm90",
    "driver": "580.159.04",
    "cuda": "13.0",
    "torch": "2.11.0",
    "date": "2026-11-24 00:00:00 UTC",
    "command": "hicache-io calibrate",
}
CPU = {**GPU, "ran_on": "CPU", "gpu": None, "cpu": "some CPU"}


def calibrated(times: Mapping[str, Times], environment: dict[str, Any] = GPU) -> Calibration:
    found = Calibration(environment, Plan(), dict(times))
    conclude(found)
    return found


def sweeps() -> dict[str, Times]:
    return {
        "layer_first": crossing(16384),
        "gather_ctas": {"hybrid": {8: [20.0, 20.0], 16: [10.0, 10.0], 32: [10.0, 10.0]}},
        "page_first": {
            "fenced_kernel": {73728: [10.0] * 2, 1179648: [10.0] * 2},
            "copy_engine": {73728: [90.0] * 2, 1179648: [90.0] * 2},
            "hybrid": {73728: [15.0] * 2, 1179648: [10.1] * 2},
        },
    }


def route(text: str, layout: str, entry_bytes: int, **facts: Any) -> Any:
    known = {
        "attention_backend": "triton",
        "gpu_arch": "sm90",
        "gpu_name": "NVIDIA H200",
        "device": "cuda",
        "kv_kind": "mha",
        "mem_layout": layout,
        "page_size": 16,
        "speculative": "none",
    }
    decision = decide(machine_policy.check(text), Facts.given(**{**known, **facts}))
    write = WriteFacts(tokens=64, entries=10, nbytes=10 * entry_bytes, runs=4)
    return decision.routes[decision.route(write)]


def test_the_rules_send_each_write_where_it_was_fastest_and_say_why() -> None:
    text = calibrated(sweeps()).text()
    assert text is not None
    short = route(text, "layer_first", 16383)
    assert (short.backend, short.layer) == ("fenced_kernel", "machine file")
    long = route(text, "layer_first", 16384)
    assert (long.backend, long.fence_forward) == ("copy_engine", ())
    for cited in ("NVIDIA H200", "580.159.04", "2026-11-24", "hicache-io calibrate", "16,384"):
        assert cited in long.because
    packed = route(text, "page_first", 2_000_000)
    assert packed.backend == "hybrid"
    assert dict(packed.options) == {"gather_ctas": 16}


@pytest.mark.parametrize("environment", [GPU, CPU])
def test_the_rules_fit_80_columns(environment: dict[str, Any]) -> None:
    text = calibrated(sweeps(), environment).text()
    assert text is not None
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)


def test_the_rules_hold_for_this_gpu_and_what_was_measured_only() -> None:
    text = calibrated(sweeps()).text()
    assert text is not None
    for other in (
        {"gpu_name": "NVIDIA H100 80GB HBM3"},
        {"gpu_arch": "sm100"},
        {"kv_kind": "mla"},
        {"mem_layout": "page_first_direct"},
        {"attention_backend": "fa3"},
        {"prefill_attention_backend": "fa3", "decode_attention_backend": "triton"},
        {"speculative": "EAGLE"},
    ):
        assert route(text, "layer_first", 65536, **other).layer == "shipped default", other


def test_no_protection_is_taken_away() -> None:
    text = calibrated(sweeps()).text()
    assert text is not None
    assert not list(losses(default_policy(), machine_policy.check(text)))
    assert "fa3" not in machine_policy.without_fences(default_policy(), "sm90", "mha")
    assert "triton" in machine_policy.without_fences(default_policy(), "sm90", "mha")


def test_a_layout_that_was_refused_has_no_rule_and_the_others_do() -> None:
    times = sweeps()
    times["layer_first"]["copy_engine"][65536] = [20.0] * 3
    found = calibrated(times)
    assert "no one point" in found.refused["layer_first"]
    text = found.text()
    assert text is not None
    assert "layer-first" not in text
    assert "page-first" in text
    del times["page_first"]
    assert calibrated(times).text() is None


def test_a_backend_that_was_not_measured_leaves_the_layout_to_the_shipped_rules() -> None:
    found = Calibration(GPU, Plan(), sweeps())
    found.refused["layer_first"] = "fenced_kernel was not measured: no SGLang"
    conclude(found)
    assert set(found.segments) == {"page_first"}
    assert found.to_dict()["refused"] == {"layer_first": "fenced_kernel was not measured: no SGLang"}


def test_rules_from_a_cpu_say_so_hold_for_no_gpu_and_are_not_installed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = calibrated(sweeps(), CPU).text()
    assert text is not None
    assert "NOT FOR USE" in text.splitlines()[1]
    assert "says nothing about the speed of a GPU" in " ".join(text.split())
    assert route(text, "layer_first", 65536).layer == "shipped default"
    machine = tmp_path / "machine.yaml"
    monkeypatch.setenv("SGLANG_HICACHE_IO_MACHINE_POLICY", str(machine))
    with pytest.raises(machine_policy.NotInstallableError, match="says nothing about the speed"):
        machine_policy.install(text, machine, CPU)
    assert not machine.exists()
    machine_policy.install(text, tmp_path / "other.yaml", CPU)
    assert (tmp_path / "other.yaml").read_text() == text
    good = calibrated(sweeps()).text()
    assert good is not None
    before = os.umask(
        0
    )  # as wide as it gets: the machine's file is read only if its owner alone can write it
    try:
        machine_policy.install(good, machine, GPU)
        assert machine_policy.check(good).source
    finally:
        os.umask(before)
    assert machine.read_text() == good
    assert policy_in_force().layer("calibrated-layer-first-copy-engine") == "machine file"
    assert not list(tmp_path.glob("*.part"))


def test_a_link_to_the_machines_file_stays_one(tmp_path: Any) -> None:
    link, kept = tmp_path / "machine.yaml", tmp_path / "kept" / "machine.yaml"
    link.symlink_to(kept)
    for rules in ("rules: []\n", "rules: [{}]\n"):
        machine_policy.install(rules, link, GPU)
        assert link.is_symlink()
        assert kept.read_text() == rules
