"""Where commands write: results on standard output, the rest on standard error, files before the work."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import example, given
from hypothesis import strategies as st
from rich.text import Text
from typer.testing import CliRunner, Result

from sglang_hicache.bench import examples, outputs
from sglang_hicache.bench.cli import LAZY, _Group, app
from sglang_hicache.bench.explain import launch_line
from sglang_hicache.bench.layout import table
from sglang_hicache.io_backends.policy_files import policy_in_force
from sglang_hicache.io_backends.sglang.diagnose import command_line
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.terminal import console
from sglang_hicache.policy.text import first_sentence

TAKES_A_FILE = [
    (["race"], "--trace", ".json"),
    (["race"], "--plot", ".png"),
    (["stress", "http://127.0.0.1:9"], "--out", ".json"),
    (["calibrate", "--cpu"], "--out", ".yaml"),
]
TAKES_A_FOLDER = [
    (["bench", "bandwidth"], "--out"),
    (["bench", "all"], "--out"),
    (["bench", "report", "none.json"], "--out"),
    (["bench", "serve"], "--out"),
    (["bench", "serve"], "--cache"),
    (["demo"], "--cache"),
    (["demo"], "--keep-logs"),
]


def run(*arguments: str | Path, columns: int | None = 80) -> Result:
    env = {"NO_COLOR": "1", "COLUMNS": "" if columns is None else str(columns)}
    return CliRunner().invoke(app, [str(each) for each in arguments], env=env)


def refused(*arguments: str | Path) -> str:
    """The one line of a command whose input is wrong."""
    found = run(*arguments, columns=None)
    assert found.exit_code == 2, (found.output, found.exception)
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    return found.stderr


@pytest.mark.parametrize(("command", "option", "suffix"), TAKES_A_FILE)
def test_a_file_that_cannot_be_written_is_found_before_the_work(
    command: list[str], option: str, suffix: str, tmp_path: Path
) -> None:
    nowhere = tmp_path / "no" / f"file{suffix}"
    assert f"{option} {nowhere}: there is no folder {tmp_path / 'no'}" in refused(*command, option, nowhere)
    assert f"{option} {tmp_path}: is a folder; name a file" in refused(*command, option, tmp_path)
    assert "cannot be written" in refused(*command, option, f"/proc/self/no{suffix}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("command", "option"), TAKES_A_FOLDER)
def test_a_folder_that_cannot_be_made_is_found_before_the_work(
    command: list[str], option: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert f"{option} {file}: is a file; name a folder" in refused(*command, option, file)
    assert f"{option} {file}/x: a folder above it is a file" in refused(*command, option, file / "x")
    assert "cannot be written" in refused(*command, option, "/proc/self/no")
    assert file.read_text() == "mine"


def test_what_is_there_is_left_until_there_is_a_result(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    outputs.check_file("--out", file)
    outputs.check_file("--out", tmp_path / "new")
    outputs.check_file("--out", None)
    outputs.check_file("--out", Path("/dev/null"))
    outputs.check_folder("--out", tmp_path / "a" / "b")
    assert (file.read_text(), sorted(os.listdir(tmp_path))) == ("mine", ["a", "file"])


def test_a_link_that_leads_nowhere_yet_stays(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "later.json"
    link.symlink_to(target)
    outputs.check_file("--out", link)
    assert link.is_symlink()
    assert not target.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_file_of_somebody_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    file.chmod(0o444)
    with pytest.raises(typer.Exit):
        outputs.check_file("--out", file)


def test_a_result_is_where_the_json_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    outputs.result_console(as_json=False).print("table")
    outputs.result_console(as_json=True).print("beside")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("table\n", "beside\n")


EXPLAINED = [
    ["--attention-backend", "fa3", "--gpu-arch", "sm90"],
    ["--attention-backend", "triton", "--gpu-arch", "sm80"],
    ["--attention-backend", "trtllm_mha", "--gpu-arch", "sm100", "--page-size", "64"],
    ["--attention-backend", "fa3", "--gpu-arch", "sm90", "--backend", "kernel"],
    ["--attention-backend", "fa3", "--gpu-arch", "sm90", "--backend", "fenced_kernel"],
]


@pytest.mark.parametrize("arguments", EXPLAINED)
def test_explain_answers_in_about_ten_lines(arguments: list[str]) -> None:
    short, long = run("explain", *arguments), run("explain", *arguments, "--verbose")
    assert (short.exit_code, short.stderr) == (0, "")
    lines = short.stdout.splitlines()
    assert len(lines) <= 11
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert lines[0].startswith("D2H backend")
    assert lines[-1].startswith("--verbose: ")
    assert "Facts" in long.stdout
    assert len(long.stdout.splitlines()) > 2 * len(lines) or "kernel" in arguments


def test_explain_gives_a_reason_in_whole_sentences() -> None:
    policy = policy_in_force()
    for because in [*(rule.because for rule in policy.rules), policy.default.because]:
        short = first_sentence(because)
        assert len(short) <= 230, short
        assert short.count("(") == short.count(")"), short
        assert because.startswith(short[:-1]), short
        assert because[len(short) - 1] in ".;:", short
    shown = " ".join(run("explain", "--attention-backend", "triton", "--gpu-arch", "sm80").stdout.split())
    assert "so no forward waits, and compute and write-back overlap fully. sglang serve" in shown


@pytest.mark.parametrize(
    ("because", "short"),
    [
        ("A crash (seen in 0.5.23; not since). More.", "A crash (seen in 0.5.23; not since)."),
        ("Slow, e.g. at pages of 1; more", "Slow, e.g. at pages of 1."),
        ("Measured: hybrid is faster.", "Measured: hybrid is faster."),
        ("no end", "no end."),
        ("It crashed! More.", "It crashed!"),
        ("Seen with sm90 vs. sm80. More.", "Seen with sm90 vs. sm80."),
        ("1) slow. 2) fast", "1) slow."),
        (f"It crashed: {'so it did ' * 20}.", "It crashed."),
        (f"{'word ' * 46}end", f"{'word ' * 46}end."),
        ("word " * 60, f"{'word ' * 47}..."),
    ],
)
def test_a_reason_is_cut_where_a_sentence_ends(because: str, short: str) -> None:
    assert first_sentence(because) == short


def test_explain_prints_the_command_to_run() -> None:
    found = run(
        *("explain", "--attention-backend", "fa3", "--gpu-arch", "sm90", "--page-size", "64"),
        *("--mem-layout", "layer_first", "--backend", "hybrid"),
    ).stdout
    line = found[found.index("sglang serve") : found.index("--verbose")]
    argv = command_line.read(line).argv
    assert argv == [
        *("--model-path", "MODEL", "--attention-backend", "fa3", "--hicache-mem-layout", "layer_first"),
        *("--page-size", "64", "--enable-hierarchical-cache"),
        *("--hicache-io-backend", "hybrid"),
    ]
    as_json = json.loads(run("explain", "--gpu-arch", "sm90", "--json").stdout)
    assert command_line.read(as_json["command"]).argv[-2:] == ["--hicache-io-backend", "auto"]


def test_explain_ends_with_1_where_a_server_would_refuse() -> None:
    arguments = ["--gpu-arch", "sm90", "--backend", "copy_engine", "--mem-layout", "page_head"]
    found = run("explain", *arguments)
    assert found.exit_code == 1
    assert "would refuse this" in found.stdout
    assert "sglang serve" not in found.stdout
    as_json = run("explain", *arguments, "--json")
    assert (as_json.exit_code, json.loads(as_json.stdout)["refused"] is None) == (1, False)


words = st.lists(st.text("ab $'\"\\=-*\u00e9", max_size=12), min_size=1, max_size=8)


@given(words, st.integers(20, 120))
def test_a_folded_command_is_the_command(given_: list[str], columns: int) -> None:

    folded = launch_line.folded(["sglang", "serve", *given_], columns)
    assert shlex.split(folded.replace("\\\n", "")) == ["sglang", "serve", *given_]


def test_options_of_ours_are_replaced() -> None:
    argv = ["m", "--hicache-io-backend", "kernel", "--hicache-io-policy=a", "--page-size", "1"]
    found = launch_line.of_server(argv, {"SGLANG_X": "a b", "GONE": None}, backend="auto", policy=None)
    assert found == [
        *("SGLANG_X=a b", "sglang", "serve", "m", "--hicache-io-policy=a", "--page-size", "1"),
        *("--hicache-io-backend", "auto"),
    ]
    assert launch_line.folded(found, 200).startswith("SGLANG_X='a b' sglang serve m")
    same = launch_line.of_server(argv, {}, backend=None, policy="b")
    assert same[-2:] == ["--hicache-io-policy", "b"]
    assert "kernel" in same
    facts = Facts.given(prefill_attention_backend="fa3", decode_attention_backend="triton")
    assert "--prefill-attention-backend fa3 --decode-attention-backend triton" in " ".join(
        launch_line.of_facts(facts, backend="auto", policy=None)
    )


# click draws its own lines, so a name that does not fit would be seen cut, with … or over two lines.
COMMANDS = [
    [],
    *([name] for name in ("explain", *LAZY)),
    *(["policy", name] for name in ("init", "show", "validate", "schema")),
    *(["bench", name] for name in ("bandwidth", "all", "serve", "list", "show", "compare", "report")),
]


def command_of(path: list[str]) -> typer.core.TyperCommand:
    found = typer.main.get_command(app)
    for name in path:
        found = found.get_command(None, name)  # type: ignore[attr-defined, arg-type]
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_80_columns_with_every_option_whole_and_examples(path: list[str]) -> None:
    shown = run(*path, "-h")
    assert shown.exit_code == 0
    assert shown.stdout == run(*path, "--help").stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for parameter in command_of(path).params:
        for name in parameter.opts:
            if name.startswith("-"):
                assert any(name in line.replace(",", " ").split() for line in shown.stdout.splitlines()), name
    assert "\nExamples:\n" in shown.stdout.replace("\n  Examples", "\nExamples")


@pytest.mark.parametrize("command", sorted(examples.EXAMPLES))
def test_every_example_is_read(command: str) -> None:
    """By the command's own parser: an option that is gone is found."""

    for line in examples.EXAMPLES[command]:
        assert len(line) <= 76
        program, *arguments = shlex.split(line.format(name="bandwidth").partition(" > ")[0])
        assert program == "hicache-io"
        path: list[str] = []
        found = typer.main.get_command(app)
        while isinstance(found, typer.core.TyperGroup) and arguments and not arguments[0].startswith("-"):
            path.append(arguments.pop(0))
            found = found.get_command(None, path[-1])  # type: ignore[arg-type, assignment]
        assert found is not None, path
        found.make_context(" ".join(path), arguments, resilient_parsing=True)
        known = {name for each in found.params for name in each.opts} | {"--install-completion"}
        assert {each for each in arguments if each.startswith("--")} <= known


