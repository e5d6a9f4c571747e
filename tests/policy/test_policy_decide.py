"""Decisions: the first rule that matches, the fences it means, and what a backend by hand keeps of it."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import assume
from hypothesis import strategies as st
from policy_strategies import (
    SURVEY,
    accepted,
    documents,
    facts,
    facts_for,
    given,
    holds,
    holds_for,
    policy,
    unknowns,
    uses,
    waiting,
    whens,
    writes,
)

from sglang_hicache.io_backends.registry import register_backend, unregister_backend
from sglang_hicache.policy.decide import Decision, decide, describe_decision
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.names import NameProblem
from sglang_hicache.policy.routes import WriteFacts, writes_in_words

FA3_ON_HOPPER = Facts.given(attention_backend="fa3", gpu_arch="sm90", speculative="none")


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
        ({"overlap": False}, "overlap is unknown (the rule wants false)"),
    ],
)
def test_a_rule_says_every_reason_why_it_does_not_match(when: dict[str, Any], reason: str):
    decision = decide(policy(document({"when": when, "use": {"backend": "hybrid"}})), FA3_ON_HOPPER)
    assert decision.considered[0].reason == reason


def read_plainly(written: dict[str, Any], known: Facts) -> list[dict[str, Any]]:
    """The rules that are left for writes, the default at the end if it is one of them."""
    found = []
    for rule in written["rules"]:
        if holds(rule, known):
            found.append(rule)
            if not any(key.startswith("write_") and key != "write_policy" for key in rule["when"]):
                return found
    return [*found, {"name": "default", "when": {}, **written["default"]}]


@st.composite
def documents_and_facts(draw: st.DrawFn) -> tuple[dict[str, Any], Facts]:
    """A policy, and facts that one of its rules often matches."""
    written = draw(documents())
    rules = written["rules"]
    return written, draw(facts_for(draw(st.sampled_from(rules))) if rules else facts)


@given(documents_and_facts(), writes)
def test_decisions_follow_a_plain_reading_of_the_format(
    drawn: tuple[dict[str, Any], Facts], write: WriteFacts
):
    """Also: every combination of facts has a decision, and a file that validates never fails there."""
    written, known = drawn
    decision = decide(policy(written), known)
    expected = read_plainly(written, known)
    assert [route.rule for route in decision.routes] == [rule["name"] for rule in expected]
    for route, rule in zip(decision.routes, expected, strict=True):
        assert (route.backend, route.because) == (rule["use"]["backend"], rule["because"])
        assert route.options == rule["use"].get("options", {})
        assert set(route.fence_forward) == waiting(rule, known)
        assert route.fence_forward == tuple(f for f in ("extend", "decode") if f in route.fence_forward)
    last = decision.routes[-1]
    assert (decision.rule, decision.backend, decision.because) == (last.rule, last.backend, last.because)
    assert (decision.fence_forward, decision.options, decision.layer) == (
        last.fence_forward,
        last.options,
        last.layer,
    )
    assert [each.rule for each in decision.considered if each.matched] == [rule["name"] for rule in expected]
    taken = next(rule for rule in expected if holds_for(rule, write))
    assert decision.routes[decision.route(write)].rule == taken["name"]


def test_the_strategy_reaches_routes_and_rules_of_every_kind():
    """The test above says little if hardly a rule matches, or no decision has a route before the last."""
    seen = set()

    @given(documents_and_facts(), writes, **SURVEY)
    def collect(drawn: tuple[dict[str, Any], Facts], write: WriteFacts) -> None:
        decision = decide(policy(drawn[0]), drawn[1])
        seen.add("default" if decision.rule == "default" else "rule")
        seen.add("routes" if len(decision.routes) > 1 else "one way")
        seen.add("taken early" if decision.route(write) < len(decision.routes) - 1 else "taken last")
        seen.update("assumed" for each in decision.considered if each.assumed)

    collect()
    assert seen == {"default", "rule", "routes", "one way", "taken early", "taken last", "assumed"}


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


@given(documents(), whens(), uses(), st.data())
def test_a_rule_added_at_the_end_changes_no_earlier_match(
    written: dict[str, Any], when: dict[str, Any], use: dict[str, Any], data: st.DataObject
):
    last = {"name": "last", "when": when, "use": use, "because": "new", **data.draw(unknowns(when))}
    known = data.draw(facts_for(last))
    longer = {**written, "rules": [*written["rules"], last]}
    assume(accepted(longer))
    before, after = decide(policy(written), known), decide(policy(longer), known)
    if before.rule == "default":
        earlier = [route.rule for route in before.routes[:-1]]
        assert [route.rule for route in after.routes][: len(earlier)] == earlier
        new = [route.rule for route in after.routes if route.rule == "last"]
        assert new == (["last"] if holds(last, known) else [])
    else:
        assert after == before


@given(documents_and_facts())
def test_one_more_known_fact_hides_a_match_only_where_unknown_counts_as_one(
    drawn: tuple[dict[str, Any], Facts],
):
    """A rule that matched without a fact matches with it, unless it says that unknown matches."""
    written, known = drawn
    for name in known:
        less = Facts({each: fact for each, fact in known.items() if each != name})
        matched = {each.rule for each in decide(policy(written), less).considered if each.matched}
        for rule in written["rules"]:
            # With an unknown algorithm, verification and drafts may run and match; without one they do not.
            if rule["name"] in matched and "unknown" not in rule and name != "speculative":
                assert holds(rule, known)


def test_decisions_depend_on_nothing_else(monkeypatch: pytest.MonkeyPatch):
    """No file, no environment, no device: with all of them out of reach the decision is the same."""
    rules = policy(document({"when": {"gpu_arch": "sm90"}, "use": {"backend": "copy_engine"}}))
    before = decide(rules, FA3_ON_HOPPER)

    class OutOfReach:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError("a decision reads nothing but the policy and the facts")

        __call__ = __getitem__ = __getattr__

    with monkeypatch.context() as patch:
        for target in ("os.environ", "builtins.open", "importlib.import_module"):
            patch.setattr(target, OutOfReach())
        after = decide(rules, FA3_ON_HOPPER)
    assert after == before


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
    known = Facts.given(
        prefill_attention_backend=prefill, decode_attention_backend=decode, speculative="none"
    )
    decision = decide(rules, known)
    assert decision.rule == "rule-0"
    assert decision.fence_forward == expected


def test_uses_beside_a_named_forward_adds_to_it():
    use = {"backend": "hybrid", "fence_forward": ["decode", "uses"]}
    rules = policy(document({"when": {"attention_backend": "fa3"}, "use": use}))
    known = Facts.given(
        prefill_attention_backend="fa3", decode_attention_backend="triton", speculative="none"
    )
    assert decide(rules, known).fence_forward == ("extend", "decode")


@pytest.mark.parametrize(
    ("speculative", "verify", "draft", "expected"),
    [
        ("none", "fa3", "fa3", None),  # they do not run
        ("EAGLE", "fa3", "triton", ("decode",)),  # part of a decode step
        ("EAGLE", "triton", "fa3", ("extend", "decode")),  # after prefill and in a decode step
        (None, "triton", "fa3", ("extend", "decode")),  # they may run
        ("EAGLE", None, "triton", None),  # unknown matches nothing where the rule does not say so
    ],
)
def test_verification_and_drafts_count_where_they_may_run(
    speculative: str | None, verify: str | None, draft: str, expected: tuple[str, ...] | None
):
    rule = {"when": {"attention_backend": "fa3"}, "use": {"backend": "hybrid", "fence_forward": "uses"}}
    known = Facts.given(
        prefill_attention_backend="triton",
        decode_attention_backend="triton",
        verify_attention_backend=verify,
        draft_attention_backend=draft,
        speculative=speculative,
    )
    decision = decide(policy(document(rule)), known)
    assert (decision.rule == "rule-0", decision.fence_forward) == (expected is not None, expected or ())


UNKNOWN_MATCHES = {
    "when": {"attention_backend": "fa3", "gpu_arch": "sm90", "page_size": 64},
    "use": {"backend": "hybrid", "fence_forward": "uses"},
}


def test_an_unknown_fact_matches_where_the_rule_says_so():
    known = Facts.given(prefill_attention_backend="triton", page_size=64, speculative="none")
    for unknown in ("match", ["attention_backend", "gpu_arch"]):
        decision = decide(policy(document({**UNKNOWN_MATCHES, "unknown": unknown})), known)
        assert (decision.rule, decision.fence_forward) == ("rule-0", ("decode",))
        (considered,) = decision.considered
        assert considered.assumed == ("decode_attention_backend", "gpu_arch")
        assert "gpu_arch unknown, which this rule counts as a match" in considered.reason
    for unknown in (["attention_backend"], ["gpu_arch"], ["page_size"]):
        assert decide(policy(document({**UNKNOWN_MATCHES, "unknown": unknown})), known).rule == "default"


def test_a_known_fact_that_differs_matches_no_rule():
    rules = policy(document({**UNKNOWN_MATCHES, "unknown": "match"}))
    assert decide(rules, Facts.given(attention_backend="triton", speculative="none")).rule == "default"
    assert decide(rules, Facts.given(gpu_arch="sm100")).rule == "default"


LONG, SHORT = WriteFacts(4096, 72, 604_000_000, 1), WriteFacts(64, 4608, 9_400_000, 64)
ROUTED = document(
    {
        "when": {"gpu_arch": "sm90", "write_entry_bytes": ">=32768"},
        "use": {"backend": "copy_engine", "fence_forward": ["decode"]},
    },
    {"when": {"gpu_arch": "sm100", "write_contiguous": True}, "use": {"backend": "copy_engine"}},
    {
        "when": {"write_contiguous": False, "write_tokens": "<128"},
        "use": {"backend": "fenced_kernel", "fence_forward": ["extend"], "options": {"block_quota": 4}},
    },
    default={"backend": "hybrid", "options": {"staging_mb": 64}},
)


def test_each_write_takes_the_first_route_that_holds():
    decision = decide(policy(ROUTED), FA3_ON_HOPPER)
    assert [(each.rule, each.backend, dict(each.when)) for each in decision.routes] == [
        ("rule-0", "copy_engine", {"write_entry_bytes": (">=32768",)}),
        ("rule-2", "fenced_kernel", {"write_contiguous": (False,), "write_tokens": ("<128",)}),
        ("default", "hybrid", {}),
    ]
    assert decision.route(LONG) == 0
    assert decision.route(SHORT) == 1
    assert decision.route(WriteFacts(4096, 294_912, 604_000_000, 4096)) == 2
    assert decision.route(WriteFacts(0, 0, 0, 0)) == 2
    assert (decision.rule, decision.backend, decision.options) == ("default", "hybrid", {"staging_mb": 64})
    assert decision.fence_forward == ()
    assert decision.fences() == ("extend", "decode")
    assert [each.writes for each in decision.considered] == [
        "writes with entries of at least 32,768 bytes",
        "writes in one run of host slots",
        "writes of under 128 tokens and in more than one run of host slots",
        None,
    ]
    assert decision.considered[-1].reason == "no rule before it takes every write"


def test_a_write_is_known_by_its_host_indices():
    assert (LONG.entry_bytes, LONG.contiguous) == (8_388_888, True)
    assert (SHORT.entry_bytes, SHORT.contiguous) == (2039, False)
    assert WriteFacts(0, 0, 0, 0).entry_bytes == 0


@pytest.mark.parametrize("backend", ["hybrid", "copy_engine"])
def test_by_hand_every_write_goes_one_way_and_waits_for_all_that_any_would(backend: str):
    decision = decide(policy(ROUTED), FA3_ON_HOPPER, backend=backend)
    (route,) = decision.routes
    assert (route.backend, dict(route.when)) == (backend, {})
    assert decision.fence_forward == route.fence_forward == ("extend", "decode")
    assert route.options == ({"staging_mb": 64} if backend == "hybrid" else {})
    assert "rule 'rule-0', rule 'rule-2', the policy's default" in decision.because
    assert decision.route(LONG) == decision.route(SHORT) == 0


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ({}, "every write"),
        ({"write_tokens": (64,)}, "writes of 64 tokens"),
        ({"write_entries": ("<=72",)}, "writes of at most 72 entries"),
        (
            {"write_entry_bytes": (">=2048,<32768", 1)},
            "writes with entries of at least 2,048 and under 32,768 or 1 bytes",
        ),
        ({"write_contiguous": (True, False)}, "writes in any runs of host slots"),
        ({"write_tokens": ("!=5", "> 9")}, "writes of other than 5 or over 9 tokens"),
    ],
)
def test_writes_in_words(when: dict[str, Any], words: str):
    assert writes_in_words(when) == words


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


@given(documents_and_facts(), st.sampled_from(["hybrid", "copy_engine"]))
def test_by_hand_the_fences_are_those_that_auto_finds(drawn: tuple[dict[str, Any], Facts], backend: str):
    written, known = drawn
    asked, by_hand = decide(policy(written), known), decide(policy(written), known, backend=backend)
    assert (by_hand.backend, by_hand.layer, len(by_hand.routes)) == (backend, "option", 1)
    assert (by_hand.fence_forward, by_hand.rule) == (asked.fences(), asked.rule)
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
    line = describe_decision(decide(policy(rules), FA3_ON_HOPPER))
    assert line.startswith(
        "hicache-io: D2H backend hybrid, forwards that wait: extend+decode, "
        "by rule rule-0 (p.yaml): a long reason"
    )
    assert "\n" not in line
    assert len(line) < 350
    unfenced = describe_decision(decide(policy(document()), FA3_ON_HOPPER))
    assert unfenced.endswith("forwards that wait: none, by rule default (p.yaml): nothing else.")


def test_the_log_line_says_that_nobody_knows_the_gpu():
    line = describe_decision(decide(policy(document()), Facts.given(gpu_arch="sm93")))
    assert "by rule default (p.yaml): nothing else. Careful: gpu_arch: no GPU of sm93 is known" in line
    assert "Careful" not in describe_decision(decide(policy(document()), FA3_ON_HOPPER))


def test_the_one_line_names_rules_that_unknown_facts_alone_passed_over():
    strict = {**UNKNOWN_MATCHES, "unknown": ["attention_backend"]}
    decision = decide(policy(document(strict)), Facts.given(prefill_attention_backend="fa3", page_size=64))
    assert decision.might_match() == {"rule-0": ("gpu_arch",)}
    assert Decision.from_dict(decision.to_dict()) == decision
    line = describe_decision(decision)
    assert line.endswith(" Careful: rule rule-0 was passed over because gpu_arch is unknown.")
    assert "\n" not in line
    # A condition that is known not to hold passes the rule over by itself.
    other = decide(policy(document(strict)), Facts.given(attention_backend="fa3", page_size=1))
    assert (other.rule, other.might_match()) == ("default", {})
    assert "Careful" not in describe_decision(other)


def test_the_log_line_names_every_backend_and_forward_that_a_write_may_meet():
    line = describe_decision(decide(policy(ROUTED), FA3_ON_HOPPER))
    assert line.startswith(
        "hicache-io: D2H backend copy_engine or fenced_kernel or hybrid, forwards that wait: extend+decode, "
        "by rule default (p.yaml): nothing else"
    )
