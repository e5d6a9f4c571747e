"""What a layer takes away: found whatever way it goes, and only then. The machine's layer must not; yours
may.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from policy_strategies import (
    SURVEY,
    documents,
    facts,
    facts_for,
    given,
    policy,
    unknowns,
    uses,
    whens,
    writes,
)
from pydantic import ValidationError
from ruamel.yaml import YAML
from typer.testing import CliRunner

from sglang_hicache.bench.cli import app
from sglang_hicache.bench.explain.policy_command import _policy_dict
from sglang_hicache.io_backends.policy_files import (
    default_policy,
    load_policy,
    load_policy_text,
    policy_in_force,
)
from sglang_hicache.io_backends.registry import BACKENDS
from sglang_hicache.policy.classes import CannotCompareError
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.format.errors import PolicyError
from sglang_hicache.policy.format.layers import MACHINE, Origin, Policy, RuleProblem, combine
from sglang_hicache.policy.format.lint import warnings
from sglang_hicache.policy.format.schema import PolicyFile
from sglang_hicache.policy.routes import WriteFacts
from sglang_hicache.policy.unfenced import Loss, losses, lost_here

SHIPPED = default_policy()
SHIPPED_RULES: list[dict[str, Any]] = [
    {key: each[key] for key in ("name", "when", "unknown", "use", "because") if key in each}
    for each in _policy_dict(SHIPPED)["rules"]
]
FA3 = "attention_backend: [fa3, dual_chunk_flash_attn, minicpm_flashattn]"
BY_HAND = ("hybrid", "copy_engine", "fenced_kernel")


def over(rules: list[dict[str, Any]], below: Policy = SHIPPED, default: Any = None) -> Policy:
    """`below` with `rules` over it, as a file that extends it would have them."""
    file = PolicyFile.model_validate(
        {"version": 1, "extends": "default", "rules": rules, "default": default}, context=BACKENDS
    )
    names = [*(rule["name"] for rule in rules), *(["default"] if default else [])]
    return combine(file, "m.yaml", {name: Origin(MACHINE, "m.yaml", 3, 1) for name in names}, below, BACKENDS)


def loses(below: Policy, above: Policy, known: Facts, write: WriteFacts) -> bool:
    """Whether a forward that waits under `below` does not under `above`, by deciding both."""
    before, after = decide(below, known), decide(above, known)
    one = set(before.routes[before.route(write)].fence_forward)
    kept = set(after.routes[after.route(write)].fence_forward)
    if one - kept or set(before.fences()) - set(after.fences()):
        return True
    return any(
        set(decide(below, known, backend=name).fences()) - set(decide(above, known, backend=name).fences())
        for name in BY_HAND
    )


def shown_by_deciding(loss: Loss, below: Policy, above: Policy) -> bool:
    """Whether the loss's own example loses a fence."""
    known = Facts.given(**{name: value for name, value in loss.facts.items() if value is not None})
    entries = loss.write.get("write_entries", 7)
    entry_bytes = loss.write.get("write_entry_bytes", 1000)
    contiguous = loss.write.get("write_contiguous", False)
    assert isinstance(entries, int)
    assert isinstance(entry_bytes, int)
    tokens = loss.write.get("write_tokens", 7)
    assert isinstance(tokens, int)
    write = WriteFacts(tokens, entries, entries * entry_bytes, 1 if contiguous else 2)
    return loses(below, above, known, write)


