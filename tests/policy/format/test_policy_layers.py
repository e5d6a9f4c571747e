"""Layers: the shipped default, the machine file, a file of a user, an option; and what `extends` does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from policy_strategies import documents, given, policy
from ruamel.yaml import YAML

from sglang_hicache.io_backends.policy_files import default_policy, load_policy, policy_in_force
from sglang_hicache.policy.decide import decide, describe_decision
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.format.errors import PolicyError
from sglang_hicache.policy.format.layers import Policy
from sglang_hicache.policy.format.load import default_machine_file

MACHINE = "SGLANG_HICACHE_IO_MACHINE_POLICY"
TRITON = Facts.given(attention_backend="triton", gpu_arch="sm90", mem_layout="page_first", speculative="none")
FA3 = Facts.given(attention_backend="fa3", gpu_arch="sm90", mem_layout="page_first", speculative="none")


def written(*rules: str, extends: str | None = "default", default: str | None = None) -> str:
    """A file with `rules`, each "NAME: WHEN -> BACKEND"."""
    lines = ["version: 1", *([f"extends: {extends}"] if extends else []), "rules:" if rules else "rules: []"]
    for rule in rules:
        name, rest = rule.split(": ", 1)
        when, backend = rest.split(" -> ")
        lines.append(f"- {{name: {name}, when: {{{when}}}, use: {{backend: {backend}}}, because: mine}}")
    if default:
        lines.append(f"default: {{use: {{backend: {default}}}, because: mine}}")
    return "\n".join(lines) + "\n"


def names(found: Policy) -> list[str]:
    return [rule.name for rule in found.rules]


SHIPPED = names(default_policy())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "p.yaml"


def error_of(path: Path) -> str:
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    return str(caught.value).replace(str(path.parent) + "/", "")


def test_a_difference_comes_before_the_shipped_rules(file: Path):
    file.write_text(written("mine: attention_backend: triton -> copy_engine"))
    found = load_policy(file)
    assert names(found) == ["mine", *SHIPPED]
    assert found.default == default_policy().default
    decision = decide(found, TRITON)
    assert (decision.rule, decision.layer, decision.policy) == ("mine", "policy file", str(file))
    shipped = decide(found, FA3)
    assert (shipped.rule, shipped.layer) == ("fa3-on-hopper", "shipped default")
    assert "by rule fa3-on-hopper (shipped default): " in describe_decision(shipped)
    assert f"by rule mine ({file}): " in describe_decision(decision)
    assert [(each.rule, each.layer) for each in shipped.considered][:2] == [
        ("mine", "policy file"),
        ("fa3-on-hopper-short-copies", "shipped default"),
    ]


def test_a_rule_of_the_same_name_takes_the_place_of_the_other(file: Path):
    file.write_text(
        written(
            "first: kv_kind: mla -> hybrid",
            "layer-first-short-copies: page_size: 64 -> copy_engine",
        )
    )
    found = load_policy(file)
    assert names(found) == ["first", *SHIPPED]
    (replaced,) = [rule for rule in found.rules if rule.name == "layer-first-short-copies"]
    assert replaced.because == "mine"
    origin = found.origins["layer-first-short-copies"]
    assert (origin.layer, origin.source, origin.line) == ("policy file", str(file), 5)
    assert found.origins["fa3-on-hopper"].layer == "shipped default"


def test_a_default_replaces_the_one_below(file: Path):
    file.write_text(written(default="copy_engine"))
    decision = decide(load_policy(file), TRITON)
    assert (decision.backend, decision.rule, decision.layer) == ("copy_engine", "default", "policy file")


def test_without_extends_a_file_replaces_everything(file: Path):
    file.write_text(written("mine: kv_kind: mla -> copy_engine", extends=None, default="hybrid"))
    assert names(load_policy(file)) == ["mine"]
    assert decide(load_policy(file), FA3).fence_forward == ()


def test_files_extend_files_beside_them(file: Path, tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.yaml").write_text(
        written("base: kv_kind: mla -> copy_engine", extends="../root.yaml")
    )
    (tmp_path / "root.yaml").write_text(
        written("root: kv_kind: mha -> copy_engine", extends=None, default="hybrid")
    )
    file.write_text(written("top: page_size: 1 -> hybrid", extends="sub/base.yaml"))
    found = load_policy(file)
    assert names(found) == ["top", "base", "root"]
    assert {name: Path(origin.source).name for name, origin in found.origins.items()} == {
        "top": "p.yaml",
        "base": "base.yaml",
        "root": "root.yaml",
        "default": "root.yaml",
    }


def test_a_circle(file: Path, tmp_path: Path):
    file.write_text(written(extends="other.yaml"))
    (tmp_path / "other.yaml").write_text(written(extends="p.yaml"))
    assert error_of(file) == "other.yaml:2:10: extends goes round in a circle: p.yaml -> other.yaml -> p.yaml"
    file.write_text(written(extends="p.yaml"))
    assert error_of(file) == "p.yaml:2:10: extends goes round in a circle: p.yaml -> p.yaml"


def test_a_file_that_is_not_there(file: Path):
    file.write_text(written(extends="nowhere.yaml"))
    assert error_of(file) == "p.yaml:2:10: extends 'nowhere.yaml': there is no such file"


def test_a_file_below_that_is_broken_is_the_one_named(file: Path, tmp_path: Path):
    file.write_text(written(extends="base.yaml"))
    (tmp_path / "base.yaml").write_text(
        written("base: gpu_arch: sm9 -> hybrid", extends=None, default="hybrid")
    )
    assert error_of(file).startswith("base.yaml:3:")


def test_a_default_is_missing_only_where_nothing_has_one(file: Path):
    file.write_text(written(extends=None))
    assert (
        error_of(file)
        == "p.yaml:1:1: 'default' is missing; 'extends: default' takes the shipped rules for all the rest"
    )


def test_a_replacing_rule_behind_one_that_covers_it_can_never_match(file: Path):
    file.write_text(
        written("all: 'page_size': '>=1' -> hybrid", "fa3-on-hopper: page_size: 64 -> copy_engine")
    )
    assert error_of(file) == (
        "p.yaml:5:10: rule 'fa3-on-hopper' can never match: rule 'all' before it matches whenever it does"
    )


def test_a_difference_may_cover_what_it_extends(file: Path):
    file.write_text(written("mine: attention_backend: fa3 -> hybrid"))
    assert names(load_policy(file)) == ["mine", *SHIPPED]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "machine.yaml"
    path.touch()
    path.chmod(0o644)  # whatever the umask is
    monkeypatch.setenv(MACHINE, str(path))
    return path


def test_the_machine_file_is_between(machine: Path, file: Path):
    machine.write_text(written("measured: gpu_arch: sm80 -> copy_engine"))
    alone = policy_in_force()
    assert names(alone) == ["measured", *SHIPPED]
    assert (alone.source, alone.layer("measured")) == (str(machine), "machine file")
    file.write_text(written("mine: kv_kind: mha -> hybrid"))
    assert names(policy_in_force(file)) == ["mine", "measured", *SHIPPED]
    by_hand = decide(policy_in_force(file), TRITON, backend="hybrid")
    assert by_hand.layer == "option"
    file.write_text(written("mine: kv_kind: mha -> hybrid", extends=None, default="hybrid"))
    assert names(policy_in_force(file)) == ["mine"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            written("m: kv_kind: mla -> hybrid", extends=None, default="hybrid"),
            "1:1: a machine file must say 'extends: default': it adds to the shipped rules",
        ),
        (
            written("m: kv_kind: mla -> hybrid", extends="other.yaml"),
            "2:10: a machine file must say 'extends: default': it adds to the shipped rules",
        ),
    ],
)
def test_a_machine_file_only_adds(machine: Path, text: str, message: str):
    machine.write_text(text)
    with pytest.raises(PolicyError) as caught:
        policy_in_force()
    assert str(caught.value) == f"{machine}:{message}"


def test_a_machine_file_may_replace_a_rule_for_speed(machine: Path):
    """It stays behind the rules for safety, so that what it measured never takes a fence away."""
    machine.write_text(written("layer-first-short-copies: mem_layout: layer_first -> copy_engine"))
    found = policy_in_force()
    assert names(found) == SHIPPED
    assert decide(found, FA3).rule == "fa3-on-hopper"


@pytest.mark.parametrize(
    ("mode", "who"), [(0o664, "its group"), (0o646, "everybody"), (0o777, "its group and everybody")]
)
def test_a_machine_file_that_others_can_write_is_refused(machine: Path, mode: int, who: str):
    """As ssh does with its own configuration; root's processes are held to it, too."""
    machine.write_text(written())
    machine.chmod(mode)
    with pytest.raises(PolicyError) as caught:
        policy_in_force()
    assert str(caught.value) == (
        f"{machine}: can be written by {who}, not by its owner alone: chmod go-w {machine}"
    )


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o444, 0o755])
def test_a_machine_file_that_its_owner_alone_can_write_is_read(machine: Path, mode: int):
    machine.write_text(written())
    machine.chmod(mode)
    assert names(policy_in_force()) == SHIPPED


