"""Command lines as people write them: what reaches the server, or why the text is refused.

What a shell would do is asked of bash itself, with a program named ``sglang`` that writes down what it got.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_hicache.io_backends.sglang.diagnose import dry_run
from sglang_hicache.io_backends.sglang.diagnose.command_line import CommandLine, CommandLineError, read

WITHOUT_SGLANG = True

POLICY = "SGLANG_HICACHE_IO_POLICY"
OPTIONS = ["--model-path", "/m", "--tp", "2"]
SERVE = "sglang serve /m --tp 2"
SERVE_WORDS = ["sglang", "serve", *OPTIONS]

# Text, and the variables and options that bash gives to `sglang serve`.
SHELL: list[tuple[str, dict[str, str], list[str]]] = [
    (SERVE, {}, OPTIONS),
    ("sglang serve --model-path=/m --tp=2", {}, ["--model-path=/m", "--tp=2"]),
    (f"A=1 B='2 3' {SERVE}", {"A": "1", "B": "2 3"}, OPTIONS),
    (f"A=1 B=$A {SERVE}", {"A": "1", "B": "1"}, OPTIONS),
    (f"env A=1 B='2 3' {SERVE}", {"A": "1", "B": "2 3"}, OPTIONS),
    (f"A=0 env A=1 {SERVE}", {"A": "1"}, OPTIONS),
    (f"A=1 env -u A {SERVE}", {}, OPTIONS),
    (f"export A=1 && {SERVE}", {"A": "1"}, OPTIONS),
    (f"export A=1; {SERVE}", {"A": "1"}, OPTIONS),
    (f"export A=1\n\n{SERVE}\n", {"A": "1"}, OPTIONS),
    (f"export A=1 B='2 3'\n{SERVE}", {"A": "1", "B": "2 3"}, OPTIONS),
    (f"A=1\n{SERVE}", {}, OPTIONS),
    (f"A=1\nexport A\n{SERVE}", {"A": "1"}, OPTIONS),
    (f"export A\nA=1\n{SERVE}", {"A": "1"}, OPTIONS),
    (f"export A=1\nA=2\n{SERVE}", {"A": "2"}, OPTIONS),
    (f"export A=1; unset A; A=2; {SERVE}", {}, OPTIONS),
    (f"declare -x A=1; typeset -x B=2; declare C=3; {SERVE}", {"A": "1", "B": "2"}, OPTIONS),
    (f"set -a; A=1; set +a; B=2; {SERVE}", {"A": "1"}, OPTIONS),
    (f"set -o allexport; A=1; {SERVE}", {"A": "1"}, OPTIONS),
    (f"#!/bin/bash\nset -euo pipefail  # it's strict\nexport A=1 # one\n{SERVE}", {"A": "1"}, OPTIONS),
    ("sglang serve \\\n  /m \\\n  --tp 2", {}, OPTIONS),
    ("sglang serve /m\\\n --t\\\np 2", {}, OPTIONS),
    (f"{SERVE} > /dev/null 2>&1", {}, OPTIONS),
    (f">/dev/null {SERVE} 2>> /dev/null < /dev/null", {}, OPTIONS),
    (f"{SERVE} &> /dev/null", {}, OPTIONS),
    (f"{SERVE} 2>&1 | cat", {}, OPTIONS),
    (f"{SERVE} &\nwait", {}, OPTIONS),
    (f"export A=1 && {SERVE} &\nwait", {"A": "1"}, OPTIONS),
    (f"true && export A=1 && {SERVE}", {"A": "1"}, OPTIONS),
    (f"echo 'sglang serve x' | cat; mkdir -p /tmp || exit 1; export A=1; {SERVE}", {"A": "1"}, OPTIONS),
    (f"[ -d /nowhere ] && exit 1; {SERVE}", {}, OPTIONS),
    (f"LOG=$(date +%s).txt; {SERVE} 2> /dev/null # $LOG", {}, OPTIONS),
    ("M=/m; sglang serve $M --tp 2", {}, OPTIONS),
    ('M=/m; sglang serve "${M}" --tp "2"', {}, OPTIONS),
    ("O='--tp  2'; sglang serve /m $O", {}, OPTIONS),
    ("N=; sglang serve $N /m $N --tp 2", {}, OPTIONS),
    ('N=; sglang serve /m "$N"', {}, ["--model-path", "/m", ""]),
    ("M='a b'; sglang serve x$M'c d'", {}, ["--model-path", "xa", "bc d"]),
    ("""sglang serve /m --j '{"a": [1, "b"]}' --k "x\\"\\$y\\z" """, {}, ["--model-path", "/m", "--j",
     '{"a": [1, "b"]}', "--k", 'x"$y\\z']),
    ("sglang serve a\\ b --x \\* it\\'s #no", {}, ["--model-path", "a b", "--x", "*", "it's"]),
    ("sglang serve /m --x a#b $", {}, ["--model-path", "/m", "--x", "a#b", "$"]),
    (f"P=/a; export {POLICY}=$P/p.yaml; {SERVE}", {POLICY: "/a/p.yaml"}, OPTIONS),
    (f"V='{POLICY}=/p'; export $V; {SERVE}", {POLICY: "/p"}, OPTIONS),
    ("C='sglang serve'; export A=1; $C /m --tp 2", {"A": "1"}, OPTIONS),
    ("N=; $N sglang serve /m --tp 2; A=1 $N; export A", {}, OPTIONS),
    (f"N=; A=1 $N; export A; {SERVE}", {"A": "1"}, OPTIONS),
    (f"nohup env A=1 {SERVE} > /dev/null 2>&1 &\nwait", {"A": "1"}, OPTIONS),
    (f"A=1 exec {SERVE}", {"A": "1"}, OPTIONS),
    (f"A=1; export A; exec {SERVE}", {"A": "1"}, OPTIONS),
    (f"exec > /dev/null; {SERVE}", {}, OPTIONS),
    (f"time A=1 {SERVE}", {"A": "1"}, OPTIONS),
    (f"time -p {SERVE}", {}, OPTIONS),
    (f"A=1 nice -n 5 nohup {SERVE}", {"A": "1"}, OPTIONS),
    (f"nice -5 timeout -k 1 --signal=TERM 20s stdbuf -oL -e0 {SERVE}", {}, OPTIONS),
    (f"A=1 command {SERVE}", {"A": "1"}, OPTIONS),
    (f"command -v sglang; command export A=1; {SERVE}", {"A": "1"}, OPTIONS),
    (f"A=1 bash -c '{SERVE} --x $A'", {"A": "1"}, [*OPTIONS, "--x", "1"]),
    (f"A=1; B=2 bash -c 'export C=3; {SERVE}'", {"B": "2", "C": "3"}, OPTIONS),
    ('M=/m; bash -ec "export A=1 && sglang serve $M --tp 2"', {"A": "1"}, OPTIONS),
    (f"sh -c 'A=\"1  2\" {SERVE}'", {"A": "1  2"}, OPTIONS),
    ("sglang serve --model-type llm /m --tp 2", {}, OPTIONS),
    ("sglang serve /m --model-type=auto --tp 2", {}, OPTIONS),
]  # fmt: skip

