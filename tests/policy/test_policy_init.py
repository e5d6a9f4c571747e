"""``policy init`` and ``policy show --yaml``: what they write decides as before, and can be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from typer.testing import CliRunner, Result

from sglang_hicache.bench.cli import app
from sglang_hicache.bench.explain import policy_text
from sglang_hicache.bench.explain.policy_command import _as_file
from sglang_hicache.bench.policy_yaml import as_yaml
from sglang_hicache.io_backends.policy_files import default_policy, load_policy_text
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"NO_COLOR": "1"})


servers = st.fixed_dictionaries(
    {
        "gpu_arch": st.sampled_from(["sm80", "sm90", "sm100", "sm103", "cpu"]),
        "prefill_attention_backend": st.sampled_from(["fa3", "triton", "trtllm_mha", "dsa", "flashinfer"]),
        "decode_attention_backend": st.sampled_from(["fa3", "triton", "trtllm_mha", "dsa", "flashinfer"]),
        "mem_layout": st.sampled_from(["layer_first", "page_first", "page_first_direct", "page_head"]),
        "page_size": st.sampled_from([1, 16, 32, 64]),
        "kv_kind": st.sampled_from(["mha", "mla", None]),
        "row_bytes": st.sampled_from([576, 1152, 2048, 4096, None]),
        "speculative": st.sampled_from(["none", "EAGLE", None]),
        "gpu_name": st.sampled_from(
            [None, "NVIDIA H100 80GB HBM3", 'a "quoted": name # no comment', "yes", "1"]
        ),
    }
)


def facts_of(server: dict[str, object]) -> Facts:
    known = {name: value for name, value in server.items() if value is not None}
    device = "cpu" if server["gpu_arch"] == "cpu" else "cuda"
    return Facts.given(device=device, **known)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=50)
@given(servers)
def test_a_policy_for_a_server_decides_as_the_one_in_force(server: dict[str, object]) -> None:
    facts = facts_of(server)
    before = decide(default_policy(), facts)
    text = policy_text.for_server(before, facts, file="p.yaml")
    policy = load_policy_text(text, "p.yaml")
    after = decide(policy, facts)
    ways = [(each.backend, each.fence_forward, each.options, each.when) for each in before.routes]
    assert [(each.backend, each.fence_forward, each.options, each.when) for each in after.routes] == ways
    assert {each.rule.partition("-server")[0] for each in after.routes} == {"this"}


@settings(deadline=None, max_examples=50)
@given(servers.filter(lambda each: each["gpu_arch"] != "sm90"))
def test_another_server_is_decided_as_before(server: dict[str, object]) -> None:
    mine = Facts.given(gpu_arch="sm90", attention_backend="fa3", device="cuda", page_size=64)
    text = policy_text.for_server(decide(default_policy(), mine), mine, file="p.yaml")
    facts = facts_of(server)
    found = decide(load_policy_text(text, "p.yaml"), facts).routes
    assert found == decide(default_policy(), facts).routes


def test_a_rule_for_nobody_knows_whom_is_a_comment() -> None:
    for given_ in ((), ("--gpu-arch", "sm90"), ("--fact", "attention_backend=fa3")):
        text = run("policy", "init", *given_).stdout
        policy = load_policy_text(text, "p.yaml")
        assert [rule.name for rule in policy.rules] == [rule.name for rule in default_policy().rules]
        assert "unknown here, so this rule is a comment" in text.replace("\n# ", " ")
        # What is commented out is the rule: without the marks it is one.
        head, _, rule = text.partition("rules: []\n")
        active = head + "rules:\n" + "\n".join(line[2:] for line in rule.splitlines())
        if given_:
            assert load_policy_text(active + "\n", "p.yaml").rules[0].name == "this-server"


def test_it_is_written_to_a_file_once(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    arguments = ("policy", "init", path, "--gpu-arch", "H100", "--fact", "attention_backend=fa3")
    done = run(*arguments)
    assert (done.exit_code, done.stderr) == (0, "gpu_arch: 'H100' is taken as sm90\n")
    assert done.stdout == f"{path}: written; hicache-io policy validate checks it after a change\n"
    valid = run("policy", "validate", path)
    assert (valid.exit_code, valid.stderr) == (0, "")  # no fence is taken away
    assert f"--hicache-io-policy {path}" in path.read_text().replace("\n# ", " ")
    path.write_text("mine")
    again = run(*arguments)
    assert (again.exit_code, again.stderr.splitlines()[-1]) == (
        2,
        f"{path}: is there already; --force writes over it",
    )
    assert path.read_text() == "mine"
    assert run(*arguments, "--force").exit_code == 0
    assert path.read_text().startswith("# Policy of sglang-hicache-io")
    found = json.loads(run("policy", "init", "--gpu-arch", "sm90", "--json").stdout)
    assert (found["file"], found["text"][:1]) == (None, "#")


def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    found = run("policy", "init", tmp_path / "no" / "policy.yaml", "--gpu-arch", "sm90")
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert "there is no folder" in found.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ("init",),
        ("init", "--gpu-arch", "sm91"),
        ("init", "--gpu-arch", "sm90", "--fact", "attention_backend=fa3"),
        ("init", "--gpu-arch", "sm91", "--fact", "attention_backend=fa3,mem_layout=layer_first"),
        ("show", "--yaml"),
    ],
)
def test_every_line_fits_80_columns(arguments: tuple[str, ...]) -> None:
    text = run("policy", *arguments).stdout
    load_policy_text(text, "p.yaml")
    assert max(map(len, text.splitlines())) <= 80
    assert ("known to this release" in " ".join(text.replace("#", "").split())) == ("sm91" in arguments)


NAMES = ["fa3", ">=0.4", "yes", "a: b", "- x", "'", "minicpm_flashattn", "NVIDIA H100 80GB HBM3"]
# As a policy file may hold them.
words = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp")), min_size=1, max_size=30)


@given(st.lists(words, min_size=1, max_size=30).map(" ".join), st.lists(st.sampled_from(NAMES), max_size=9))
@example("a: b # c " * 20, ["- x"])
@example("&a *b !c " * 20, ["'"])
@example(f"{'x' * 90} {'y' * 90}", [])
@example("  begins and ends with blanks " * 5, [])
@example("one\ntwo" * 20, [])
def test_what_is_laid_out_is_read_as_it_was(text: str, names: list[str]) -> None:
    rule = {"name": "x", "when": {"names": names}, "because": text, "unmeasured": {"use.backend": text}}
    policy = {"version": 1, "rules": [rule], "default": {"because": text}}
    written = as_yaml(policy)
    assert YAML(typ="safe").load(written) == policy
    if text.isascii() and text.isprintable() and text == " ".join(text.split()):
        long = [line for line in written.splitlines() if len(line) > 80 and " " in line.strip()]
        assert not [line for line in long if "names" not in line]


def test_a_whole_policy_as_yaml_is_that_policy(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "version: 1\nextends: default\nrules:\n- name: mine\n  when: {page_size: '<64', overlap: true, "
        "gpu_name: 'yes', sgl_kernel: '>=0.4'}\n  unknown: match\n"
        "  use: {backend: hybrid, fence_forward: [extend], options: {staging_mb: 128}}\n"
        "  because: 'a test: of #colons'\n"
    )
    for arguments in ((), (mine,)):
        text = run("policy", "show", *arguments, "--yaml").stdout
        shown = load_policy_text(text, "p.yaml")
        original = load_policy_text(mine.read_text(), str(mine)) if arguments else default_policy()
        assert _as_file(shown) == _as_file(original)


@pytest.mark.parametrize("other", ["--json", "--unmeasured"])
def test_one_form_at_a_time(other: str) -> None:
    found = run("policy", "show", "--yaml", other)
    assert found.exit_code == 2
    assert "exclude each other" in found.output
