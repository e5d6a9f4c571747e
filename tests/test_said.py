"""Text that comes from outside (names of rules, servers and models, files, what was typed) is text on a
terminal, in a log and in a report: nothing that a terminal obeys or hides, and no markup."""

from __future__ import annotations

import ast
import io
import logging
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sglang_hicache.bench.cli import app
from sglang_hicache.io_backends.sglang.errors import RefusedError, exit_with
from sglang_hicache.policy import html
from sglang_hicache.policy.log import logger_of
from sglang_hicache.policy.names import NameProblem

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("bench", "policy", "io_backends") for path in (ROOT / folder).rglob("*.py")]

ALLOWED = {
    "policy/text.py": {"print"},  # the one that says
    "bench/measure/submit_idle.py": {"print"},  # numbers, from a process to the one that started it
    "policy/log.py": {"getLogger"},
}
"""Who writes to a stream by itself."""
WAYS = ("print", "typer.echo", "click.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write")
MAINTAINERS = "bench/lab/"

HOSTILE = "\x1b[31m\x9b2J\r\x07\u202e\u2066\u200b\ud800<b>&[bold]x[/bold]:boom:"
hostile = st.text(
    st.one_of(st.sampled_from(HOSTILE), st.characters(exclude_categories=("Cs",))), min_size=1, max_size=12
).map(lambda each: f"{each}\x1b]0;x\x07")


def obeyed(said: str, *, allowed: str = "\n\t") -> list[str]:
    """Characters that a terminal would obey or hide."""
    return [
        each
        for each in said
        if unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        and each not in f"{allowed}\u200c\u200d"
    ]


def output(*arguments: str) -> str:
    found = CliRunner().invoke(app, list(arguments), env={"NO_COLOR": "1", "COLUMNS": "80"})
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    assert found.output
    return found.output


@pytest.mark.parametrize(
    "command",
    [
        "explain --gpu-arch sm90 --fact gpu_name={}",
        "explain --gpu-arch sm90 --verbose --fact gpu_name={}",
        "explain --gpu-arch sm90 --json --fact gpu_name={}",
        "explain --gpu-arch sm90 --what-if gpu_name={}",
        "explain --gpu-arch {}",
        "explain --attention-backend {}",
        "explain --sglang {}",
        "explain --page-size {}",
        "explain --backend {}",
        "explain --policy {}",
        "explain --fact {}",
        "explain {}",
        "explain --{}",
        "explain --gpu-arch sm90 --server-args {}",
        "doctor --gpu-arch {}",
        "doctor --server-args {}",
        "policy {}",
        "policy show {}",
        "policy validate {}",
        "policy validate {} --json",
        "policy init --gpu-arch sm90 --fact attention_backend=fa3,gpu_name={}",
        "policy init --gpu-arch {}",
        "race --backend {}",
        "race --gpu-arch {}",
        "race --seeds {}",
        "race --trace /no/{}",
        "race --sglang-path {}",
        "race --policy {}",
        "bench {}",
        "bench bandwidth --model {}",
        "bench bandwidth --option {}",
        "bench compare {} {}",
        "bench report {} --out /dev/null",
        "bench serve --arm {}",
        "bench serve --workload {}",
        "calibrate --cpu --out /no/{}",
        "stress {}",
        "stress http://127.0.0.1:9 --duration {}",
        "demo --backend {}",
        "demo --layout {}",
        "{}",
    ],
)
@settings(deadline=None, max_examples=3)
@given(word=hostile)
def test_a_terminal_is_told_nothing_by_what_was_typed(command: str, word: str) -> None:
    word = word.replace("\0", "").replace(",", "").strip() or "\x1b"
    arguments = [each.replace("{}", word) for each in command.split()]
    if arguments[0] == word:
        arguments[0] = f"x{word}"
    assert not obeyed(output(*arguments))


@given(hostile)
def test_errors_and_logs_hold_text_only(word: str) -> None:
    assert not obeyed(str(NameProblem(f"unknown {word}", word)), allowed="")
    assert not obeyed(NameProblem(word, word).message, allowed="")
    assert not obeyed(str(RefusedError(word)))
    stream = io.StringIO()
    logger = logger_of("tests.said")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        logger.warning("%s: %s", "rule", word)
        logger.warning(word.replace("%", ""))
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue().startswith("rule: ")
    assert not obeyed(stream.getvalue())


def test_a_refusal_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    exit_with(ValueError(f"x{HOSTILE}"), 2)
    assert not obeyed(capsys.readouterr().err)


@given(hostile)
def test_html_holds_text_only(word: str) -> None:
    shown = html.escape(f'{word}"<script>')
    assert not obeyed(shown)
    assert not set('<>"') & set(shown)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_goes_out_another_way(path: Path) -> None:
    """What writes to a stream by itself would have to escape by itself."""
    name = str(path.relative_to(ROOT))
    if name.startswith(MAINTAINERS):
        return
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import) and name != "policy/html.py":
            assert "html" not in [each.name for each in node.names], "policy.html escapes more"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in WAYS:
            found.add(called)
        if called.endswith("getLogger") and ast.unparse(node) != "logging.getLogger('sglang')":
            found.add("getLogger")
    assert found <= ALLOWED.get(name, set())
