"""Policy files: what loads, and the one line that says what is wrong with a file that does not."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from policy_bad_files import BAD, DEFAULT, rule, with_rules

from sglang_hicache.io_backends.policy_files import (
    default_policy,
    load_policy,
    load_policy_text,
    policy_in_force,
)
from sglang_hicache.policy.format.errors import PolicyError


def error_of(text: str) -> str:
    with pytest.raises(PolicyError) as caught:
        load_policy_text(text, "p.yaml")
    return str(caught.value)


def test_the_contract_example_loads():
    policy = load_policy_text(
        dedent(
            """
            version: 1
            rules:                       # first match wins
              - name: fa3-on-hopper      # unique
                when:                    # all must hold; a list means any of
                  attention_backend: [fa3]        # effective prefill or decode backend
                  gpu_arch: [sm90]
                  sgl_kernel: ">=0.3"             # PEP 440 specifier
                  page_size: "<64"                # comparison, or a list
                  mem_layout: [layer_first, page_first]
                use:
                  backend: hybrid
                  fence_forward: [extend]
                  options: {staging_mb: 256, gather_ctas: 32}
                because: "what was seen,
                  where"
            default:
              use: {backend: hybrid, fence_forward: []}
              because: "…"
            """
        ),
        "p.yaml",
    )
    (only,) = policy.rules
    assert only.name == "fa3-on-hopper"
    assert only.when.written() == {
        "attention_backend": ("fa3",),
        "gpu_arch": ("sm90",),
        "sgl_kernel": (">=0.3",),
        "mem_layout": ("layer_first", "page_first"),
        "page_size": ("<64",),
    }
    assert (only.use.backend, only.use.fence_forward) == ("hybrid", ("extend",))
    assert only.use.options == {"staging_mb": 256, "gather_ctas": 32}
    assert only.because == "what was seen, where"
    assert policy.source == "p.yaml"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("version: 1\nrules: []" + DEFAULT, id="no rules"),
        pytest.param(rule(when="{}"), id="a rule without conditions"),
        pytest.param(rule(when="{gpu_arch: sm90a, device: cuda}"), id="scalars"),
        pytest.param(rule(when="{page_size: [1, '>=64', '>=16,<32']}"), id="page sizes"),
        pytest.param(rule(when="{page_size: 0x10}"), id="hexadecimal"),
        pytest.param(rule(when="{sglang: ['>=0.5.18,<0.5.20', ==0.5.23]}"), id="specifiers, any of"),
        pytest.param(rule(when="{sglang: '>=1.0rc1,<1.0rc1'}"), id="undecidable specifiers get the benefit"),
        pytest.param(rule(use="{backend: fenced_kernel, fence_forward: []}"), id="producer fence only"),
        pytest.param(rule(use="{backend: hybrid, fence_forward: extend}"), id="one forward as a scalar"),
        pytest.param(
            rule(when="{attention_backend: fa3}", use="{backend: hybrid, fence_forward: [uses, decode]}"),
            id="uses in a list",
        ),
        pytest.param(
            rule(when="{decode_attention_backend: fa3}", use="{backend: hybrid, fence_forward: uses}"),
            id="uses by a decode condition",
        ),
        pytest.param(
            rule(use="&u {backend: hybrid}").replace("{backend: hybrid, fence_forward: []}", "*u"),
            id="anchors and aliases",
        ),
        pytest.param(
            rule(
                when="{attention_backend: fa3, prefill_attention_backend: fa4, decode_attention_backend: fa3}"
            ),
            id="attention backends that agree on one forward",
        ),
    ],
)
def test_loads(text: str):
    load_policy_text(text, "p.yaml")


def test_a_byte_order_mark_is_no_column(tmp_path: Path):
    path = tmp_path / "p.yaml"
    path.write_text(rule(), encoding="utf-8-sig")
    load_policy(path)
    path.write_text("version: 2\n", encoding="utf-8-sig")
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    assert (caught.value.line, caught.value.column) == (1, 10)


@pytest.mark.parametrize("name", BAD)
def test_one_line_says_what_is_wrong(name: str):
    text, expected = BAD[name]
    assert error_of(text) == f"p.yaml:{expected}"


TWO_RULES = """
- name: first
  when: {first}
  use: {{backend: hybrid}}
  because: seen
- name: second
  when: {second}
  use: {{backend: copy_engine}}
  because: seen