def test_a_machine_file_of_somebody_else_is_refused(machine: Path, monkeypatch: pytest.MonkeyPatch):
    machine.write_text(written())
    owner = machine.stat().st_uid
    if owner == 0:  # these tests run as root: give the file to somebody
        owner = 12345
        os.chown(machine, owner, -1)
    for reader in (0, owner + 1):
        monkeypatch.setattr(os, "geteuid", lambda reader=reader: reader)
        with pytest.raises(PolicyError) as caught:
            policy_in_force()
        assert str(caught.value) == (
            f"{machine}: is owned by user {owner}, who is neither root nor the user that reads it "
            f"({reader}), and "
            f"could change it: chown {reader} {machine}"
        )
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    assert names(policy_in_force()) == SHIPPED


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to root")
def test_a_machine_file_of_root_is_read_by_everybody(machine: Path, monkeypatch: pytest.MonkeyPatch):
    machine.write_text(written())
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert names(policy_in_force()) == SHIPPED


def test_the_command_in_the_message_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "my machine.yaml"
    path.write_text(written())
    path.chmod(0o666)
    monkeypatch.setenv(MACHINE, str(path))
    with pytest.raises(PolicyError) as caught:
        policy_in_force()
    assert str(caught.value).endswith(f"chmod go-w '{path}'")


