"""``hicache-io explain`` and ``hicache-io policy``: output, JSON and exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from policy_bad_files import BAD, rule
from typer.testing import CliRunner, Result

from sglang_hicache.bench.cli import app
from sglang_hicache.io_backends import registry
from sglang_hicache.io_backends.policy_files import default_policy
from sglang_hicache.io_backends.registry import ENTRY_POINT_GROUP
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.fact_table import CONDITIONS, FACT_NAMES
from sglang_hicache.policy.facts import Facts

GIVEN = ["--attention-backend", "fa3", "--gpu-arch", "sm90"]


def run(*arguments: str | Path, **env: str) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"NO_COLOR": "1", **env})


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
    assert answer["layer"] == "shipped default"
    assert [(each["rule"], each["matched"], each["layer"]) for each in answer["considered"]] == [
        ("fa3-on-hopper-short-copies", False, "shipped default"),
        ("fa3-on-hopper", True, "shipped default"),
    ]
    assert answer["considered"][0]["reason"] == "mem_layout is page_first (the rule wants layer_first)"
    assert answer["considered"][1]["reason"] == (
        "prefill_attention_backend is fa3 and decode_attention_backend is fa3; gpu_arch is sm90"
    )
    assert [(route["backend"], route["when"]) for route in answer["routes"]] == [("hybrid", {})]
    assert answer["forwards"]["decode"] == (
        "waits for the last gather within GPU memory, not for the copy to the host unless writes outrun it"
    )


def test_explain_takes_every_fact():
    answer = explained(
        *("--prefill-attention-backend", "fa3", "--decode-attention-backend", "flashinfer"),
        *("--gpu-arch", "sm90", "--sgl-kernel", "0.4.9", "--sglang", "0.5.22", "--kv-kind", "mla"),
        *("--mem-layout", "page_first_direct", "--page-size", "64"),
        *("--fact", "row_bytes=1152,overlap=off", "--fact", "tp=8", "--fact", "driver=580.159.04"),
    )
    facts = {name: fact["value"] for name, fact in answer["facts"].items()}
    given = {
        "prefill_attention_backend": "fa3",
        "decode_attention_backend": "flashinfer",
        "gpu_arch": "sm90",
        "sgl_kernel": "0.4.9",
        "sglang": "0.5.22",
        "kv_kind": "mla",
        "mem_layout": "page_first_direct",
        "page_size": 64,
        "row_bytes": 1152,
        "overlap": False,
        "tp": 8,
        "driver": "580.159.04",
    }
    assert {name: facts[name] for name in given} == given
    assert {answer["facts"][name]["source"] for name in given} == {"given"}
    assert facts["device"] == "cuda"
    assert answer["fence_forward"] == ["extend"]
    assert answer["upstream_io_backend"] == "direct"


def test_explain_follows_a_policy_file(file: Path):
    for answer in (
        explained(*GIVEN, "--policy", file),
        explained(*GIVEN, SGLANG_HICACHE_IO_POLICY=str(file)),
    ):
        assert (answer["backend"], answer["rule"], answer["policy"]) == ("copy_engine", "one", str(file))
    assert explained(*GIVEN)["policy"] == "shipped default"


def test_explain_says_what_gpu_memory_staging_takes(tmp_path: Path, file: Path):
    assert "hybrid's staging: the rows of one step, and a seventh" in flat(
        run("explain", *GIVEN, "--verbose").stdout
    )
    unfenced = ("--attention-backend", "triton", "--mem-layout", "page_first")
    assert explained(*unfenced)["gpu_memory"] == "hybrid's staging: 256 MiB"
    sized = tmp_path / "sized.yaml"
    use = "{backend: hybrid, fence_forward: [extend], options: {staging_mb: SIZE}}"
    for size, said in (("2048", "2,048 MiB"), ("auto", "the rows of one step")):
        sized.write_text(rule(when="{gpu_arch: sm90}", use=use.replace("SIZE", size)))
        assert explained(*GIVEN, "--policy", sized, "--backend", "hybrid")["gpu_memory"].startswith(
            f"hybrid's staging: {said}"
        )
    assert explained(*GIVEN, "--policy", file)["gpu_memory"] is None


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
    shown = run("explain", *GIVEN, "--sglang", "0.5.23", "--verbose", COLUMNS=columns).stdout
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
    titles = ("Why", "What it costs", "Facts", "Rules considered")
    assert sorted(titles, key=shown.index) == list(titles)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--attention-backend", "triton"], "No forward waits: compute and write-back overlap fully."),
        (
            ["--prefill-attention-backend", "triton", "--decode-attention-backend", "fa3"],
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
    shown = flat(run("explain", "--gpu-arch", "sm100").stdout)
    note = "unknown facts count as a match in trtllm-on-blackwell, to be safe: give --attention-backend."
    # Before the answer that it puts in doubt.
    assert note in shown
    assert shown.index(note) < shown.index("Prefill (extend) and decode wait")
    known = run("explain", "--gpu-arch", "sm90", "--attention-backend", "triton")
    assert "to be safe" not in known.stdout
    assert "with more known" not in known.stdout


def test_explain_says_which_rule_more_facts_could_choose(tmp_path: Path):
    policy = tmp_path / "p.yaml"
    policy.write_text(
        "version: 1\nextends: default\nrules:\n- {name: long-rows, because: mine, "
        "use: {backend: copy_engine}, when: {mem_layout: layer_first, row_bytes: '>=2048'}}\n"
    )
    given = ["--policy", str(policy), "--gpu-arch", "sm90", "--attention-backend", "triton"]
    layer_first = [*given, "--mem-layout", "layer_first"]
    passed = run("explain", *layer_first)
    assert "with more known, another rule might match (long-rows): give --fact row_bytes=...." in flat(
        passed.stdout
    )
    assert explained(*layer_first)["undecided"] == ["long-rows"]
    assert explained(*layer_first, "--fact", "row_bytes=2048")["undecided"] == []
    assert explained(*given)["undecided"] == []


def test_explain_says_which_writes_go_which_way():
    given = [*GIVEN, "--mem-layout", "layer_first", "--page-size", "8", "--fact", "row_bytes=2048"]
    shown = flat(run("explain", *given).stdout)
    assert shown.startswith(
        "D2H backend writes with entries of at most 24,576 bytes: fenced_kernel; others: hybrid "
    )
    assert "rule fa3-on-hopper of the shipped policy; for some writes fa3-on-hopper-short-copies" in shown
    assert (
        "fenced_kernel (writes with entries of at most 24,576 bytes): Prefill (extend) and decode wait, on "
        "the GPU, for the whole of the last transfer to the host. hybrid (others): Prefill (extend) "
        "and decode wait"
    ) in shown


def test_explain_names_every_forward_of_speculative_decoding():
    given = ["--attention-backend", "triton", "--gpu-arch", "sm90", "--fact"]
    drafted = explained(*given, "speculative=EAGLE,draft_attention_backend=fa3")
    assert list(drafted["forwards"]) == ["prefill (extend)", "decode", "target verify", "draft"]
    assert all(said.startswith("waits for the last gather") for said in drafted["forwards"].values())
    verified = explained(*given, "speculative=EAGLE,verify_attention_backend=fa3")
    # Verification is of the decode step; the scheduler launches all of a step behind one fence.
    assert verified["fence_forward"] == ["decode"]
    assert verified["forwards"] == drafted["forwards"]
    plain = explained(*given, "speculative=none,draft_attention_backend=fa3")
    assert plain["forwards"] == {"prefill (extend)": "does not wait", "decode": "does not wait"}


def test_costs_are_measured_with_their_machine_or_unknown():
    given = ["--attention-backend", "triton", "--mem-layout", "page_first", "--page-size", "16"]
    (here,) = explained(*given, "--gpu-arch", "sm90", "--kv-kind", "mha")["cost"]
    assert (here["backend"], here["kind"]) == ("hybrid", "measured")
    assert "52.4 GB/s with contiguous slots" in here["text"]
    assert here["source"].startswith("NVIDIA H100 80GB HBM3, driver 580.159.04, CUDA 13.0")
    (elsewhere,) = explained(*given, "--gpu-arch", "sm100")["cost"]
    assert elsewhere["text"].startswith("not measured on sm100; on another GPU, ")
    (other,) = explained("--page-size", "32", "--gpu-arch", "sm90", "--attention-backend", "triton")["cost"]
    assert (other["kind"], other["source"]) == ("unknown", None)
    assert other["text"] == "nobody has measured pages of 32 (measured: 1, 16, 64)"
    (head,) = explained(*GIVEN, "--mem-layout", "page_head")["cost"]
    assert head["text"] == "nobody has measured hybrid with page_head"
    (fenced,) = explained(*GIVEN, "--page-size", "16")["cost"]
    assert "a forward that must wait waits 0.01 ms" in fenced["text"]


def test_what_if_shows_the_other_decision_and_what_changes():
    answer = explained(*GIVEN, "--what-if", "attention_backend=trtllm_mha,gpu_arch=sm100")
    assert answer["rule"] == "fa3-on-hopper"
    then = answer["what_if"]["decision"]
    assert (then["rule"], then["facts"]["gpu_arch"]) == (
        "trtllm-on-blackwell",
        {"value": "sm100", "source": "what if"},
    )
    assert then["facts"]["device"]["value"] == "cuda"
    assert {"what": "rule", "now": "fa3-on-hopper", "then": "trtllm-on-blackwell"} in answer["what_if"][
        "changes"
    ]
    shown = flat(run("explain", *GIVEN, "--what-if", "gpu_arch=sm80").stdout)
    assert "What if gpu_arch=sm80 D2H backend hybrid Fences No forward waits" in shown
    assert "fence_forward extend, decode none rule fa3-on-hopper default" in shown
    same = flat(run("explain", *GIVEN, "--what-if", "kv_kind=mla").stdout)
    assert "Nothing changes: the same rules decide the same." in same


def test_a_machines_own_facts_do_not_outlive_its_architecture():
    then = explained(*GIVEN, "--fact", "gpu_name=NVIDIA H200", "--what-if", "gpu_arch=cpu")["what_if"][
        "decision"
    ]
    assert then["facts"]["gpu_name"]["value"] is None
    assert then["facts"]["device"]["value"] == "cpu"


def test_a_backend_that_cannot_be_loaded_is_refused(monkeypatch: pytest.MonkeyPatch):
    broken = EntryPoint("broken", "no_such_module:Backend", ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "_third_party", lambda: {"broken": broken})
    shown = run("explain", *GIVEN, "--backend", "broken")
    assert shown.exit_code == 1
    said = " ".join(shown.stdout.split())
    assert "would refuse this: backend broken cannot be loaded: ModuleNotFoundError" in said


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


def test_explain_says_so_of_every_way_for_a_write(tmp_path: Path):
    path = tmp_path / "p.yaml"
    path.write_text(rule(when="{write_tokens: '<64'}", use="{backend: copy_engine, fence_forward: decode}"))
    fallback = explained(*GIVEN, "--policy", path, "--mem-layout", "page_head")["fallback"]
    assert fallback.startswith("copy_engine cannot serve --hicache-mem-layout page_head (it can: ")
    assert fallback.endswith("SGLang's own copy runs instead, and decode would wait for it")


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
        (["--fact", "device=gpu"], "--fact: unknown device 'gpu' (did you mean 'cuda'?)"),
        (["--fact", "tp"], "--fact: 'tp' is not FACT=VALUE, such as gpu_arch=sm100"),
        (["--fact", "tp=0"], "--fact: '0' is not a tensor-parallel size: a whole number, 1 or more"),
        (["--fact", "pagesize=1"], "--fact: unknown fact 'pagesize' (did you mean 'page_size'?)"),
        (
            ["--fact", "overlap=maybe"],
            "--fact: unknown overlap 'maybe'; valid: true, false, yes, no, on, off",
        ),
        (
            ["--what-if", "gpu_arch=sm_90"],
            "--what-if: unknown GPU architecture 'sm_90': written sm90, sm100, ... "
            "or cpu (did you mean 'sm90'?)",
        ),
        (["--what-if", ","], "--what-if: no fact is named; write FACT=VALUE, such as gpu_arch=sm100"),
        (["--markdown"], "--markdown belongs to --matrix"),
        (
            ["--matrix", "--what-if", "tp=2"],
            "--matrix shows every attention backend and architecture; leave --what-if out",
        ),
        (
            ["--matrix", "--gpu-arch", "sm90"],
            "--matrix goes through every attention backend and architecture; leave gpu_arch out",
        ),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments: list[str], message: str):
    result = run("explain", *arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", message + "\n")
    as_json = run("explain", *arguments, "--json")
    assert (as_json.exit_code, as_json.stderr) == (2, "")
    answer = json.loads(as_json.stdout)
    assert answer["ok"] is False
    assert [error["text"] for error in answer["errors"]] == [message]


def test_validate_a_good_file(file: Path):
    result = run("policy", "validate", file)
    assert (result.exit_code, result.stdout) == (0, f"{file}: ok, 1 rule\n")
    as_json = run("policy", "validate", file, "--json")
    answer = json.loads(as_json.stdout)
    assert (as_json.exit_code, answer["ok"], answer["rules"], answer["errors"]) == (0, True, 1, [])


def test_validate_warns_of_what_works_and_may_not_be_meant(file: Path, tmp_path: Path):
    shown = run("policy", "validate", file)
    # The file's own rule fences decode; its default is never asked on sm90.
    rule_one, default = shown.stderr.splitlines()
    assert rule_one.startswith(f"{file}:3:9: warning: rule 'one' takes fences away: extend no longer waits ")
    assert "gpu_arch sm90" in rule_one
    assert default.startswith(f"{file}:7:1: warning: the default takes fences away: ")
    assert "gpu_arch sm90" not in default
    fenced = tmp_path / "fenced.yaml"
    fenced.write_text(
        rule(
            when="{gpu_arch: [sm90, sm100, sm103]}",
            use="{backend: hybrid, fence_forward: [extend, decode]}",
        ).replace("  use:", "  unknown: match\n  use:", 1)
    )
    assert run("policy", "validate", fenced).stderr == ""
    fenced.write_text(rule(when="{gpu_arch: sm80}", use="{backend: hybrid, options: {staging_mb: 9000}}"))
    answer = json.loads(run("policy", "validate", fenced, "--json").stdout)
    assert [
        each["message"].split(" fences away")[0].split(" takes more")[0] for each in answer["warnings"]
    ] == [
        "staging_mb 9,000",
        "the default takes",
    ]
    over = tmp_path / "over.yaml"
    over.write_text(
        "version: 1\nextends: default\nrules:\n- {name: mine, when: {attention_backend: "
        "[fa3, dual_chunk_flash_attn, minicpm_flashattn], gpu_arch: "
        "sm90}, unknown: match, use: {backend: copy_engine, fence_forward: uses}, because: mine}\n"
    )
    covered = run("policy", "validate", over)
    assert covered.stdout == f"{over}: ok, {len(default_policy().rules) + 1} rules\n"
    assert (
        "rule 'fa3-on-hopper' is never reached any more: rule 'mine' matches whenever it does"
        in covered.stderr
    )


@pytest.mark.parametrize(
    "command",
    [["policy", "validate"], ["policy", "show"], ["policy", "show", "--policy"], ["explain", "--policy"]],
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
    count = len(default_policy().rules)
    assert shown.startswith(
        f"shipped default: {count} rules, the first match decides 1. fa3-on-hopper-short-copies when "
    )
    for each in (*default_policy().rules, default_policy().default):
        start = shown.index("because " + each.because[:20])
        assert each.because in shown[start:]


def test_show_takes_the_file_either_way(file: Path):
    assert run("policy", "show", file).stdout == run("policy", "show", "--policy", file).stdout
    both = run("policy", "show", file, "--policy", file)
    assert (both.exit_code, both.stderr) == (2, "the policy file is named twice: FILE and --policy\n")


def test_show_says_where_each_rule_comes_from(tmp_path: Path):
    over = tmp_path / "over.yaml"
    over.write_text(
        "version: 1\nextends: default\nrules:\n"
        "- {name: mine, when: {kv_kind: mla}, use: {backend: copy_engine}, because: mine}\n"
    )
    shown = flat(run("policy", "show", over, COLUMNS="300").stdout)
    assert f"because mine from policy file {over}:4 2. fa3-on-hopper-short-copies" in shown
    rules = json.loads(run("policy", "show", over, "--json").stdout)["rules"]
    assert (rules[0]["layer"], rules[0]["file"], rules[0]["line"]) == ("policy file", str(over), 4)
    assert {each["layer"] for each in rules[1:]} == {"shipped default"}


def test_show_lists_what_nobody_measured(file: Path):
    listed = json.loads(run("policy", "show", "--unmeasured", "--json").stdout)["unmeasured"]
    expected = [
        (name, path)
        for name, each in [
            *((rule.name, rule) for rule in default_policy().rules),
            ("default", default_policy().default),
        ]
        for path in each.unmeasured
    ]
    assert [(each["rule"], each["path"]) for each in listed] == expected
    shown = flat(run("policy", "show", "--unmeasured", COLUMNS="200").stdout)
    assert "fa3-on-hopper-short-copies when.write_entry_bytes 19,027 to 32,767 bytes" in shown
    none = run("policy", "show", file, "--unmeasured")
    assert flat(none.stdout).endswith("no rule says that anything of it is unmeasured")


def test_show_as_json_is_a_policy_again(tmp_path: Path, file: Path):
    for arguments, source in (([], "shipped default"), (["--policy", file], str(file))):
        shown = json.loads(run("policy", "show", *arguments, "--json").stdout)
        assert shown.pop("source") == source
        for each in (*shown["rules"], shown["default"]):
            for key in ("layer", "file", "line"):
                each.pop(key)
        again = tmp_path / "again.json"
        again.write_text(json.dumps(shown))
        assert run("policy", "validate", again).exit_code == 0
        once_more = json.loads(run("policy", "show", "--policy", again, "--json").stdout)
        for each in once_more["rules"]:
            for key in ("layer", "file", "line"):
                each.pop(key)
        assert once_more["rules"] == shown["rules"]


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


def test_help_says_what_each_fact_with_an_option_means():
    def unbroken(text: str) -> str:
        return re.sub(r"[\s│]", "", text)

    shown = unbroken(run("explain", "--help").stdout)
    asked = {spec.option: unbroken(spec.meaning) for spec in CONDITIONS.values() if spec.metavar}
    assert {option for option, meaning in asked.items() if option in shown and meaning in shown} == {*asked}


def test_help_imports_neither_torch_nor_sglang():
    """Half a minute of imports would be the price of a typo."""
    code = (
        "import sys; from sglang_hicache.bench.cli import app\n"
        "try: app(['explain', '--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "lazy = {'torch', 'sglang', 'triton', 'cuda', 'sglang_hicache.bench.demo.command'}\n"
        "loaded = lazy & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_pools_that_sglang_copies_itself_are_named_with_the_reason():
    shown = run("explain", "--attention-backend", "fa3", "--gpu-arch", "sm90", "--json")
    others = json.loads(shown.stdout)["other_pools"]
    assert others["MXFP8"] == "holds the scales of its blocks beside its rows"
    assert {"DeepSeek V4 states", "NVFP4"} <= set(others)
    text = run("explain", "--attention-backend", "fa3", "--gpu-arch", "sm90", "--verbose").stdout
    assert "pools of DeepSeek V4 states" in " ".join(text.split())
    own = run("explain", "--attention-backend", "fa3", "--gpu-arch", "sm90", "--backend", "kernel", "--json")
    assert json.loads(own.stdout)["other_pools"] == {}


@pytest.mark.parametrize(("version", "ours"), [("0.5.22", False), ("0.5.23", True), ("0.5.23+cu130", True)])
def test_pages_of_deepseek_v4_are_sglangs_where_no_gpu_has_compared(version, ours):
    shown = run("explain", "--attention-backend", "fa3", "--gpu-arch", "sm90", "--sglang", version, "--json")
    others = json.loads(shown.stdout)["other_pools"]
    assert ("DeepSeek V4" not in others) == ours
    if not ours:
        assert others["DeepSeek V4"].endswith("compared with ours on a GPU in SGLang 0.5.23 only")