@pytest.mark.parametrize("name", sorted(LAZY))
def test_the_list_of_commands_says_what_their_help_says(name: str) -> None:
    """Their modules are not imported for it."""
    assert command_of([name]).help.splitlines()[0] == LAZY[name][1]  # type: ignore[union-attr]


@pytest.mark.parametrize("group", [(), ("bench",), ("policy",)])
def test_no_summary_of_a_command_is_cut(group: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*group, "-h"], env={"COLUMNS": "80"}).output
    assert "..." not in shown.partition("Commands:")[2].partition("Examples:")[0]
    assert max(map(len, shown.splitlines())) <= 80


def _helps(path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    shown = CliRunner().invoke(app, [*path, "-h"], env={"COLUMNS": "80"}).output
    yield " ".join(path), shown
    listed = shown.partition("Commands:")[2].partition("Examples:")[0]
    for name in re.findall(r"^  (\w[\w-]*)  ", listed, re.MULTILINE):
        yield from _helps((*path, name))


def test_no_name_of_an_option_is_broken_in_a_help() -> None:
    found = dict(_helps())
    assert {"explain", "bench serve", "policy init"} <= found.keys()
    for command, shown in found.items():
        lines = shown.splitlines()
        assert not [line for line in lines if re.search(r"\w-$", line)], command
        assert max(map(len, lines)) <= 80, command


def test_what_is_typed_wrong_is_one_line() -> None:
    assert "did you mean" in refused("explian").lower()
    assert " race: Invalid value for '--seeds'" in refused("race", "--seeds", "x")
    assert "\x1b" not in refused("explain", "--\x1b[31m")
    assert isinstance(typer.main.get_command(app), _Group)


def test_a_shell_completes_commands_and_options() -> None:
    env = {"_HICACHE_IO_COMPLETE": "complete_bash", "COMP_WORDS": "hicache-io race --f", "COMP_CWORD": "2"}
    found = CliRunner().invoke(app, [], env=env, prog_name="hicache-io")
    assert found.stdout.split() == ["--fences"]


def completed(words: str) -> list[str]:
    """What a shell is told after these words."""
    env = {"_HICACHE_IO_COMPLETE": "complete_bash", "COMP_WORDS": f"hicache-io {words}"}
    env["COMP_CWORD"] = str(len(words.split()) + words.endswith(" "))
    return CliRunner().invoke(app, [], env=env, prog_name="hicache-io").stdout.split()


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("explain --backend k", ["kernel", "kernel_ascend"]),
        ("explain --attention-backend fa", ["fa3", "fa4"]),
        ("explain --gpu-arch sm10", ["sm100", "sm101", "sm103"]),
        ("explain --kv-kind ", ["mha", "mla"]),
        ("explain --mem-layout page_first_", ["page_first_direct", "page_first_kv_split"]),
        ("explain --fact row", []),  # a shell would add a blank behind row_bytes=
        ("policy init --gpu-arch c", ["cpu"]),
        ("doctor --gpu-arch sm9", ["sm90"]),
        ("calibrate --model D", ["DeepSeek-V3"]),
        ("demo --backend h", ["hybrid"]),
        ("demo --layout l", ["layer_first"]),
        ("race --backend auto", ["auto"]),
        ("race --fences p", ["producer"]),
        ("race --mode s", ["synchronize", "speculative", "states"]),
        ("race --mem-layout page_first", ["page_first", "page_first_direct"]),
        ("bench serve --arm auto --arm n", ["none", "null"]),
        ("bench serve --workload ch", ["chat"]),
        ("bench serve --model kv", ["kvheavy"]),
        ("bench serve --layout page_h", ["page_head"]),
        ("bench bandwidth --backend co", ["copy_engine"]),
        ("bench all --model Q", ["Qwen3-8B"]),
        ("bench fence --layout la", ["layer_first"]),
        ("bench fence --attention trtllm_", ["trtllm_mla", "trtllm_mha"]),
        ("bench interference --forward ge", ["gemm"]),
        ("bench submit --contiguity f", ["fragmented"]),
        ("bench compare a b --sort c", ["change", "contender"]),
        ("explain --policy ", []),  # the shell's own: files
    ],
)
def test_a_shell_completes_values(words: str, values: list[str]) -> None:
    assert completed(words) == values