def test_a_machine_file_is_a_regular_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(MACHINE, "/dev/null")
    with pytest.raises(PolicyError, match="/dev/null: is not a regular file, as a machine file must be"):
        policy_in_force()


@pytest.mark.timeout(30)
def test_a_pipe_in_the_machine_files_place_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe = tmp_path / "machine.yaml"
    os.mkfifo(pipe)
    monkeypatch.setenv(MACHINE, str(pipe))
    with pytest.raises(PolicyError, match="is not a regular file, as a machine file must be"):
        policy_in_force()


def test_where_the_machine_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(MACHINE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "sglang-hicache-io" / "machine.yaml"
    assert default_machine_file() == path
    assert policy_in_force() == default_policy()  # none is there
    path.parent.mkdir()
    path.write_text(written("measured: gpu_arch: sm80 -> copy_engine"))
    path.chmod(0o644)
    assert names(policy_in_force()) == ["measured", *SHIPPED]
    monkeypatch.setenv(MACHINE, "")
    assert policy_in_force() == default_policy()
    monkeypatch.setenv(MACHINE, str(tmp_path / "gone.yaml"))
    with pytest.raises(PolicyError, match=r"gone\.yaml: there is no such file"):
        policy_in_force()
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_machine_file() == tmp_path / ".config" / "sglang-hicache-io" / "machine.yaml"


@given(documents())
def test_a_file_over_an_empty_one_says_what_it_says_alone(tmp_path_factory, document):
    folder = tmp_path_factory.mktemp("extends")
    empty = {"version": 1, "rules": [], "default": document["default"]}
    for name, content in {"base.yaml": empty, "top.yaml": {**document, "extends": "base.yaml"}}.items():
        with (folder / name).open("w") as stream:
            YAML(typ="safe", pure=True).dump(content, stream)
    found, alone = load_policy(folder / "top.yaml"), policy(document)
    assert (found.rules, found.default) == (alone.rules, alone.default)