"""


def two_rules(first: str, second: str) -> str:
    """A file with the rules `first` and `second`; the name of the second is at line 7."""
    return with_rules(TWO_RULES.format(first=first, second=second))


def test_two_rules_of_one_name():
    text = two_rules("{kv_kind: mla}", "{kv_kind: mha}").replace("second", "first")
    assert error_of(text) == "p.yaml:7:9: a second rule with the name 'first'"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("{}", "{gpu_arch: sm90}", id="everything before"),
        pytest.param("{gpu_arch: sm90}", "{gpu_arch: sm90}", id="the same"),
        pytest.param("{gpu_arch: sm90a}", "{gpu_arch: [sm90]}", id="the same in other words"),
        pytest.param("{attention_backend: [fa3, dsa]}", "{attention_backend: nsa}", id="an alias"),
        pytest.param(
            "{gpu_arch: [sm90, sm100]}", "{gpu_arch: sm90, kv_kind: mla}", id="narrower in two keys"
        ),
        pytest.param(
            "{attention_backend: fa3}", "{prefill_attention_backend: fa3}", id="one forward of either"
        ),
        pytest.param("{page_size: '<=64'}", "{page_size: [1, '>=16,<32']}", id="page sizes within"),
        pytest.param("{page_size: ['<32', '>=32']}", "{page_size: '>=8'}", id="page sizes joined"),
        pytest.param("{sglang: '>=0.5'}", "{sglang: '>=0.5.19,<0.5.21'}", id="versions within"),
        pytest.param("{sglang: ==0.5.*}", "{sglang: ~=0.5.19}", id="versions by prefix"),
        pytest.param(
            "{attention_backend: fa3}",
            "{draft_attention_backend: fa3, speculative: [EAGLE, NGRAM]}",
            id="a draft that surely runs",
        ),
        pytest.param("{overlap: [true, false]}", "{overlap: true}", id="a flag within"),
        pytest.param("{write_tokens: '<64'}", "{write_tokens: 1, tp: 8}", id="writes within"),
        pytest.param(
            "{page_size: 1}\n  unknown: match", "{page_size: 1}\n  unknown: match", id="unknown too"
        ),
        pytest.param("{page_size: 1}\n  unknown: match", "{page_size: 1}", id="unknown before only"),
        pytest.param(
            "{sglang: '>=1.0rc1'}", "{sglang: '>=1.0rc1', device: cuda}", id="the same undecidable one"
        ),
    ],
)
def test_a_rule_behind_a_broader_one_can_never_match(first: str, second: str):
    line = 7 + first.count("\n")
    expected = (
        f"p.yaml:{line}:9: rule 'second' can never match: rule 'first' before it matches whenever it does"
    )
    assert error_of(two_rules(first, second)) == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("{gpu_arch: sm90, kv_kind: mla}", "{gpu_arch: sm90}", id="broader behind"),
        pytest.param("{gpu_arch: sm90}", "{attention_backend: fa3}", id="another key"),
        pytest.param("{prefill_attention_backend: fa3}", "{attention_backend: fa3}", id="either behind one"),
        pytest.param("{page_size: '<64'}", "{page_size: '<=64'}", id="one page size more"),
        pytest.param("{page_size: 1}", "{page_size: 1}\n  unknown: match", id="unknown behind known"),
        pytest.param(
            "{attention_backend: fa3}",
            "{decode_attention_backend: fa3}\n  unknown: match",
            id="unknown behind either",
        ),
        pytest.param(
            "{attention_backend: fa3}", "{draft_attention_backend: fa3}", id="a draft that may not run"
        ),
        pytest.param(
            "{attention_backend: fa3}",
            "{draft_attention_backend: fa3, speculative: [none, EAGLE]}",
            id="a draft that need not run",
        ),
        pytest.param(
            "{kv_kind: mla}",
            "{attention_backend: fa3, prefill_attention_backend: fa4, decode_attention_backend: fa4, "
            "speculative: none}\n  unknown: [decode_attention_backend]",
            id="an unknown that may be the one excluded",
        ),
        pytest.param("{write_tokens: 1}", "{}", id="every write behind some"),
        pytest.param("{sglang: '>0.5.18'}", "{sglang: '>=0.5.18'}", id="one version more"),
        pytest.param("{sglang: <0.5.19}", "{sglang: <=0.5.19}", id="one version more at the end"),
    ],
)
def test_a_rule_that_some_facts_reach_is_fine(first: str, second: str):
    assert len(load_policy_text(two_rules(first, second), "p.yaml").rules) == 2


def test_the_first_problem_in_the_file_is_reported():
    text = rule(when="{gpu_arch: sm9}", use="{backend: nope}").replace("[]}", "[x]}")
    assert error_of(text).startswith("p.yaml:4:20: ")


def test_an_error_has_its_parts():
    with pytest.raises(PolicyError) as caught:
        load_policy_text(rule(use="{backend: hibrid}"), "p.yaml")
    error = caught.value
    assert isinstance(error, ValueError)
    assert (error.filename, error.line, error.column) == ("p.yaml", 5, 18)
    assert (error.message, error.hint) == ("unknown backend 'hibrid'", "hybrid")


def test_no_error_shows_the_libraries_behind_it():
    for text, _ in BAD.values():
        shown = error_of(text)
        assert "\n" not in shown
        assert not any(
            word in shown.lower() for word in ("pydantic", "ruamel", "http", "validation error", "input")
        )


def test_nested_aliases_stay_small():
    """Ten levels of ten aliases are ten thousand million values to anyone who copies them."""
    levels = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)]
    assert error_of("version: 1\n" + "\n".join(levels[:4]) + "\n").startswith("p.yaml:2:1: unknown key 'a0'")
    assert error_of("version: 1\n" + "\n".join(levels) + "\n") == (
        "p.yaml:7:5: its aliases stand for more than 100,000 values"
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[" * 3000 + "]" * 3000, "2:39"),
        ("[" * 3000, "2:39"),
        ("{a: " * 3000 + "}" * 3000, "2:129"),
        ("\n" + "".join(" " * n + "a:\n" for n in range(1, 500)), "33:32"),
        ("\n" + "- " * 500 + "x", "3:63"),
        ("? " * 500 + "x", None),
    ],
    ids=["lists", "open lists", "mappings", "lines", "dashes", "keys"],
)
def test_a_file_nested_beyond_reason(text: str, place: str | None):
    """ruamel's scanner alone takes the square of the depth: 3,000 lists were 10 s."""
    before = time.process_time()
    said = error_of("version: 1\nrules: " + text)
    assert time.process_time() - before < 4
    if place is not None:
        assert said == f"p.yaml:{place}: is nested more than 32 levels deep, too deeply for a policy"