# What cannot be asked of bash on a machine that has no such program, or no such path.
OTHER: list[tuple[str, CommandLine]] = [
    ("--model-path 'a b' --tp 2", CommandLine({}, ["--model-path", "a b", "--tp", "2"])),
    ("\n --model-path /m\n  --tp 2 # two\n", CommandLine({}, OPTIONS)),
    ("A=1 --model-path /m --tp 2", CommandLine({"A": "1"}, OPTIONS)),
    ("/usr/bin/python3.11 -u -W ignore -m sglang.launch_server --tp 2", CommandLine({}, ["--tp", "2"])),
    ("python3 -msglang.launch_server --model-type x", CommandLine({}, ["--model-type", "x"])),
    (f"/opt/venv/bin/{SERVE}", CommandLine({}, OPTIONS)),
    (f"unset A; {SERVE}", CommandLine({"A": None}, OPTIONS)),
    (f"env -u A --unset=B {SERVE}", CommandLine({"A": None, "B": None}, OPTIONS)),
    (f"X=0 env -i A=1 {SERVE}", CommandLine({"A": "1"}, OPTIONS, inherits=False)),
    (f"numactl --cpunodebind=0 -m 0 taskset -c 0-3 {SERVE}", CommandLine({}, OPTIONS)),
    (f"sudo A=1 {SERVE}", CommandLine({"A": "1"}, OPTIONS, inherits=False)),
    (f"A=1 sudo -E {SERVE}", CommandLine({"A": "1"}, OPTIONS)),
    (f"A=1 sudo --preserve-env=A -u me {SERVE}", CommandLine({"A": "1"}, OPTIONS, inherits=False)),
    (
        f"docker run -d --gpus all --shm-size 32g -v ~/m:/m -p 1:1 --ipc=host -e A=1 --env B='2 3' --env=A=4 "
        f"-e HF_TOKEN lmsysorg/sglang:latest python3 -m sglang.launch_server {shlex.join(OPTIONS)}",
        CommandLine({"A": "4", "B": "2 3"}, OPTIONS, inherits=False),
    ),
    (
        f"export A=1 B=2\npodman run -it --rm -e A --entrypoint bash image -c 'C=$A {SERVE}'",
        CommandLine({"A": "1", "C": "1"}, OPTIONS, inherits=False),
    ),
    (f"docker run -v ~/m:/m -v $PWD:/w -v \"$(pwd)/x:/x\" -e T=$TOKEN i {SERVE}",
     CommandLine({}, OPTIONS, inherits=False)),
    (f"docker run -eA=1 i {shlex.join(OPTIONS)}", CommandLine({"A": "1"}, OPTIONS, inherits=False)),
    (f"docker run -d redis --port 1; {SERVE}", CommandLine({}, OPTIONS)),
    ("cd /srv && sglang serve org/model --config /c.yaml", CommandLine({}, ["--model-path", "org/model",
     "--config", "/c.yaml"])),
    # A value that the text does not tell, and by which SGLang decides nothing.
    (f"export LD_LIBRARY_PATH=/x:$LD_LIBRARY_PATH; {SERVE}", CommandLine({}, OPTIONS)),
]  # fmt: skip

