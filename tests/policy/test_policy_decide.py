"""Decisions: the first rule that matches, the fences it means, and what a backend by hand keeps of it."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import assume
from hypothesis import strategies as st
from policy_strategies import accepted, documents, facts, given, holds, policy, uses, whens

from sglang_hicache.io_backends.registry import register_backend, unregister_backend
from sglang_hicache.policy.decide import Decision, decide, describe
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.vocabulary import NameProblem

FA3_ON_HOPPER = Facts.given(attention_backend="fa3", gpu_arch="sm90")


def document(*rules: dict[str, Any], default: dict[str, Any] | None = None) -> dict[str, Any]:
    whole = [{"name": f"rule-{n}", "because": f"reason {n}", **rule} for n, rule in enumerate(rules)]
    use = default or {"backend": "hybrid"}
    return {"version": 1, "rules": whole, "default": {"use": use, "because": "nothing else"}}


@pytest.fixture
def third_party():
    register_backend("tape", lambda device, options: None)
    yield "tape"
    unregister_backend("tape")


def test_the_first_match_wins_and_ends_the_search():
    rules = policy(
        document(
            {"when": {"kv_kind": "mla"}, "use": {"backend": "copy_engine"}},
            {"when": {"gpu_arch": "sm90"}, "use": {"backend": "hybrid", "options": {"gather_ctas": 16}}},
            {"when": {"attention_backend": "fa3"}, "use": {"backend": "copy_engine"}},
        )
    )
    decision = decide(rules, FA3_ON_HOPPER)
    assert (decision.backend, decision.rule, decision.because) == ("hybrid", "rule-1", "reason 1")
    assert decision.options == {"gather_ctas": 16}
    assert decision.policy == "p.yaml"
    assert [(each.rule, each.matched) for each in decision.considered] == [
        ("rule-0", False),
        ("rule-1", True),
    ]
    assert decision.considered[0].reason == "kv_kind is unknown (the rule wants mla)"
    assert decision.considered[1].reason == "gpu_arch is sm90"


def test_without_a_match_the_default_decides():
    decision = decide(
        policy(document({"when": {"kv_kind": "mla"}, "use": {"backend": "copy_engine"}})), FA3_ON_HOPPER
    )
    assert (decision.backend, decision.rule, decision.because) == ("hybrid", "default", "nothing else")
    assert [(each.rule, each.matched) for each in decision.considered] == [
        ("rule-0", False),
        ("default", True),
    ]


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        ({"gpu_arch": "sm100"}, "gpu_arch is sm90 (the rule wants sm100)"),
        ({"page_size": "<64"}, "page_size is unknown (the rule wants <64)"),
        (
            {"attention_backend": ["triton", "fa4"], "kv_kind": "mla"},
            "prefill_attention_backend is fa3, decode_attention_backend is fa3 "
            "(the rule wants triton or fa4); kv_kind is unknown (the rule wants mla)",
        ),
    ],
)
def test_a_rule_says_every_reason_why_it_does_not_match(when: dict[str, Any], reason: str):
    decision = decide(policy(document({"when": when, "use": {"backend": "hybrid"}})), FA3_ON_HOPPER)
    assert decision.considered[0].reason == reason


@given(documents(), facts)
def test_decisions_follow_a_plain_reading_of_the_format(written: dict[str, Any], known: Facts):
    """Also: a file that validates never fails at decision time."""
    decision = decide(policy(written), known)
    expected = next((rule for rule in written["rules"] if holds(rule["when"], known)), None)
    use = (expected or written["default"])["use"]
    assert decision.rule == (expected["name"] if expected else "default")
    assert decision.backend == use["backend"]
    assert decision.options == use.get("options", {})
    assert [each.matched for each in decision.considered] == [False] * (len(decision.considered) - 1) + [True]
    if "uses" not in use.get("fence_forward", []):
        assert set(decision.fence_forward) == set(use.get("fence_forward", []))
    assert decision.fence_forward == tuple(f for f in ("extend", "decode") if f in decision.fence_forward)


@given(
    documents(),
    facts,
    st.sampled_from(["auto", "hybrid", "copy_engine", "fenced_kernel", "kernel", "direct"]),
)
def test_decisions_are_deterministic_and_travel(written: dict[str, Any], known: Facts, backend: str):
    decision = decide(policy(written), known, backend=backend)
    assert decide(policy(written), known, backend=backend) == decision
    plain = decision.to_dict()
    assert Decision.from_dict(json.loads(json.dumps(plain))) == decision
    assert Decision.from_dict(pickle.loads(pickle.dumps(plain))) == decision


@given(documents(), whens(), uses(), facts)
def test_a_rule_added_at_the_end_changes_no_earlier_match(
    written: dict[str, Any], when: dict[str, Any], use: dict[str, Any], known: Facts
):
    last = {"name": "last", "when": when, "use": use, "because": "new"}
    longer = {**written, "rules": [*written["rules"], last]}
    assume(accepted(longer))
    before, after = decide(policy(written), known), decide(policy(longer), known)
    if before.rule == "default":
        assert after.rule == ("last" if holds(when, known) else "default")
    else:
        assert after == before


@given(documents(), facts)
def test_one_more_known_fact_never_hides_a_match(written: dict[str, Any], known: Facts):
    """A rule that matched without a fact matches with it: unknown only ever fails."""
    for name in known:
        less = Facts({each: fact for each, fact in known.items() if each != name})
        matched = {each.rule for each in decide(policy(written), less).considered if each.matched} - {
            "default"
        }
        for rule in written["rules"]:
            if rule["name"] in matched:
                assert holds(rule["when"], known)


@pytest.mark.parametrize(
    ("when", "prefill", "decode", "expected"),
    [
        ({"attention_backend": "fa3"}, "fa3", "fa3", ("extend", "decode")),
        ({"attention_backend": "fa3"}, "fa3", "flashinfer", ("extend",)),
        ({"attention_backend": "fa3"}, "triton", "fa3", ("decode",)),
        ({"attention_backend": "fa3"}, "fa3", None, ("extend",)),
        ({"attention_backend": ["fa3", "fa4"]}, "fa4", "fa3", ("extend", "decode")),
        ({"attention_backend": "dsa"}, "nsa", "nsa", ("extend", "decode")),
        ({"prefill_attention_backend": "fa3"}, "fa3", "fa3", ("extend",)),
        ({"decode_attention_backend": "fa3"}, "fa3", "fa3", ("decode",)),
        (
            {"attention_backend": "fa3", "prefill_attention_backend": "triton"},
            "triton",
            "fa3",
            ("decode",),
        ),
    ],
)
def test_uses_means_the_forwards_that_run_a_named_backend(
    when: dict[str, Any], prefill: str, decode: str | None, expected: tuple[str, ...]
):
    rules = policy(document({"when": when, "use": {"backend": "hybrid", "fence_forward": "uses"}}))
    known = Facts.given(prefill_attention_backend=prefill, decode_attention_backend=decode)
    decision = decide(rules, known)
    assert decision.rule == "rule-0"
    assert decision.fence_forward == expected


def test_uses_beside_a_named_forward_adds_to_it():
    use = {"backend": "hybrid", "fence_forward": ["decode", "uses"]}
    rules = policy(document({"when": {"attention_backend": "fa3"}, "use": use}))
    known = Facts.given(prefill_attention_backend="fa3", decode_attention_backend="triton")
    assert decide(rules, known).fence_forward == ("extend", "decode")


BY_HAND = document(
    {
        "when": {"attention_backend": "fa3"},
        "use": {"backend": "hybrid", "fence_forward": ["decode"], "options": {"staging_mb": 64}},
    },
    {"when": {"kv_kind": "mla"}, "use": {"backend": "fenced_kernel", "fence_forward": []}},
)


def test_hybrid_by_hand_takes_fences_and_options_of_a_hybrid_rule():
    decision = decide(policy(BY_HAND), FA3_ON_HOPPER, backend="hybrid")
    assert (decision.backend, decision.fence_forward, decision.rule) == ("hybrid", ("decode",), "rule-0")
    assert decision.options == {"staging_mb": 64}
    assert decision.because == (
        "--hicache-io-backend hybrid was given by hand; which forwards wait is from rule 'rule-0': reason 0"
    )


def test_copy_engine_by_hand_takes_the_fences_but_no_options_of_another_backend():
    decision = decide(policy(BY_HAND), FA3_ON_HOPPER, backend="copy_engine")
    assert (decision.backend, decision.fence_forward, decision.rule) == ("copy_engine", ("decode",), "rule-0")
    assert decision.options == {}


def test_a_third_party_backend_by_hand_takes_the_fences(third_party: str):
    decision = decide(policy(BY_HAND), FA3_ON_HOPPER, backend=third_party)
    assert (decision.backend, decision.fence_forward, decision.options) == ("tape", ("decode",), {})


def test_a_third_party_backend_in_a_rule_takes_any_option(third_party: str):
    use = {"backend": third_party, "options": {"reels": "two"}}
    decision = decide(policy(document({"when": {}, "use": use})), FA3_ON_HOPPER)
    assert (decision.backend, decision.options) == ("tape", {"reels": "two"})


def test_by_hand_without_a_match_the_defaults_fences_hold():
    fenced = policy(document(default={"backend": "copy_engine", "fence_forward": ["extend"]}))
    decision = decide(fenced, FA3_ON_HOPPER, backend="hybrid")
    assert (decision.fence_forward, decision.rule) == (("extend",), "default")


@given(documents(), facts)
def test_fenced_kernel_by_hand_fences_every_forward(written: dict[str, Any], known: Facts):
    decision = decide(policy(written), known, backend="fenced_kernel")
    assert decision.fence_forward == ("extend", "decode")
    assert decision.rule == "--hicache-io-backend fenced_kernel"
    assert "given by hand" in decision.because


@given(documents(), facts, st.sampled_from(["hybrid", "copy_engine"]))
def test_by_hand_the_fences_are_those_that_auto_finds(written: dict[str, Any], known: Facts, backend: str):
    asked, by_hand = decide(policy(written), known), decide(policy(written), known, backend=backend)
    assert by_hand.backend == backend
    assert (by_hand.fence_forward, by_hand.rule) == (asked.fence_forward, asked.rule)
    assert by_hand.considered == asked.considered


@given(documents(), facts, st.sampled_from(["auto", "hybrid", "copy_engine", "fenced_kernel"]))
def test_sglang_is_told_direct_only_for_its_direct_layout(
    written: dict[str, Any], known: Facts, backend: str
):
    told = decide(policy(written), known, backend=backend).upstream_io_backend
    assert told == ("direct" if known.value("mem_layout") == "page_first_direct" else "kernel")


@pytest.mark.parametrize("backend", ["kernel", "direct", "kernel_ascend"])
def test_sglangs_own_backends_are_left_alone(backend: str):
    rules = policy(document({"when": {}, "use": {"backend": "copy_engine", "fence_forward": ["extend"]}}))
    decision = decide(rules, FA3_ON_HOPPER, backend=backend)
    assert (decision.backend, decision.upstream_io_backend) == (backend, backend)
    assert (decision.fence_forward, decision.options, decision.considered) == ((), {}, ())
    assert "SGLang's own and runs untouched" in decision.because


@pytest.mark.parametrize(
    ("sglang", "expected"),
    [
        ("0.5.22", "In SGLang 0.5.22, D2H does not wait for the forward"),
        ("0.5.23", "In SGLang 0.5.23, D2H waits for the forward"),
        (None, "D2H waits for the forward only in SGLang 0.5.23 and later; the version here is unknown."),
        (
            "local build",
            "D2H waits for the forward only in SGLang 0.5.23 and later; the version here is unknown.",
        ),
    ],
)
def test_which_fences_sglang_has_itself(sglang: str | None, expected: str):
    decision = decide(policy(document()), Facts.given(sglang=sglang), backend="kernel")
    assert expected in decision.because
    assert "No released SGLang makes a forward wait for D2H" in decision.because


@pytest.mark.parametrize(
    ("name", "hint"),
    [("hibrid", "hybrid"), ("copyengine", "copy_engine"), ("Kernel", "kernel"), ("outo", "auto")],
)
def test_an_unknown_backend_by_hand(name: str, hint: str):
    with pytest.raises(NameProblem) as caught:
        decide(policy(document()), FA3_ON_HOPPER, backend=name)
    assert str(caught.value) == f"unknown backend '{name}' (did you mean '{hint}'?)"


def test_the_log_line_is_one_line():
    use = {"backend": "hybrid", "fence_forward": "uses"}
    rules = document({"when": {"attention_backend": "fa3"}, "use": use, "because": "a long\nreason " * 40})
    line = describe(decide(policy(rules), FA3_ON_HOPPER))
    assert line.startswith(
        "hicache-io: D2H backend hybrid, forwards that wait: extend+decode, "
        "by rule rule-0 (p.yaml): a long reason"
    )
    assert "\n" not in line
    assert len(line) < 300
    unfenced = describe(decide(policy(document()), FA3_ON_HOPPER))
    assert unfenced.endswith("forwards that wait: none, by rule default (p.yaml): nothing else")