@pytest.mark.parametrize(
    "key", ["{a: b}", "[a, b]", "{a: {b: [c]}}", "[{a: b}]", "[[a]]", "{}", "[]", "&x {a: b}", "!!set {a}"]
)
@pytest.mark.parametrize("text", ["version: 1\n? {}\n: c\n", rule(when="{? {}\n : c}"), "? {}\n"])
def test_a_key_that_is_no_word(key: str, text: str):
    said = error_of(text.replace("? {}", f"? {key}"))
    assert re.match(r"p\.yaml:\d+:\d+: a (mapping|list) is no key of a policy; a key is a word$", said), said


def test_an_alias_of_a_mapping_is_no_key_either():
    assert error_of("version: 1\na: &x {b: c}\n*x : d\n") == (
        "p.yaml:3:1: a mapping is no key of a policy; a key is a word"
    )


# A terminal would obey the first three, and show the others as something else, or not at all.
UNSAFE = ["\x1b", "\x00", "\x9b", "\u202e", "\u2066", "\u200b", "\u2028", "\ufeff", "\ud800", "\U000e0041"]


@pytest.mark.parametrize("character", UNSAFE)
@pytest.mark.parametrize(
    "text",
    [
        rule(name="TEXT"),
        rule().replace("seen", "TEXT"),
        rule(when="{gpu_name: TEXT}"),
        rule(when="{TEXT: sm90}"),
        rule(use="{backend: TEXT}"),
        rule(use="{backend: hybrid, options: {TEXT: 1}}"),
        rule().replace("  use:", "  unmeasured: {when.gpu_arch: TEXT}\n  use:", 1),
        rule().replace("rules:", "extends: TEXT\nrules:", 1),
        "version: TEXT\n",
        "TEXT: 1\n",
    ],
)
def test_no_text_of_a_policy_can_hold_what_a_terminal_obeys(text: str, character: str):
    said = error_of(
        text.replace("TEXT", f'"a{character.encode("unicode_escape", "surrogatepass").decode()}b"')
    )
    assert "cannot stand in a policy" in said
    assert f"U+{ord(character):04X}" in said
    assert character not in said


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nrules: *a\u202eb\n",
        "version: 1\n\u202ea: 1\n\u202ea: 2\n",
        "version: 1\nrules: !\u202ea! x\n",
        "version: 1\nrules: \u202e]\n",
        "a\x85b: 1\n",
    ],
)
def test_what_an_error_quotes_is_shown_as_escapes(text: str):
    said = error_of(text)
    assert "\u202e" not in said
    assert "\x85" not in said


def test_a_name_of_a_file_is_held_to_the_same(tmp_path: Path):
    with pytest.raises(PolicyError) as caught:
        load_policy(tmp_path / "a\x1b[31mb.yaml")
    assert str(caught.value).endswith("a\\x1b[31mb.yaml: the file's name has the character U+001B")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gpu_name takes one line", rule(when='{gpu_name: "a\\nb"}')),
        ("extends", 'version: 1\nextends: "a\\tb"\nrules: []\n'),
    ],
)
def test_a_name_has_one_line(name: str, text: str):
    assert "it takes one line" in error_of(text)


