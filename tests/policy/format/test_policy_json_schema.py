"""``hicache-io policy schema``: a standard validator with it agrees with the loader."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
from policy_bad_files import BAD, rule
from policy_strategies import documents, given
from ruamel.yaml import YAML

from sglang_hicache.io_backends.policy_files import load_policy_text, policy_json_schema
from sglang_hicache.io_backends.registry import register_backend, unregister_backend
from sglang_hicache.policy.fact_table import CONDITIONS

# What the schema leaves to `policy validate`: broken YAML, values that exclude each other.
BEYOND = {
    "not YAML",
    "a tab",
    "a control character",
    "two documents",
    "an undefined alias",
    "a key twice",
    "a nested key twice",
    "a page size below every one",
    "a number of ranks below every one",
    "entries that exclude each other",
    "attention backends that exclude each other, drafts included",
    "unknown of a condition that the rule has not",
    "unmeasured that is no path",
    "page sizes that exclude each other",
    "versions that exclude each other",
    "attention backends that exclude each other",
    "a GPU on the CPU",
}
# YAML that is no JSON: a JSON Schema never sees it.
NOT_JSON = {"a key that is no word", "an alias of itself", "a date", "a tag"}


def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(policy_json_schema())
    return jsonschema.Draft202012Validator(policy_json_schema())


def parsed(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def test_it_accepts_the_shipped_policy():
    text = files("sglang_hicache.policy").joinpath("default.yaml").read_text(encoding="utf-8")
    validator().validate(parsed(text))


CHECK = validator()

EXTENDING = """
version: 1
extends: default
rules:
- name: mine
  when: {overlap: false, tp: ">1", speculative: [none, EAGLE], gpu_name: NVIDIA H200, write_contiguous: true}
  unknown: [overlap, tp]
  use: {backend: hybrid, fence_forward: [extend, decode], options: {gather_ctas: 192}}
  because: seen
  unmeasured: {when.tp: 3 and 5 to 7, use.options.gather_ctas: above 64}
"""


def test_it_accepts_a_difference_without_a_default():
    load_policy_text(EXTENDING, "p.yaml")
    CHECK.validate(parsed(EXTENDING))
    assert not CHECK.is_valid(parsed(EXTENDING.replace("extends: default\n", "")))


@given(documents())
def test_it_accepts_what_the_loader_accepts(written: dict[str, Any]):
    CHECK.validate(json.loads(json.dumps(written)))


@pytest.mark.parametrize("name", sorted(BAD.keys() - BEYOND - NOT_JSON))
def test_it_rejects_what_the_loader_rejects(name: str):
    assert not CHECK.is_valid(parsed(BAD[name][0]))


@pytest.mark.parametrize("name", sorted(BEYOND & {name for name in BAD if "exclude" in name}))
def test_what_is_left_to_the_loader_is_so_on_purpose(name: str):
    """If the schema learns to reject one of these, it belongs in the test above."""
    assert CHECK.is_valid(parsed(BAD[name][0]))


def test_it_says_what_each_fact_means():
    conditions = policy_json_schema()["$defs"]["when"]["properties"]
    assert {key: each["description"] for key, each in conditions.items()} == {
        key: spec.meaning for key, spec in CONDITIONS.items()
    }


def test_it_names_registered_backends():
    text = rule(use="{backend: tape, options: {reels: two}}")
    assert not CHECK.is_valid(parsed(text))
    register_backend("tape", lambda device, options: None)
    try:
        validator().validate(parsed(text))
    finally:
        unregister_backend("tape")
