"""What is printed is text, whoever wrote it."""

from __future__ import annotations

import ast
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from sglang_hicache.policy import terminal
from sglang_hicache.policy.terminal import console, printable, styled, working

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
