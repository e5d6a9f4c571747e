"""What the documents name is there: links, files, modules; and their commands do what they show."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token

from sglang_hicache.bench.cli import app
from sglang_hicache.io_backends.sglang.diagnose import dry_run

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
COLUMNS = 80

RUN = {"", "model", "sglang", "versions"}
"""Marks of ``sh`` blocks that are run: nothing needed; a model's config.json; the installed SGLang; the
unpacked ones of ``make versions``."""
PARSED = {"gpu", "server", "network", "changes", "slow"}
"""Marks of those that are not: they need a GPU, a server, a network, minutes, or change the machine."""


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tokens(path: Path) -> tuple[Token, ...]:
    return tuple(MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")))


def inline(path: Path) -> Iterator[Token]:
    for token in tokens(path):
        yield from token.children or ()


@cache
def anchors(path: Path) -> frozenset[str]:
    """The ids that a forge gives headings."""
    found: list[str] = []
    for heading, text in zip(tokens(path), tokens(path)[1:], strict=False):
        if heading.type == "heading_open":
            plain = "".join(each.content for each in text.children or ())
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return frozenset(found)


def links(path: Path) -> list[str]:
    """Targets of links and images."""
    names = {"link_open": "href", "image": "src"}
    return [str(each.attrs[names[each.type]]) for each in inline(path) if each.type in names]


@dataclass(frozen=True)
class Shown:
    """A command of an ``sh`` block."""

    path: Path
    line: int
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{ids(self.path)}:{self.line}"


def blocks(path: Path) -> Iterator[tuple[str, int, str]]:
    """Language and mark, first line, and text of each fenced block."""
    for token in tokens(path):
        if token.type == "fence":
            yield token.info, (token.map or [0])[0] + 2, token.content


def commands() -> Iterator[Shown]:
    for path in DOCUMENTS:
        for info, first, text in blocks(path):
            language, _, mark = info.partition(" ")
            if language != "sh":
                continue
            whole, begin = "", first
            for at, line in enumerate(text.splitlines(), first):
                begin = begin if whole else at
                whole += line + "\n"
                if not line.endswith("\\"):
                    if not whole.lstrip().startswith("#"):
                        yield Shown(path, begin, mark, whole.rstrip("\n"))
                    whole = ""
            assert not whole, f"{ids(path)}:{begin}: the last line goes on"


COMMANDS = list(commands())


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert len(text.splitlines()) <= 200
    assert len(text) <= 12 * 1024


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(path: Path) -> None:
    for link in links(path):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), link
            continue
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), link
        assert there.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(there), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_files_that_are_named_are_there(path: Path) -> None:
    """And so are modules. Left out are tables made from data, which quote commands as they were typed."""
    spans = [each.content for each in inline(path) if each.type == "code_inline"]
    for span in spans:
        if re.fullmatch(r"(bench|tests|policy|io_backends|docs|\.ci)/[a-z0-9_./*-]+", span):
            assert list(ROOT.glob(span)), span
    text = re.sub(r"<!-- \w+.*?<!-- end -->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for module in re.findall(r"-m (sglang_hicache[\w.]+)", text):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_blocks_fit_a_terminal_and_say_what_they_are(path: Path) -> None:
    for info, first, text in blocks(path):
        language, _, mark = info.partition(" ")
        assert language in {"sh", "text", "yaml", "python", "json", "dockerfile", "ini"}, f"{path}:{first}"
        assert not mark or (language == "sh" and mark in RUN | PARSED), f"{path}:{first}"
        for at, line in enumerate(text.splitlines(), first):
            assert language == "python" or len(line) <= COLUMNS, f"{ids(path)}:{at}: {line}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands run: with the example policy, a model's config.json and the unpacked SGLangs."""
    folder = tmp_path_factory.mktemp("documents")
    (example,) = [text for info, _, text in blocks(ROOT / "docs/policy.md") if info == "yaml"]
    (folder / "policy.yaml").write_text(example, encoding="utf-8")
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape, "num_key_value_heads": 4}
    model |= {"vocab_size": 512, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
    (folder / "MODEL").mkdir()
    (folder / "MODEL" / "config.json").write_text(json.dumps(model), encoding="utf-8")
    (folder / ".sglang-versions").symlink_to(ROOT / ".sglang-versions")
    return folder


def program(folder: Path, *python: str, first: str = "") -> Path:
    """A folder with a ``hicache-io`` that ``python`` runs, which does ``first`` before it."""
    command = [*python, "-c", f"{first}from sglang_hicache.bench.cli import main; main()"]
    (folder / "hicache-io").write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
    (folder / "hicache-io").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def quick_race(plain_python: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that need not import SGLang; test_race.py runs it as it is installed."""
    return program(tmp_path_factory.mktemp("race"), *plain_python)


@pytest.fixture(scope="module")
def quick_dry_run(sm90_python: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose dry runs need not; test_dry_run.py runs one as it is installed."""
    forked = f"from {dry_run.__name__.rpartition('.')[0]} import dry_run; dry_run.PYTHON = {sm90_python!r}; "
    return program(tmp_path_factory.mktemp("dry_run"), sys.executable, first=forked)


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(each, id=str(each), marks=[pytest.mark.sglang] if each.mark else [])
        for each in COMMANDS
        if each.mark in RUN
    ],
)
def test_commands_do_what_they_show(shown: Shown, folder: Path, request: pytest.FixtureRequest) -> None:
    programs = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if shown.text.startswith("hicache-io race"):
        programs.insert(0, str(request.getfixturevalue("quick_race")))
    if "--server-args" in shown.text and "--gpu-arch sm90" in shown.text:
        programs.insert(0, str(request.getfixturevalue("quick_dry_run")))
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(programs),
        "HOME": str(folder),
        "COLUMNS": str(COLUMNS),
    }
    text = shown.text
    if text.startswith("hicache-io race") and "--seed" not in text:
        # A race is found in every order, so that a few show it as well as 200.
        text = text.replace("hicache-io race", "hicache-io race --seeds 10")
    if text.endswith("validate mine.yaml") and not (folder / "mine.yaml").exists():
        # The command above it in the document, which makes it, ran in another worker.
        (folder / "mine.yaml").write_bytes((folder / "policy.yaml").read_bytes())
    done = subprocess.run(
        ["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    expected = 1 if "ends with 1" in text else 0
    assert done.returncode == expected, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize(
    "shown",
    [each for each in COMMANDS if each.mark in PARSED and each.text.startswith("hicache-io ")],
    ids=str,
)
def test_commands_that_cannot_run_here_have_the_options_they_show(shown: Shown) -> None:
    command = typer.main.get_command(app)
    arguments = shlex.split(shown.text.replace("\\\n", " "), comments=True)[1:]
    context = None
    while True:
        context = command.make_context(command.name or "", list(arguments), parent=context)
        if not hasattr(command, "resolve_command"):
            break
        rest = [*context._protected_args, *context.args]
        _, command, arguments = command.resolve_command(context, rest)


def test_some_commands_of_each_kind_are_shown() -> None:
    """The tests above would pass on documents in which no block is marked as a command."""
    assert {each.mark for each in COMMANDS} == RUN | PARSED