# Each way that a machine file can take a fence away, and what its error must name.
TAKES = {
    "a shipped rule narrowed": (
        f"{{name: fa3-on-hopper, when: {{{FA3}, gpu_arch: [sm90], page_size: '>=64'}}, "
        "unknown: [attention_backend, gpu_arch], use: {backend: hybrid, fence_forward: uses}, because: m}",
        ["rule 'fa3-on-hopper' takes a fence away", "gpu_arch sm90", "no longer wait"],
    ),
    "Blackwell narrowed": (
        "{name: trtllm-on-blackwell, when: {attention_backend: [dsa, trtllm_mha, trtllm_mla], gpu_arch: "
        "[sm100]}, unknown: [attention_backend, gpu_arch], use: {backend: hybrid, fence_forward: uses}, "
        "because: m}",
        ["rule 'trtllm-on-blackwell' takes a fence away", "gpu_arch sm103"],
    ),
    "Blackwell shadowed": (
        "{name: m, when: {gpu_arch: sm103, attention_backend: trtllm_mha}, use: {backend: hybrid}, because: "
        "m}",
        ["rule 'm' takes a fence away", "trtllm_mha", "(rule 'trtllm-on-blackwell' of the shipped default"],
    ),
    "Blackwell shadowed for some writes": (
        "{name: m, when: {gpu_arch: sm103, write_tokens: '<64'}, use: {backend: hybrid}, because: m}",
        ["rule 'm' takes a fence away", "write_tokens 1"],
    ),
    "unknown facts left out": (
        f"{{name: fa3-on-hopper, when: {{{FA3}, gpu_arch: [sm90]}}, use: {{backend: hybrid, fence_forward: "
        "uses}, because: m}",
        ["rule 'fa3-on-hopper' takes a fence away", "unknown"],
    ),
    "one forward only": (
        f"{{name: m, when: {{{FA3}, gpu_arch: sm90}}, use: {{backend: hybrid, fence_forward: extend}}, "
        f"because: m}}",
        ["decode no longer waits"],
    ),
    "copy_engine without the fences of its fallback": (
        f"{{name: m, when: {{{FA3}, gpu_arch: sm90}}, use: {{backend: copy_engine}}, because: m}}",
        ["rule 'm' takes a fence away", "also for copy_engine"],
    ),
    "a verification that may run": (
        "{name: m, when: {prefill_attention_backend: triton, decode_attention_backend: triton}, "
        "use: {backend: hybrid}, because: m}",
        ["verify_attention_backend fa3", "speculative"],
    ),
    "a GPU's name without its architecture": (
        "{name: m, when: {gpu_name: NVIDIA A100}, use: {backend: hybrid}, because: m}",
        ["gpu_arch sm90"],
    ),
    "a version": (
        "{name: m, when: {gpu_arch: sm90, sgl_kernel: '>=0.4'}, use: {backend: hybrid}, because: m}",
        ["sgl_kernel 0.4"],
    ),
    "what cannot be compared": (
        "{name: m, when: {gpu_arch: sm90, sgl_kernel: '===0.4'}, use: {backend: hybrid}, because: m}",
        ["whether this machine file takes a fence away cannot be decided", "sgl_kernel '===0.4'"],
    ),
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "machine.yaml"
    path.touch()
    path.chmod(0o644)
    monkeypatch.setenv("SGLANG_HICACHE_IO_MACHINE_POLICY", str(path))
    return path


def extending(*rules: str) -> str:
    return "version: 1\nextends: default\nrules:\n" + "".join(f"- {rule}\n" for rule in rules)


@pytest.mark.parametrize("way", TAKES)
def test_a_machine_file_that_takes_a_fence_away_is_refused(machine: Path, way: str):
    rule, said = TAKES[way]
    machine.write_text(extending(rule))
    with pytest.raises(PolicyError) as caught:
        policy_in_force()
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message
    if "cannot be decided" not in message:
        assert message.startswith(f"{machine}:4:")
        assert "a machine file must not: list these forwards in fence_forward" in message


@pytest.mark.parametrize("way", [each for each in TAKES if each != "what cannot be compared"])
def test_each_of_a_losss_examples_loses_when_decided(way: str):
    rule = YAML(typ="safe", pure=True).load(TAKES[way][0])
    above = over([rule])
    found = list(losses(SHIPPED, above))
    assert found
    for loss in found:
        assert shown_by_deciding(loss, SHIPPED, above), loss


def test_a_machine_file_between_is_held_to_the_same(machine: Path):
    machine.write_text(extending(TAKES["a shipped rule narrowed"][0]))
    with pytest.raises(PolicyError, match="rule 'fa3-on-hopper' takes a fence away"):
        load_policy_text("version: 1\nextends: default\nrules: []\n", "p.yaml")


@pytest.mark.parametrize(
    "rule",
    [
        f"{{name: fa3-on-hopper, when: {{{FA3}, gpu_arch: [sm90]}}, unknown: match, use: {{backend: hybrid, "
        "fence_forward: uses, options: {gather_ctas: 8}}, because: m}",
        f"{{name: m, when: {{{FA3}, gpu_arch: sm90}}, use: {{backend: copy_engine, fence_forward: [extend, "
        "decode]}, because: m}",
        "{name: m, when: {gpu_arch: sm90}, use: {backend: fenced_kernel, fence_forward: [extend, decode]}, "
        "because: m}",
        "{name: m, when: {gpu_arch: [sm80, sm89]}, use: {backend: copy_engine}, because: m}",
        "{name: m, when: {prefill_attention_backend: triton, decode_attention_backend: triton, speculative: "
        "none, write_tokens: '>=64'}, use: {backend: copy_engine}, because: m}",
        "{name: layer-first-short-copies, when: {mem_layout: layer_first}, use: {backend: copy_engine}, "
        "because: m}",
        "{name: m, when: {gpu_arch: sm80, sgl_kernel: '>=0.4'}, use: {backend: hybrid}, because: m}",
    ],
)
def test_a_machine_file_that_takes_none_away_loads(machine: Path, rule: str):
    machine.write_text(extending(rule))
    policy_in_force()


def test_a_route_that_no_write_takes_fences_a_backend_given_by_name():
    """And a pool that falls back: both wait for what any route lists."""
    below = policy(
        {
            "version": 1,
            "rules": [
                {"name": "a", "when": {"write_tokens": "<64"}, "use": {"backend": "hybrid"}, "because": "b"},
                {
                    "name": "b",
                    "when": {"write_tokens": [0, ">=1"]},
                    "use": {"backend": "hybrid"},
                    "because": "b",
                },
            ],
            "default": {"use": {"backend": "hybrid", "fence_forward": ["decode"]}, "because": "b"},
        }
    )
    above = over([{"name": "m", "when": {}, "use": {"backend": "hybrid"}, "because": "m"}], below)
    found = list(losses(below, above))
    assert {(loss.rule, loss.of, loss.forwards) for loss in found} == {("m", "default", ("decode",))}


def accepted(rules: list[dict[str, Any]], below: Policy = SHIPPED, default: Any = None) -> Policy | None:
    try:
        return over(rules, below, default)
    except (ValidationError, RuleProblem):
        return None


@st.composite
def machine_rules(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rules of a machine file: new ones, and shipped ones replaced by others or by narrower ones."""
    rules = []
    for number in range(draw(st.integers(1, 3))):
        shipped = draw(st.none() | st.sampled_from(SHIPPED_RULES[:5]))
        when = draw(whens())
        if shipped is not None and draw(st.booleans()):
            when = {**copy.deepcopy(shipped["when"]), **when}
            tolerated = {key: shipped[key] for key in ("unknown",) if key in shipped and draw(st.booleans())}
        else:
            tolerated = draw(unknowns(when))
        rules.append(
            {
                "name": shipped["name"] if shipped else f"m{number}",
                "when": when,
                "use": draw(uses(with_uses=any("attention" in key for key in when))),
                "because": "measured",
                **tolerated,
            }
        )
    return list({rule["name"]: rule for rule in rules}.values())


@given(st.data(), writes, max_examples=150)
def test_a_machine_file_that_loads_never_loses_a_fence(data: st.DataObject, write: WriteFacts):
    rules = data.draw(machine_rules())
    above = accepted(rules)
    if above is None:
        return
    found = next(_decided(SHIPPED, above), None)
    if found is not None:
        assert shown_by_deciding(found, SHIPPED, above), found
        return
    for rule in (*rules, *SHIPPED_RULES):
        assert not loses(SHIPPED, above, data.draw(facts_for(rule)), write)


def _decided(below: Policy, above: Policy) -> Any:
    """Losses; what is not decided is refused, and counts as found by nobody."""
    try:
        yield from losses(below, above)
    except CannotCompareError:
        return


@given(documents(), documents(), facts, writes, max_examples=150)
def test_what_is_said_of_any_two_policies_is_so(
    first: dict[str, Any], second: dict[str, Any], known: Facts, write: WriteFacts
):
    below, above = policy(first), policy(second)
    try:
        found = list(losses(below, above))
    except CannotCompareError:
        return
    for loss in found:
        assert shown_by_deciding(loss, below, above), loss
    if not found:
        assert not loses(below, above, known, write)


@given(st.data(), st.sampled_from(SHIPPED_RULES[:5]), max_examples=60)
def test_every_narrowing_of_a_rule_for_safety_is_found_where_it_matters(
    data: st.DataObject, shipped: dict[str, Any]
):
    """A shipped rule with one condition more, which some facts that it fences do not satisfy."""
    more = data.draw(whens())
    key = next((key for key in more if key not in shipped["when"]), None)
    if key is None:
        return
    narrow = {**copy.deepcopy(shipped), "when": {**shipped["when"], key: more[key]}}
    above = accepted([narrow])
    if above is None:
        return
    known, write = data.draw(facts_for(shipped)), data.draw(writes)
    if loses(SHIPPED, above, known, write):
        assert next(losses(SHIPPED, above), None) is not None


def test_the_strategy_reaches_both_sides():
    seen = set()

    @given(st.data(), **SURVEY)
    def collect(data: st.DataObject) -> None:
        above = accepted(data.draw(machine_rules()))
        if above is not None:
            seen.add(next(_decided(SHIPPED, above), None) is None)

    collect()
    assert seen == {True, False}


def test_your_own_file_may_and_a_warning_names_what_is_lost(tmp_path: Path):
    path = tmp_path / "p.yaml"
    path.write_text("version: 1\nrules: []\ndefault: {use: {backend: hybrid}, because: mine}\n")
    (warning,) = warnings(load_policy(path))
    said = str(warning)
    assert said.startswith(f"{path}:3:1: warning: the default takes fences away: ")
    for rule in SHIPPED_RULES[:4]:
        assert f"rule '{rule['name']}' of the shipped default" in said
    assert "gpu_arch sm90" in said
    assert "gpu_arch sm100" in said
    path.write_text(extending(TAKES["Blackwell narrowed"][0]))
    (warning,) = warnings(load_policy(path))
    assert "rule 'trtllm-on-blackwell' takes a fence away" in str(warning)
    assert "gpu_arch sm103" in str(warning)
    path.write_text(extending(TAKES["what cannot be compared"][0]))
    (warning,) = warnings(load_policy(path))
    assert "whether this policy takes a fence away is not known" in str(warning)


@pytest.mark.parametrize(
    ("when", "unknown", "fences", "warned"),
    [
        ("fa3_binary: [kernels_community]", "", "[extend, decode]", True),
        ("fa3_binary: [kernels_community]", "unknown: [fa3_binary]", "[extend]", False),
        ("fa3_binary: [kernels_community]", "unknown: match", "[extend]", False),
        ("fa3_binary: [kernels_community]", "", "[]", False),
        ("gpu_arch: [sm80]", "", "[extend]", False),
    ],
)
def test_a_fence_by_a_fact_that_a_server_may_not_know_is_warned_of(
    tmp_path: Path, when: str, unknown: str, fences: str, warned: bool
):
    """SGLang says in its log only whether the Hub's FA3 was loaded."""
    path = tmp_path / "p.yaml"
    lines = [
        *("version: 1", "extends: default", "rules:", "  - name: hub"),
        f"    when: {{{when}, attention_backend: [triton]}}",
        f"    {unknown or '# none'}",
        f"    use: {{backend: hybrid, fence_forward: {fences}}}",
        "    because: mine",
    ]
    path.write_text("\n".join(lines) + "\n")
    found = [str(each) for each in warnings(load_policy(path)) if "fa3_binary may be unknown" in str(each)]
    assert bool(found) == warned
    assert all("say unknown: [fa3_binary]" in each for each in found)


def test_a_fence_that_the_machine_file_adds_is_missed_too(machine: Path):
    rule = "{name: m, when: {gpu_arch: sm80}, use: {backend: hybrid, fence_forward: [decode]}, because: m}"
    machine.write_text(extending(rule))
    mine = load_policy_text(extending(rule.replace("[decode]", "[]").replace("name: m", "name: n")), "p.yaml")
    assert any("rule 'm' of the machine file" in str(warning) for warning in warnings(mine))


def test_it_is_missed_through_another_file_of_yours_too(machine: Path, tmp_path: Path):
    rule = "{name: m, when: {gpu_arch: sm80}, use: {backend: hybrid, fence_forward: [decode]}, because: m}"
    machine.write_text(extending(rule))
    (tmp_path / "site.yaml").write_text(
        extending("{name: s, when: {gpu_arch: sm86}, use: {backend: hybrid}, because: s}")
    )
    path = tmp_path / "p.yaml"
    mine = extending(rule.replace("[decode]", "[]").replace("name: m", "name: n"))
    path.write_text(mine.replace("extends: default", "extends: site.yaml"))
    found = load_policy(path)
    assert [each.name for each in found.rules[:3]] == ["n", "s", "m"]
    assert any("rule 'm' of the machine file" in str(warning) for warning in warnings(found))
    assert lost_here(found, Facts.given(gpu_arch="sm80"), backend="auto") == ("decode",)


def test_no_loss_is_of_a_write_that_cannot_be():
    """A write of no entries has no bytes in each."""
    use = {"backend": "fenced_kernel", "fence_forward": []}

    def of(**when: Any) -> Policy:
        rules = [{"name": "r", "when": when, "use": use, "because": "m"}] if when else []
        fenced = {"backend": "fenced_kernel", "fence_forward": ["extend"]}
        return policy({"version": 1, "rules": rules, "default": {"use": fenced, "because": "m"}})

    # Of the writes that wait below there is only the empty one, and that is in no rule above.
    assert list(losses(of(write_entries=">=1"), of(write_entry_bytes=2048))) == []
    (loss,) = losses(of(write_entries=">=2"), of(write_entry_bytes=2048))
    assert loss.write == {"write_entries": 1, "write_entry_bytes": 2048}


def _document(*rules: dict[str, Any], fence: list[str]) -> Policy:
    named = [{"name": f"r{nth}", "because": "m", **rule} for nth, rule in enumerate(rules)]
    default = {"use": {"backend": "hybrid", "fence_forward": fence}, "because": "m"}
    return policy({"version": 1, "rules": named, "default": default})


def test_a_backend_that_does_not_run_hides_no_loss():
    """A rule on `attention_backend` asks for verification only where something speculates."""
    verify = {"verify_attention_backend": "fa3"}
    fenced, free = ({"backend": "hybrid", "fence_forward": each} for each in (["extend"], []))
    below = _document({"when": verify, "use": fenced}, fence=[])
    above = _document(
        {"when": {"attention_backend": "fa3"}, "use": fenced}, {"when": verify, "use": free}, fence=[]
    )
    found = list(losses(below, above))
    assert found
    assert all(shown_by_deciding(loss, below, above) for loss in found)


def test_a_version_that_is_none_is_compared_too():
    free = {"backend": "hybrid", "fence_forward": []}
    rules = [{"when": {"sgl_kernel": each}, "unknown": "match", "use": free} for each in ("==0.4", "!=0.4")]
    below, above = _document(*rules, fence=["extend"]), _document(fence=[])
    (loss,) = losses(below, above)
    assert loss.facts == {"sgl_kernel": "not a version"}
    assert shown_by_deciding(loss, below, above)


def test_what_only_some_writes_lose_here_is_lost():
    trtllm = Facts.given(gpu_arch="sm103", attention_backend="trtllm_mha", speculative="none")
    mine = load_policy_text(extending(TAKES["Blackwell shadowed for some writes"][0]), "p.yaml")
    assert lost_here(mine, trtllm, backend="auto") == ("extend", "decode")


def test_writes_that_never_waited_lose_nothing_here(machine: Path):
    """The machine's file makes forwards wait for some writes, and yours is about another GPU."""
    rule = (
        "{name: m, when: {gpu_arch: sm80, write_tokens: '>=64'}, use: {backend: hybrid, fence_forward: "
        "[decode]}, because: m}"
    )
    machine.write_text(extending(rule))
    other = "{name: n, when: {gpu_arch: sm86}, use: {backend: hybrid}, because: n}"
    known = Facts.given(gpu_arch="sm80", attention_backend="triton", speculative="none")
    assert lost_here(load_policy_text(extending(other), "p.yaml"), known, backend="auto") == ()
    shadow = rule.replace("[decode]", "[]").replace("name: m", "name: n")
    assert lost_here(load_policy_text(extending(shadow), "p.yaml"), known, backend="auto") == ("decode",)


def test_what_is_too_much_to_compare_is_refused(machine: Path):
    many = [
        f"{{name: m{n}, when: {{page_size: '{n + 1},'}}, use: {{backend: hybrid}}, because: m}}".replace(
            ",'", "'"
        )
        for n in range(400)
    ]
    versions = [
        f"{{name: v{n}, when: {{gpu_arch: sm80, sgl_kernel: '>=0.{n}.{n}.{n}'}}, use: {{backend: hybrid}}, "
        f"because: m}}"
        for n in range(400, 0, -1)
    ]
    machine.write_text(extending(*versions))
    with pytest.raises(
        PolicyError, match="cannot be decided: its conditions on sgl_kernel tell too many values"
    ):
        policy_in_force()
    machine.write_text(extending(*many))
    with pytest.raises(PolicyError, match="takes a fence away"):
        policy_in_force()


def test_explain_says_what_your_file_takes_away_here(tmp_path: Path):
    path = tmp_path / "p.yaml"
    path.write_text(extending(TAKES["Blackwell shadowed"][0]))
    mine = load_policy(path)
    trtllm = {"attention_backend": "trtllm_mha", "speculative": "none"}
    for name in ("auto", *BY_HAND[:2]):
        lost = lost_here(mine, Facts.given(gpu_arch="sm103", **trtllm), backend=name)
        assert lost == ("extend", "decode")
        assert lost_here(mine, Facts.given(gpu_arch="sm100", **trtllm), backend=name) == ()
    assert lost_here(mine, Facts.given(gpu_arch="sm103", **trtllm), backend="fenced_kernel") == ()
    assert lost_here(mine, Facts.given(gpu_arch="sm103", **trtllm), backend="kernel") == ()
    assert lost_here(SHIPPED, Facts.given(gpu_arch="sm103", **trtllm), backend="auto") == ()
    asked = ["explain", "--attention-backend", "trtllm_mha", "--gpu-arch", "sm103", "--policy", str(path)]
    shown = CliRunner().invoke(app, asked, env={"NO_COLOR": "1", "COLUMNS": "300"})
    assert (
        f"{path} takes a fence away here: without it prefill (extend) and decode wait for D2H work on the SMs"
        in " ".join(shown.stdout.split())
    )
    assert json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)["lost"] == ["extend", "decode"]
