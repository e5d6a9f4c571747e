"""``hicache-io explain`` and ``hicache-io policy``: output, JSON and exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from policy_bad_files import BAD, rule
from typer.testing import CliRunner, Result

from sglang_hicache.bench.cli import app
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import FACT_NAMES, Facts
from sglang_hicache.policy.load import default_policy

GIVEN = ["--attention-backend", "fa3", "--gpu-arch", "sm90"]


@pytest.fixture(autouse=True)
def _no_policy_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SGLANG_HICACHE_IO_POLICY", raising=False)


def run(*arguments: str | Path, **env: str) -> Result:
    return CliRunner().invoke(
        app, [str(each) for each in arguments], env={"NO_COLOR": "1", "COLUMNS": "80", **env}
    )


def explained(*arguments: str | Path, **env: str) -> Any:
    result = run("explain", *arguments, "--json", **env)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(rule(when="{gpu_arch: sm90}", use="{backend: copy_engine, fence_forward: [decode]}"))
    return path


def test_explain_as_json():
    answer = explained(*GIVEN)
    assert answer["backend"] == "hybrid"
    assert answer["fence_forward"] == ["extend", "decode"]
    assert answer["rule"] == "fa3-on-hopper"
    assert "#20611" in answer["because"]
    assert answer["upstream_io_backend"] == "kernel"
    assert list(answer["facts"]) == list(FACT_NAMES)
    assert answer["facts"]["gpu_arch"] == {"value": "sm90", "source": "given"}
    assert answer["considered"] == [
        {
            "rule": "fa3-on-hopper-tiny-pages",
            "matched": False,
            "reason": "mem_layout is page_first (the rule wants layer_first)",
        },
        {
            "rule": "fa3-on-hopper",
            "matched": True,
            "reason": "prefill_attention_backend is fa3 and decode_attention_backend is fa3; "
            "gpu_arch is sm90",
        },
    ]


def test_explain_takes_every_fact():
    answer = explained(
        *("--prefill-attention-backend", "fa3", "--decode-attention-backend", "flashinfer"),
        *("--gpu-arch", "sm90", "--sgl-kernel", "0.4.9", "--sglang", "0.5.22", "--kv-kind", "mla"),
        *("--mem-layout", "page_first_direct", "--page-size", "64"),
    )
    facts = {name: fact["value"] for name, fact in answer["facts"].items()}
    assert facts == {
        "prefill_attention_backend": "fa3",
        "decode_attention_backend": "flashinfer",
        "gpu_arch": "sm90",
        "sgl_kernel": "0.4.9",
        "sglang": "0.5.22",
        "kv_kind": "mla",
        "mem_layout": "page_first_direct",
        "page_size": 64,
        "device": "cuda",
    }
    assert {answer["facts"][name]["source"] for name in FACT_NAMES if name != "device"} == {"given"}
    assert answer["fence_forward"] == ["extend"]
    assert answer["upstream_io_backend"] == "direct"


def test_explain_follows_a_policy_file(file: Path):
    for answer in (
        explained(*GIVEN, "--policy", file),
        explained(*GIVEN, SGLANG_HICACHE_IO_POLICY=str(file)),
    ):
        assert (answer["backend"], answer["rule"], answer["policy"]) == ("copy_engine", "one", str(file))
    assert explained(*GIVEN)["policy"] == "shipped default"


def test_explain_with_a_backend_by_hand(file: Path):
    answer = explained(*GIVEN, "--policy", file, "--backend", "hybrid")
    assert (answer["backend"], answer["rule"], answer["fence_forward"]) == ("hybrid", "one", ["decode"])
    fenced = explained(*GIVEN, "--policy", file, "--backend", "fenced_kernel")
    assert fenced["fence_forward"] == ["extend", "decode"]
    assert fenced["rule"] == "--hicache-io-backend fenced_kernel"
    kernel = explained(*GIVEN, "--sglang", "0.5.22", "--backend", "kernel")
    assert (kernel["backend"], kernel["fence_forward"], kernel["considered"]) == ("kernel", [], [])
    assert "untouched" in kernel["because"]
    assert "0.5.22, D2H does not wait" in kernel["because"]


def flat(text: str) -> str:
    """`text` without its line breaks, to look for sentences in."""
    return " ".join(text.split())


@pytest.mark.parametrize("columns", ["80", "60"])
def test_explain_for_people_shows_everything(columns: str):
    shown = run("explain", *GIVEN, "--sglang", "0.5.23", COLUMNS=columns).stdout
    assert all(len(line) <= int(columns) for line in shown.splitlines())
    assert "…" not in shown
    assert "\x1b" not in shown
    decision = decide(default_policy(), Facts.given(attention_backend="fa3", gpu_arch="sm90"))
    assert decision.because in flat(shown)
    assert "hybrid" in shown.splitlines()[0]
    assert "Prefill (extend) and decode wait, on the GPU, for the last gather" in flat(shown)
    assert "rule fa3-on-hopper of the shipped policy" in flat(shown)
    for name in FACT_NAMES:
        assert name in shown
    assert shown.index("Why") < shown.index("Facts") < shown.index("Rules considered")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--attention-backend", "triton"], "No forward waits: compute and write-back overlap fully."),
        (
            ["--decode-attention-backend", "fa3"],
            "Decode waits, on the GPU, for the last gather within GPU memory",
        ),
        (
            ["--backend", "fenced_kernel"],
            "decode wait, on the GPU, for the whole of the last transfer to the host.",
        ),
        (
            ["--attention-backend", "fa3", "--backend", "copy_engine"],
            "No forward waits for copy_engine, which has no work on the SMs; prefill (extend) and decode",
        ),
        (["--backend", "direct"], "No fence of this project: SGLang's own behaviour, untouched."),
    ],
)
def test_fences_in_a_sentence(arguments: list[str], sentence: str):
    assert sentence in flat(run("explain", "--gpu-arch", "sm90", *arguments).stdout)


def test_explain_says_which_unknown_facts_could_matter():
    shown = flat(run("explain", "--gpu-arch", "sm90").stdout)
    note = (
        "with more known, another rule might match (fa3-on-hopper, fa3-inside-dsa-on-hopper): "
        "give --attention-backend."
    )
    # Before the answer that it puts in doubt.
    assert note in shown
    assert shown.index(note) < shown.index("No forward waits")
    known = run("explain", "--gpu-arch", "sm90", "--attention-backend", "triton")
    assert "with more known" not in known.stdout
    undecided = json.loads(run("explain", "--gpu-arch", "sm90", "--json").stdout)["undecided"]
    assert undecided == ["fa3-on-hopper", "fa3-inside-dsa-on-hopper"]


def test_explain_says_what_a_server_would_refuse():
    shown = run("explain", *GIVEN, "--mem-layout", "page_head", "--backend", "copy_engine", "--json")
    refused = json.loads(shown.stdout)["refused"]
    assert refused.startswith("--hicache-io-backend copy_engine cannot serve --hicache-mem-layout page_head")
    assert json.loads(run("explain", *GIVEN, "--sglang", "0.5.23", "--json").stdout)["refused"] is None
    old = flat(run("explain", *GIVEN, "--sglang", "0.5.10").stdout)
    assert "A server would refuse this: SGLang 0.5.10 is not known to sglang-hicache-io" in old


def test_explain_says_who_copies_a_layout_that_the_backend_cannot():
    shown = json.loads(run("explain", *GIVEN, "--mem-layout", "page_unified", "--json").stdout)
    assert shown["refused"] is None
    assert "SGLang's own copy runs instead, and extend and decode would wait for it" in shown["fallback"]


def test_text_of_a_policy_file_is_never_read_as_markup(tmp_path: Path):
    path = tmp_path / "p.yaml"
    path.write_text(rule(name="'[red]one[/]'").replace("seen", "'[bold] :smile: [/nope]'"))
    for shown in (run("explain", *GIVEN, "--policy", path), run("policy", "show", "--policy", path)):
        assert shown.exit_code == 0
        assert "[red]one[/]" in shown.stdout
        assert "[bold] :smile: [/nope]" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--attention-backend", "fa33"],
            "--attention-backend: unknown attention backend 'fa33' (did you mean 'fa3'?)",
        ),
        (
            ["--gpu-arch", "sm_90"],
            "--gpu-arch: unknown GPU architecture 'sm_90': written sm90, sm100, ... or cpu "
            "(did you mean 'sm90'?)",
        ),
        (["--kv-kind", "gqa"], "--kv-kind: unknown KV kind 'gqa'; valid: mha, mla"),
        (
            ["--mem-layout", "pagefirst"],
            "--mem-layout: unknown memory layout 'pagefirst' (did you mean 'page_first'?)",
        ),
        (["--page-size", "0"], "--page-size: '0' is not a page size: a whole number of tokens, 1 or more"),
        (["--sglang", "new"], "--sglang: 'new' is not a version of sglang, such as 0.5.23"),
        (["--backend", "hybird"], "--backend: unknown backend 'hybird' (did you mean 'hybrid'?)"),
        (["--policy", "/does/not/exist.yaml"], "/does/not/exist.yaml: there is no such file"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments: list[str], message: str):
    result = run("explain", *arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", message + "\n")


def test_validate_a_good_file(file: Path):
    result = run("policy", "validate", file)
    assert (result.exit_code, result.stdout) == (0, f"{file}: ok, 1 rule\n")
    as_json = run("policy", "validate", file, "--json")
    assert (as_json.exit_code, json.loads(as_json.stdout)) == (0, {"ok": True, "rules": 1, "errors": []})


@pytest.mark.parametrize(
    "command", [["policy", "validate"], ["policy", "show", "--policy"], ["explain", "--policy"]]
)
def test_a_broken_file_is_one_line_and_status_2(command: list[str], tmp_path: Path):
    path = tmp_path / "bad.yaml"
    text, expected = BAD["an unknown backend"]
    path.write_text(text)
    result = run(*command, path)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"{path}:{expected}\n")


def test_validate_a_broken_file_as_json(tmp_path: Path):
    path = tmp_path / "bad.yaml"
    text, expected = BAD["an unknown backend"]
    path.write_text(text)
    result = run("policy", "validate", path, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {
        "ok": False,
        "errors": [
            {
                "filename": str(path),
                "line": 5,
                "column": 18,
                "message": "unknown backend 'hibrid'",
                "hint": "hybrid",
                "text": f"{path}:{expected}",
            }
        ],
    }


def test_show_for_people():
    shown = flat(run("policy", "show").stdout)
    assert shown.startswith(
        "shipped default: 5 rules, the first match decides 1. fa3-on-hopper-tiny-pages when "
    )
    for each in (*default_policy().rules, default_policy().default):
        start = shown.index("because " + each.because[:20])
        assert each.because in shown[start:]


def test_show_as_json_is_a_policy_again(tmp_path: Path, file: Path):
    for arguments, source in (([], "shipped default"), (["--policy", file], str(file))):
        shown = json.loads(run("policy", "show", *arguments, "--json").stdout)
        assert shown.pop("source") == source
        again = tmp_path / "again.json"
        again.write_text(json.dumps(shown))
        assert run("policy", "validate", again).exit_code == 0
        assert (
            json.loads(run("policy", "show", "--policy", again, "--json").stdout)["rules"] == shown["rules"]
        )


def test_schema_prints_json_schema():
    for arguments in ([], ["--json"]):
        result = run("policy", "schema", *arguments)
        assert result.exit_code == 0
        jsonschema.Draft202012Validator.check_schema(json.loads(result.stdout))


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("sglang-hicache-io ")


def test_an_unknown_command_is_wrong_input():
    assert run("explian").exit_code == 2


def test_help_imports_neither_torch_nor_sglang():
    """Half a minute of imports would be the price of a typo."""
    code = (
        "import sys; from sglang_hicache.bench.cli import app\n"
        "try: app(['explain', '--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "loaded = {'torch', 'sglang', 'triton', 'cuda', 'sglang_hicache.bench.demo'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