def test_a_shell_completes_the_values_of_every_option_that_takes_a_name() -> None:
    from_a_file = {"--only"}
    for path, command in _commands(typer.main.get_command(app)):
        for option in command.params:
            name = next((each for each in option.opts if each.startswith("--")), "")
            if option.metavar in ("NAME", "LAYOUT", "ARCH", "KIND", "WHICH") and name not in from_a_file:
                assert completed(f"{' '.join(path)} {name} "), (path, name)


def test_completion_imports_nothing_slow() -> None:
    """Between two keys."""
    code = (
        "import sys\n"
        "from sglang_hicache.bench.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'sglang', 'triton', 'cuda', 'matplotlib'} & set(sys.modules), sys.modules"
    )
    for words in ("race --mode ", "bench serve --model ", "explain --backend ", "demo --backend "):
        count = str(len(words.split()) + 1)
        env = {"_HICACHE_IO_COMPLETE": "complete_bash", "COMP_WORDS": f"hicache-io {words}"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **env, "COMP_CWORD": count},
            capture_output=True,
            text=True,
            check=True,
        )
        assert len(done.stdout.splitlines()) > 2


def _commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    context = group.make_context("hicache-io", [], resilient_parsing=True)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


rows = st.lists(st.tuples(*[st.text("ab c\n", max_size=30)] * 4), min_size=1, max_size=5)