COMPOSE = """
x-all: &all
  environment: {A: 1e3, B: yes, $POLICY: /p.yaml}
services:
  redis: {image: redis, command: redis-server --port 1}
  server:
    <<: *all
    image: lmsysorg/sglang
    $COMMAND
"""
KUBERNETES = """
apiVersion: v1
kind: Service
metadata: {name: x}
---
apiVersion: apps/v1
kind: Deployment
spec:
  template:
    spec:
      containers:
        - name: sidecar
          command: [sh, -c, "while true; do sleep 1; done"]
        - name: server
          env:
            - {name: A, value: 1e3}
            - {name: B, value: "yes"}
            - {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: s, key: k}}}
            - name: $POLICY
              value: /p.yaml
          $COMMAND
"""
IN_CONTAINER = CommandLine({"A": "1e3", "B": "yes", POLICY: "/p.yaml"}, OPTIONS, inherits=False)


@pytest.mark.parametrize(
    ("text", "command"),
    [
        (COMPOSE, f"command: {SERVE}"),
        (COMPOSE, "command: >\n      sglang serve /m\n      --tp 2\n"),
        (COMPOSE, f"entrypoint: python3 -m sglang.launch_server\n    command: {json.dumps(OPTIONS)}"),
        (COMPOSE, "command: bash -c 'M=/m && sglang serve $$M --tp 2'"),
        (COMPOSE, f"command: {json.dumps(OPTIONS)}"),
        (KUBERNETES, f"command: [sglang, serve]\n          args: {json.dumps(OPTIONS)}"),
        (KUBERNETES, f"args: {json.dumps(['bash', '-c', f'SGLANG=$(A); export {POLICY}=/p.yaml; {SERVE}'])}"),
        (
            KUBERNETES,
            "command: [sh, -c]\n          args:\n            - |\n              exec sglang serve /m \\\n"
            "                --tp 2",
        ),
    ],
)  # fmt: skip
def test_yaml(text: str, command: str) -> None:
    assert read(text.replace("$POLICY", POLICY).replace("$COMMAND", command)) == IN_CONTAINER