def test_a_reason_may_have_lines_and_joiners():
    text = rule().replace("because: seen", "because: |\n    first\n    \tsecond \u06cc\u200c\u0647")
    assert load_policy_text(text, "p.yaml").rules[0].because == "first second \u06cc\u200c\u0647"


def test_a_file_that_is_too_large(tmp_path: Path):
    path = tmp_path / "p.yaml"
    path.write_text(rule() + "#" * 256 * 1024)
    with pytest.raises(PolicyError, match="is larger than 256 KiB, which no policy is"):
        load_policy(path)
    with pytest.raises(PolicyError, match="is larger than 256 KiB"):
        load_policy("/dev/zero")


def many_rules(condition: Callable[[int], str], count: int) -> str:
    rules = "".join(
        f"- {{name: r{n}, when: {{{condition(n)}}}, use: {{backend: hybrid}}, because: x}}\n"
        for n in range(count)
    )
    return with_rules(rules)


@pytest.mark.parametrize(
    "text",
    [
        many_rules(lambda n: f"sglang: ==0.5.{n}", 300),
        many_rules(lambda n: f"sglang: '>=0.5.{n},<0.5.{n + 2}'", 300),
        many_rules(lambda n: f"page_size: {n + 1}", 500),
        many_rules(lambda n: f"write_tokens: '>={n + 1},<{n + 3}'", 500),
        many_rules(lambda n: f"gpu_name: gpu {n}", 500),
    ],
    ids=["versions", "ranges of versions", "page sizes", "tokens", "names"],
)
def test_many_rules_are_read_in_moments(text: str):
    """Half of it is ruamel's parser. 300 ranges of versions were 13 s."""
    before = time.process_time()
    load_policy_text(text, "p.yaml")
    assert time.process_time() - before < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (many_rules(lambda n: f"page_size: {n + 1}", 501), "503:3: a policy has at most 500 rules"),
        (
            rule(when="{page_size: '" + ",".join(f"!={n}" for n in range(5000)) + "'}"),
            "4:21: page_size has 33,889 characters; at most 256 are read",
        ),
        (
            rule(when="{page_size: [" + ",".join(map(str, range(1, 66))) + "]}"),
            "4:21: page_size lists 65 values; at most 64 are read",
        ),
        (rule(name="n" * 300), "3:9: name has 300 characters; at most 256 are read"),
        (
            rule(when="{page_size: 0x" + "F" * 5000 + "}"),
            "4:21: a number that is too large for anything in a policy",
        ),
        ("version: 1\n0x" + "F" * 100 + ": 1\n", "2:1: the key a number is not a word"),
    ],
    ids=["rules", "a comparison", "a list", "a name", "a number", "a number as a key"],
)
def test_what_is_larger_than_any_policy_is_refused(text: str, message: str):
    before = time.process_time()
    assert error_of(text) == f"p.yaml:{message}"
    assert time.process_time() - before < 5


def test_a_date_that_is_none():
    assert error_of("version: 2020-99-99\n").startswith("p.yaml:1:1: not YAML that can be read: ")


def test_files_that_cannot_be_read(tmp_path: Path):
    missing = tmp_path / "missing.yaml"
    with pytest.raises(PolicyError) as caught:
        load_policy(missing)
    assert str(caught.value) == f"{missing}: there is no such file"
    assert caught.value.line is None
    with pytest.raises(PolicyError, match="is a directory, not a policy file"):
        load_policy(tmp_path)
    (tmp_path / "latin").write_bytes(b"version: \xe9")
    with pytest.raises(PolicyError, match=r"is not UTF-8 text \(byte 9\)"):
        load_policy(tmp_path / "latin")
    with pytest.raises(PolicyError, match="cannot be read: Not a directory"):
        load_policy(tmp_path / "latin" / "p.yaml")
    with pytest.raises(PolicyError, match="the name is empty"):
        load_policy("")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path):
    (tmp_path / "p.yaml").touch(mode=0)
    with pytest.raises(PolicyError, match="cannot be read: Permission denied"):
        load_policy(tmp_path / "p.yaml")


def test_which_policy_is_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    by_option, by_variable = tmp_path / "option.yaml", tmp_path / "variable.yaml"
    by_option.write_text(rule(name="option"))
    by_variable.write_text(rule(name="variable"))
    monkeypatch.delenv("SGLANG_HICACHE_IO_POLICY", raising=False)
    assert policy_in_force() == default_policy()
    monkeypatch.setenv("SGLANG_HICACHE_IO_POLICY", str(by_variable))
    assert policy_in_force().rules[0].name == "variable"
    assert policy_in_force(by_option).rules[0].name == "option"
    monkeypatch.setenv("SGLANG_HICACHE_IO_POLICY", "")
    assert policy_in_force() == default_policy()
