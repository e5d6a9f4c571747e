"""What is printed is text, whoever wrote it."""

from __future__ import annotations

import ast
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from sglang_hicache.io_backends.sglang.errors import exit_with
from sglang_hicache.policy import terminal
from sglang_hicache.policy.terminal import console, printable, styled, tell, working
from sglang_hicache.policy.text import say

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("bench", "policy", "io_backends") for path in (ROOT / folder).rglob("*.py")]
MARKUP = re.compile(r"\[/?(bold|dim|red|green|yellow|/)\b|\[/\]")


def printed(*what: object) -> str:
    out = console()
    out.width = 4000
    out.file = io.StringIO()
    out.print(*what, soft_wrap=True)
    return out.file.getvalue()


@given(st.text(st.characters(codec=None, exclude_characters="\t")))  # rich expands tabs by cells
def test_any_text_comes_out_whole(text: str) -> None:
    assert printed(text).rstrip("\n") == printable(text).rstrip("\n")
    assert not any(each < " " for each in printable(text).translate({9: None, 10: None}))


@pytest.mark.parametrize("text", ["[/opt/x]", "[red]x[/red]", ":boom:", "[link=file:///x]y[/link]"])
def test_in_tables_and_styled_lines_too(text: str) -> None:
    table = Table(title=f"title {text}")
    table.add_column(f"column {text}")
    table.add_row(f"cell {text}")
    shown = printed(table)
    assert all(f"{where} {text}" in shown for where in ("title", "column", "cell"))
    assert text in printed(styled(("Note:", "yellow"), f" {text}"))


def test_a_terminal_is_told_nothing() -> None:
    assert (
        printable("a\x1b[2Jb\x07\r\u202e\ud800 \u00e9\u4e16\n\t")
        == "a\\x1b[2Jb\\x07\\r\\u202e\\ud800 \u00e9\u4e16\n\t"
    )


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            yield name, node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_way_leads_to_rich(path: Path) -> None:
    """One kind of console, no markup in our own words, and progress columns that read none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, call in calls(tree):
        assert name not in ("Console", "RichConsole", "from_markup", "rprint"), ast.unparse(call)
        if name == "TextColumn":
            assert {word.arg: ast.unparse(word.value) for word in call.keywords}.get("markup") == "False"
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not MARKUP.search(node.value), node.value


def test_what_is_done_within_is_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on a terminal, not two that write over each other."""
    monkeypatch.setattr(terminal, "_QUIET_S", 0.01)
    monkeypatch.setattr(terminal, "_BEAT_S", 0.02)
    with working("outer"):
        with working("inner"):
            time.sleep(0.2)
        time.sleep(0.2)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "outer ..."
    said = {line.partition(" s so far")[0].rpartition(" ")[0] for line in lines}
    assert said == {"outer: inner,", "outer:"}
    with working("another"):
        time.sleep(0.1)
    assert "another ..." in capsys.readouterr().err


SAID = "unknown fact 'foo'; valid: attention_backend, prefill_attention_backend, decode_attention_backend"


@given(st.lists(st.text("ab-/ ", max_size=60), min_size=1, max_size=5), st.integers(1, 90))
def test_lines_of_a_known_width_end_at_words(lines: list[str], columns: int) -> None:
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys, "stderr", err)
        say("\n".join(lines))
    shown = err.getvalue()
    assert shown.split() == " ".join(lines).split()
    for line in shown.splitlines():
        assert len(line) <= columns or len(line.split()) == 1 or line in lines


def test_a_message_is_whole_where_nobody_knows_the_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(SAID)
    monkeypatch.setenv("COLUMNS", "wide")
    say(SAID)
    out = console(stderr=True)
    tell(out, f"{SAID} {SAID}")
    monkeypatch.setenv("COLUMNS", "40")
    say(SAID, whole=True)
    exit_with(ValueError(SAID), 1)
    found = capsys.readouterr().err.splitlines()
    assert found == [SAID, SAID, f"{SAID} {SAID}", SAID, SAID]
    say(SAID)
    tell(console(stderr=True), SAID)
    wrapped = capsys.readouterr().err.splitlines()
    assert len(wrapped) == 8
    assert wrapped[:4] == [line.rstrip() for line in wrapped[4:]]


@pytest.mark.parametrize(
    ("words", "stream", "status", "says"),
    [
        # Without an answer: what is refused is still refused.
        (["explain", "--attention-backend", "fooo"], "stderr", 2, ""),
        (["explain", "--attention-backend", "fooo"], "stdout", 2, "unknown attention backend 'fooo'"),
        (["explain", "--attention-backend", "fa3", "--gpu-arch", "sm90"], "stderr", 0, "D2H backend"),
        (["explain", "--attention-backend", "fa3", "--gpu-arch", "sm90"], "stdout", 0, ""),
        (["bench", "list", str(ROOT / "bench" / "results" / "2026-11-28-h200")], "stdout", 0, ""),
    ],
)
def test_a_closed_stream_changes_nothing_else(words: list[str], stream: str, status: int, says: str) -> None:
    closed = {"stdout": ">&-", "stderr": "2>&-"}[stream]
    hicache_io = [sys.executable, "-c", "from sglang_hicache.bench.cli import main; main()", *words]
    command = f"{shlex.join(hicache_io)} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("columns", ["0", "\u00b2", "wide", "-1", ""])
def test_a_width_that_is_none_is_as_if_it_were_not_set(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", shown := io.StringIO())
    out = console()
    out.print("an answer")
    assert (out.width, shown.getvalue()) == (80, "an answer\n")


def test_a_terminals_own_width_counts() -> None:
    shown, terminal_ = pty.openpty()
    fcntl.ioctl(terminal_, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-c", f"from sglang_hicache.policy.text import say; say({SAID!r})"]
    subprocess.run(command, stderr=terminal_, env=env, check=True)
    os.close(terminal_)
    lines = os.read(shown, 4096).decode().splitlines()
    os.close(shown)
    assert " ".join(lines) == SAID
    assert len(lines) == 2
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_what_is_copied_whole_is_printed_without_a_width(path: Path) -> None:
    """Else a terminal breaks the words of a sentence; `tell` and `say` wrap them."""
    allowed = {"policy/terminal.py", "bench/race/command.py", "bench/calibrate/command.py"}
    allowed |= {"bench/explain/command.py"}  # commands and files
    if str(path.relative_to(ROOT)) not in allowed:
        assert "soft_wrap" not in path.read_text(encoding="utf-8")