@pytest.mark.parametrize(("text", "variables", "argv"), SHELL)
def test_a_shells_text(text: str, variables: dict[str, str], argv: list[str]) -> None:
    assert read(text) == CommandLine({**_taken_away(text), **variables}, argv)


@pytest.mark.parametrize(("text", "expected"), OTHER)
def test_other_text(text: str, expected: CommandLine) -> None:
    assert read(text) == expected


def _taken_away(text: str) -> dict[str, None]:
    """The one name that the table's texts unset."""
    return {"A": None} if "unset A" in text or "-u A" in text else {}


class Bash:
    """Runs text in bash, where ``sglang`` is a program that writes down its variables and arguments."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        program = folder / "bin" / "sglang"
        program.parent.mkdir()
        program.write_text(
            f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {self.out}.argv\nenv -0 > {self.out}.part\n"
            f"mv {self.out}.part {self.out}.env\n"
        )
        program.chmod(0o755)
        self.path = f"{program.parent}:{os.environ['PATH']}"

    def run(self, text: str) -> tuple[dict[str, str], list[str]]:
        for file in self.out.parent.glob("out.*"):
            file.unlink()
        subprocess.run(
            ["bash", "-c", text], env={"PATH": self.path}, check=False, capture_output=True, timeout=20
        )
        argv = Path(f"{self.out}.argv").read_bytes().decode().split("\0")[:-1]
        lines = Path(f"{self.out}.env").read_bytes().decode().split("\0")[:-1]
        of_shell = ("PATH", "PWD", "OLDPWD", "SHLVL", "_", "_STDBUF_O", "_STDBUF_E", "LD_PRELOAD")
        variables = dict(line.split("=", 1) for line in lines)
        return {name: each for name, each in variables.items() if name not in of_shell}, argv


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Bash:
    if not shutil.which("bash"):
        pytest.skip("no bash here")
    return Bash(tmp_path_factory.mktemp("bash"))


def _as_served(argv: list[str]) -> list[str]:
    """The table holds SGLang's options; bash gives the words of ``sglang serve``."""
    return read(shlex.join(["sglang", *argv])).argv


@pytest.mark.parametrize(("text", "variables", "argv"), SHELL)
def test_bash_says_the_same(bash: Bash, text: str, variables: dict[str, str], argv: list[str]) -> None:
    found, words = bash.run(text)
    assert (found, _as_served(words)) == (variables, argv)


NAMES = st.sampled_from(["SGLANG_A", "SGLANG_B", POLICY])
VALUES = st.text(st.sampled_from(" \t\n='\"\\$`#&|;<>*?[]{}~!,.:-/aé1"), max_size=8)


@st.composite
def scripts(draw: st.DrawFn) -> str:
    """Statements that change variables in every way, before a server."""

    def assigned() -> str:
        name, other, text = draw(NAMES), draw(NAMES), draw(VALUES)
        # In double quotes a shell keeps the backslash before most characters, and expands.
        double = '"' + "".join(f"\\{c}" if c in '$`"\\' else c for c in text) + '"'
        return f"{name}=" + draw(
            st.sampled_from([shlex.quote(text), double, f'"${other}"x', f"${{{other}}}", ""])
        )

    lines = []
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(
            st.sampled_from(["lone", "export", "mark", "unset", "all", "not all", "declare", "program"])
        )
        lines.append(
            {
                "lone": assigned,
                "export": lambda: f"export {assigned()}",
                "mark": lambda: f"export {draw(NAMES)}",
                "unset": lambda: f"unset {draw(NAMES)}",
                "all": lambda: "set -a",
                "not all": lambda: "set +o allexport",
                "declare": lambda: f"declare {draw(st.sampled_from(['', '-x ']))}{assigned()}",
                "program": lambda: f"{assigned()} true {shlex.quote(draw(VALUES))}",
            }[kind]()
        )  # fmt: skip
    before = draw(st.sampled_from(["", "env ", "nohup ", "exec ", "timeout 9 "]))
    prefix = "".join(f"{assigned()} " for _ in range(draw(st.integers(0, 2))))
    words = " ".join(
        draw(st.lists(st.one_of(VALUES.map(shlex.quote), NAMES.map(lambda n: f'"${n}"')), max_size=2))
    )
    after = before + prefix if before == "env " else prefix + before
    joined = draw(st.sampled_from(["\n", "; ", " && "]))
    return joined.join([*lines, f"{after}sglang serve -x {words}"])