@given(rows, st.sampled_from([40, 80, 120]))
@example([("", "", "", " aaaaaaaaa"), ("", "", "aaaaaaaaaaaaaaa", "")], 40)
def test_no_word_of_a_table_is_broken_that_fits_a_line(rows: list[tuple[str, ...]], columns: int) -> None:
    out = console()
    out.file, out.width = io.StringIO(), columns
    out.print(table(out, ("name", "one", "two", "three"), rows))
    shown = out.file.getvalue().split()
    for word in (word for row in rows for cell in row for word in cell.split()):
        if len(word) < columns - 12:
            assert word in shown
    assert all(len(line) <= columns for line in out.file.getvalue().splitlines())


@pytest.mark.parametrize("columns", [80, 100, 110, 120, 160])
def test_no_column_of_a_race_is_cut(columns: int) -> None:
    side = "read of device rows [0:4096) by gather\nsrt/mem_cache/l2_transfer.py:123 submit_device_to_host"
    fence = "the transfer stream waits for the forward that writes the rows"
    titles = ("race", "asked for first", "not ordered before", "the fence that is missing", "seeds")
    out = console()
    out.width = columns
    with out.capture() as found:
        out.print(table(out, titles, [("read_before_write", side, side, fence, "3 of 3\nfirst: 0")] * 2))
    shown = found.get()
    assert max(map(len, shown.splitlines())) <= columns
    assert shown.count("seeds") >= 1
    assert shown.count("submit_device_to_host") == 4
    assert shown.count("first:") == 2


def test_rows_of_several_lines_stay_apart() -> None:
    out = console()
    out.width = 80
    row = ("name", "some words " * 4, "other words " * 4, Text("more"))
    titles = ("a", "b", "c", "d")
    with out.capture() as found:
        out.print(table(out, titles, [row, row]))
    assert found.get().count("───") > 1
    with out.capture() as found:
        out.print(table(out, titles, [("a", "b", "c", "d")] * 2))
    assert len(found.get().splitlines()) == 4