@settings(max_examples=150, deadline=None)
@example(text="SGLANG_B='?'\nenv SGLANG_A=${SGLANG_B} sglang serve -x ")
@given(text=scripts())
def test_bash_says_the_same_of_any_script(bash: Bash, text: str) -> None:
    try:
        found = read(text)
    except CommandLineError as error:
        # A value with blanks becomes several words after env, and the first of them a program; an unquoted
        # value of `*` becomes the names of files.
        allowed = (
            "the text does not set it",
            "depends on the command before",
            "does with the command after",
            "is a pattern to the shell",
        )
        if not any(words in str(error) for words in allowed):
            raise
        return
    variables, words = bash.run(text)
    assert ({n: v for n, v in found.variables.items() if v is not None}, found.argv) == (variables, words[1:])


def quoted(text: str) -> str:
    return shlex.quote(text)


def yaml_list(words: list[str]) -> str:
    return json.dumps([each.replace("$", "$$") for each in words])


FORMS: Mapping[str, Callable[[str], str]] = {
    "plain": lambda v: f"{POLICY}={quoted(v)} {SERVE}",
    "alone": lambda v: f"{POLICY}={quoted(v)} {shlex.join(OPTIONS)}",
    "env": lambda v: f"env {quoted(f'{POLICY}={v}')} {SERVE}",
    "env -i": lambda v: f"env -i {quoted(f'{POLICY}={v}')} {SERVE}",
    "export &&": lambda v: f"export {POLICY}={quoted(v)} && {SERVE}",
    "export, a line": lambda v: f"export {POLICY}={quoted(v)}\n{SERVE}",
    "export after": lambda v: f"{POLICY}={quoted(v)}; export {POLICY}; {SERVE}",
    "declare": lambda v: f"declare -x {POLICY}={quoted(v)}; {SERVE}",
    "set -a": lambda v: f"set -a; {POLICY}={quoted(v)}; {SERVE}",
    "through another": lambda v: f'X={quoted(v)}; {POLICY}="$X" nohup {SERVE} > log 2>&1 &',
    "bash -c": lambda v: f"bash -c {quoted(f'export {POLICY}={quoted(v)}; {SERVE}')}",
    "around bash -c": lambda v: f"export {POLICY}={quoted(v)}; bash -c {quoted(SERVE)}",
    "sudo": lambda v: f"sudo {POLICY}={quoted(v)} {SERVE}",
    "sudo -E": lambda v: f"{POLICY}={quoted(v)} sudo -E {SERVE}",
    "docker -e": lambda v: f"docker run --rm -e {quoted(f'{POLICY}={v}')} image {SERVE}",
    "docker --env=": lambda v: f"docker run {quoted(f'--env={POLICY}={v}')} image {SERVE}",
    "docker -e NAME": lambda v: f"export {POLICY}={quoted(v)}; docker run -e {POLICY} image {SERVE}",
    "compose": lambda v: f"services:\n  s:\n    command: {SERVE}\n    environment:\n"
    f"      {POLICY}: {json.dumps(v.replace('$', '$$'))}\n",
    "compose, list": lambda v: f"services:\n  s:\n    command: {yaml_list(SERVE_WORDS)}\n"
    f"    environment: {yaml_list([f'{POLICY}={v}'])}\n",
    "kubernetes": lambda v: f"kind: Pod\nspec:\n  containers:\n  - args: {json.dumps(SERVE_WORDS)}\n"
    f"    env: [{{name: {POLICY}, value: {json.dumps(v.replace('$', '$$'))}}}]\n",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@given(text=VALUES.map(lambda text: "/" + text.replace("{{", "{")))  # not a template
def test_a_variable_reaches_the_server_in_every_form(form: str, text: str) -> None:
    """The decision is read from it, so that it must come out whole."""
    found = read(FORMS[form](text))
    assert (found.variables[POLICY], found.argv) == (text, OPTIONS)


@given(words=st.lists(VALUES, max_size=4))
def test_quoted_words_come_back(words: list[str]) -> None:
    argv = ["--model-path", *words]
    for before in ("", "python -m sglang.launch_server "):
        assert read(before + shlex.join(argv)) == CommandLine({}, argv)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no command in the text"),
        ("sglang serve \0", "a NUL character"),
        ("A=1", "there is no command in the text"),
        ("--model-path 'x", "the command line cannot be read: No closing quotation"),
        ('sglang serve "x', "No closing quotation"),
        ("X=$(date; sglang serve x", "No closing quotation"),
        (f"X=$(date # it's\n); export A='1; {SERVE}", "No closing quotation"),
        (f"source x/bin/activate && {SERVE}", "`source` is not read, because it can change"),
        (f". x/bin/activate; {SERVE}", "`.` is not read"),
        (f"eval 'A=1'; {SERVE}", "`eval` is not read"),
        (f"command eval 'A=1'; {SERVE}", "`eval` is not read"),
        (f"E=eval; $E 'A=1'; {SERVE}", "`eval` is not read"),
        (f"alias sglang=x; {SERVE}", "`alias` is not read"),
        (f"read A < file; {SERVE}", "`read` is not read"),
        (f"printf -v A 1; {SERVE}", "`printf` is not read"),
        (f"conda activate x; {SERVE}", "`conda` is not read"),
        (f"trap 'A=1' DEBUG; {SERVE}", "`trap` is not read"),
        (f"if true; then {SERVE}; fi", "`if` is not read"),
        (f"for i in 1 2; do {SERVE}; done", "`for` is not read"),
        (f"while true; do {SERVE}; done", "`while` is not read"),
        (f"case x in x) {SERVE};; esac", "`)` after `case x in x` is not read"),
        (f"case x in\nx) {SERVE};; esac", "`)` after `case x in x` is not read"),
        (f"[[ -d x ]] && {SERVE}", "`[[` is not read"),
        (f"({SERVE})", "`(` after `` is not read"),
        (f"f() {{ {SERVE}; }}; f", "`(` after `f` is not read"),
        (f"function f {{ {SERVE}; }}; f", "`function` is not read"),
        (f"{{ {SERVE}; }}", "`{` is not read"),
        (f"A=(1 2); {SERVE}", "`(` after `A=` is not read"),
        (f"A+=1 {SERVE}", "the assignment `A+=1` is not read"),
        (f"A[0]=1 {SERVE}", "the assignment `A[0]=1` is not read"),
        (f"IFS=,; {SERVE}", "`IFS=` is not read"),
        (f"set -k; {SERVE}", "`set -k` is not read with -k"),
        (f"declare -n A=B; {SERVE}", "`declare -n A=B` is not read with -n"),
        (f"export -n A; {SERVE}", "`export -n A` is not read with -n"),
        ("sglang serve $MODEL", "`$MODEL` is used and the text does not set it: write its value"),
        ("sglang serve ${MODEL:-x}", "what `${MODEL:-x}` gives is not known here"),
        (f"echo ${{A:=1}}; {SERVE}", "`${A:=1}` is not read, because it sets a variable"),
        (f"echo $((A=1)); {SERVE}", "arithmetic"),
        ("sglang serve $1", "what `$1` gives is not known here"),
        ("sglang serve $(cat model)", "what `$(cat model)` gives is not known here"),
        ("sglang serve `cat model`", "what ``cat model`` gives is not known here"),
        ("sglang serve $'x'", "`$'...` is not read"),
        ("sglang serve /models/*", "`/models/*` is a pattern to the shell"),
        ("sglang serve /m --x {1,2}", "`{1,2}` is a pattern to the shell"),
        ("X='*'; sglang serve $X", "`$X` is a pattern to the shell"),
        ("sglang serve ~/m", "`~` is a folder that only the shell knows"),
        (f"export {POLICY}=~/p.yaml; {SERVE}", f"{POLICY}: `~` is a folder"),
        (f"export {POLICY}=$(pwd)/p.yaml; {SERVE}", f"{POLICY}: what `$(pwd)` gives is not known here"),
        (f"P=$(pwd); {POLICY}=$P/p.yaml {SERVE}", f"{POLICY}: what `$(pwd)` gives is not known here"),
        (f"export $(cat .env | xargs); {SERVE}", "what `$(cat .env | xargs)` gives is not known here"),
        (f"cat > f <<EOF\nexport A=1\nEOF\n{SERVE}", "a here-document"),
        (f"cat <(date); {SERVE}", "process substitution"),
        (f"{SERVE} \r\n", "Unix line ends"),
        (f"false && export A=1; {SERVE}", "whether `export A=1` runs depends on the command before it"),
        (f"true || export A=1; {SERVE}", "whether `export A=1` runs"),
        (f"true && A=1 || true && {SERVE}", "whether `A=1` runs"),
        (f"export A=1 | cat; {SERVE}", "`export A=1` is in a process of its own"),
        (f"export A=1 & {SERVE}", "`export A=1` is in a process of its own"),
        (f"exit; {SERVE}", "nothing after `exit` runs"),
        (f"exec true; {SERVE}", "nothing after `exec true` runs"),
        ("cd x && sglang serve ./m", "`./m` is relative to where `cd x` leads: write absolute paths"),
        (f"cd x; {POLICY}=p.yaml {SERVE}", "`p.yaml` is relative to where `cd x` leads"),
        (f"cd x; {SERVE} --hicache-io-policy=p.yaml", "`p.yaml` is relative"),
        (f"{SERVE}\n{SERVE}", "there are two servers in the text"),
        ("sglang serve /m\n--tp 2", "a line begins with --tp: put a \\ at the end of the line before it"),
        ("sglang serve /m --model-type diffusion", "--model-type diffusion: HiCache is in"),
        ("sglang serve /m --model-type", "--model-type without a value"),
        ("python -m other.sglang --model-path x", "`python -m other.sglang` is no command of SGLang "
         "that is read: give SGLang's options alone"),
        ("vllm serve /m", "`vllm serve /m` is no command of SGLang"),
        ("sglang generate --model-path x", "`sglang generate` is no command of SGLang"),
        ("bash run.sh", "`bash run.sh` is no command of SGLang"),
        (f"nsys profile -o x {SERVE}", "what `nsys` does with the command after it is not known"),
        (f"ssh host '{SERVE}'", "what `ssh` does"),
        (f"docker exec c {SERVE}", "what `docker` does"),
        ("python -m torch.distributed.run -m sglang.launch_server", "what `python` does"),
        (f"timeout --odd 5 {SERVE}", "`timeout` is not read with this: option --odd not recognized"),
        (f"env -S 'A=1 {SERVE}'", "`env` is not read with this: option -S not recognized"),
        (f"export A=1 B=2; sudo {SERVE}", "sudo drops A, B: write sudo -E, or the variables after sudo"),
        (f"docker run -e {POLICY} i {SERVE}", f"{POLICY}: {POLICY} takes its value from outside of the text"),
        (f"docker run --env-file /nowhere i {SERVE}", "--env-file /nowhere cannot be read here: No such"),
        (f"cd x; docker run --env-file env i {SERVE}", "`env` is relative to where `cd x` leads"),
        (f"docker run -v ~/m:/m -e SGLANG_X=$HOME i {SERVE}", "SGLANG_X: `$HOME` is used"),
        (f"docker run $OPTIONS i {SERVE}", "`$OPTIONS` is used and the text does not set it"),
        (f"docker run --odd i {SERVE}", "`docker run` is not read with this: option --odd not recognized"),
        (f"docker run -e {POLICY}=p.yaml i {SERVE}", "`p.yaml` is relative to the container's folder"),
        ("services: {a: {image: x}}", "no container in the text has a command that starts SGLang"),
        (f"a:\n  command: {SERVE}\nb:\n  command: {SERVE}", "there are 2 servers in the text (a, b)"),
        (f"a:\n  command: {SERVE}\n  env_file: x", "`env_file` of a is not read"),
        (f"a:\n  command: {SERVE}\n  extends: x", "`extends` of a is not read"),
        ("a:\n  args: [sglang, serve]\n  envFrom: [x]", "`envFrom` of a is not read"),
        ("a:\n  args: [sglang, serve]\n  env: [{name: SGLANG_X, valueFrom: y}]", "SGLANG_X has `valueFrom`"),
        (f"a:\n  command: {SERVE}\n  environment: {{SGLANG_X: }}", "SGLANG_X takes its value from outside"),
        (f"a:\n  command: {SERVE}\n  environment: [SGLANG_X]", "SGLANG_X takes its value from outside"),
        (f"a:\n  command: {SERVE}\n  environment: {{SGLANG_X: '${{Y:-z}}'}}", "`${Y:-z}` (SGLANG_X) is"),
        ("a:\n  command: sglang serve ${MODEL}", "`${MODEL}` (command) is replaced from outside"),
        (f"a:\n  command: {SERVE}\n b: [", "the text begins like YAML and is none"),
        (f"a:\n  command: {SERVE}\n  env: [{{value: x}}]", "a variable of a has no name"),
        ("a:\n  <<: b", "`<<` takes mappings"),
        ("a:\n  args: [sglang, serve, {{ .Values.model }}]", "a template (`{{`) is not read"),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(CommandLineError) as refused:
        read(text)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


PIECES = [
    *"\0\n\t '\"\\$`#&|;<>*?[]{}~!:-/=(),éA", "$(", "${", "$((", "<<", "&&", "||", "2>", "=1", "$A", "${A}",
    "sglang", " serve ", "sglang serve /m", "env ", "-i ", "export ", "unset ", "set -a", "declare -x ",
    "sudo ", "bash -c ", "docker run ", "-e ", "image ", "time ", "exec ", "cd ", "exit", "timeout 5 ",
    "python -m ", "sglang.launch_server ", "--model-path /m", "services:\n", " a:\n", "  command: ",
    "  environment: ", "A: ", "  args: ", "  env: ", "- ", "name: ", "valueFrom: ", "value: ",
    "{name: A, value: b}", "&x ", "*x", "<<: ",
]  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_text_is_read_or_refused_in_a_sentence(text: str) -> None:
    try:
        found = read(text)
    except CommandLineError as error:
        message = str(error)
    else:
        assert not any("\0" in each for each in found.argv)
        return
    assert message
    assert not set("\n\r\0") & set(message)


def test_a_file_of_variables(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text(f"# of the server\n\n{POLICY}=/p q.yaml\nQUOTED='x'\nA=1\nHF_TOKEN\n")
    found = read(f"docker run -e A=2 --env-file {file} i {SERVE}")
    assert found.variables == {POLICY: "/p q.yaml", "QUOTED": "'x'", "A": "2"}


def test_a_variable_that_is_exported_around_the_text() -> None:
    assert read(f"A=1; {SERVE}", around=["A"]).variables == {"A": "1"}
    assert read(f"unset A; A=1; {SERVE}", around=["A"]).variables == {"A": None}
    assert read(f"env -i bash -c 'A=1; {SERVE}'", around=["A"]).variables == {}


class TestTheChild:
    """Which variables SGLang resolves with."""

    def of(self, text: str, **around: str) -> dict[str, str]:
        with pytest.MonkeyPatch.context() as patch:
            for name, each in around.items():
                patch.setenv(name, each)
            return dry_run._variables(read(text, os.environ), {"LD_LIBRARY_PATH": "/stand-in"})

    def test_those_around_it_and_those_of_the_text(self) -> None:
        found = self.of(f"env SGLANG_B=3 {SERVE}", SGLANG_A="1", SGLANG_B="2")
        assert (found["SGLANG_A"], found["SGLANG_B"]) == ("1", "3")

    def test_a_container_has_none_of_those_around_it(self) -> None:
        found = self.of(f"docker run -e SGLANG_B=3 i {SERVE}", SGLANG_A="1", SGLANG_B="2", SGL_C="4")
        assert found["SGLANG_B"] == "3"
        assert not {"SGLANG_A", "SGL_C"} & set(found)

    def test_one_that_is_taken_away(self) -> None:
        assert "SGLANG_A" not in self.of(f"unset SGLANG_A; {SERVE}", SGLANG_A="1")

    def test_where_another_machine_has_its_libraries(self) -> None:
        found = self.of(f"export LD_LIBRARY_PATH=/theirs PATH=/theirs; {SERVE}")
        assert (found["LD_LIBRARY_PATH"], found["PATH"]) == ("/stand-in", os.environ["PATH"])
