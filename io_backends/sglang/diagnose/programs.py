"""Programs that start SGLang's server, and those that run another program: what the server gets from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import NamedTuple

from ....policy.format.load import POLICY_VARIABLE
from . import containers
from .containers import Container, options
from .shell_expansion import check_known, unknown_in
from .shell_words import CommandLineError, Unknown, Value

VARIABLES_OF_SGLANG = ("SGLANG", "SGL_")
"""How the variables begin that SGLang and this plug-in decide by (``sglang/srt/environ.py``)."""

ALONE = "give SGLang's options alone, from --model-path on, and its variables before them as NAME=value"


@dataclass(frozen=True)
class CommandLine:
    """What a text starts.

    Attributes:
        variables: set for the server; None where the text takes one away. One whose value the text does not
            tell, and by which SGLang decides nothing (an access token), is left out.
        argv: SGLang's options, as ``prepare_server_args`` takes them.
        inherits: whether the server has the variables of the shell around the text too; a container has not.
        program: another program that takes SGLang's options among its own; empty for SGLang itself.
    """

    variables: Mapping[str, str | None]
    argv: list[str]
    inherits: bool = True
    program: str = ""


@dataclass(frozen=True)
class Process:
    """What a program is started with.

    Attributes:
        variables: as of a `CommandLine`, before it is known which of them count.
        inherits: as of a `CommandLine`.
        around: names that the shell around the text has exported; empty if it does not inherit.
        folder: what relative paths start from, in words; empty for the folder that the text is read in.
    """

    variables: Mapping[str, Value | None]
    inherits: bool = True
    around: frozenset[str] = frozenset()
    folder: str = ""

    def values(self) -> dict[str, Value]:
        return {name: each for name, each in self.variables.items() if each is not None}

    def with_variables(self, more: Mapping[str, Value | None]) -> Process:
        """The same with ``more`` variables, which win over those it has."""
        return replace(self, variables={**self.variables, **more})


RunScript = Callable[[str, Process], CommandLine | None]
"""What a shell's ``-c`` does with a script."""


class _Wrapper(NamedTuple):
    """A program that runs another: its options (as `getopt` takes them), and operands before the command."""

    letters: str = ""
    names: str = ""
    operands: int = 0


# From the manual pages of coreutils, util-linux, numactl, bash (command), time, tini and dumb-init.
_WRAPPERS = {
    "nohup": _Wrapper(),
    "setsid": _Wrapper("cfw", "ctty fork wait"),
    "time": _Wrapper("apqvf:o:", "append portability quiet verbose format= output="),
    "command": _Wrapper("p"),
    "nice": _Wrapper("0123456789n:", "adjustment="),
    "ionice": _Wrapper("c:n:t", "class= classdata= ignore"),
    "chrt": _Wrapper("abfior", "all-tasks batch fifo idle other rr", operands=1),
    "timeout": _Wrapper("fpvk:s:", "foreground preserve-status verbose kill-after= signal=", operands=1),
    "taskset": _Wrapper("ac", "all-tasks cpu-list", operands=1),
    "numactl": _Wrapper(
        "albN:C:m:i:p:P:w:",
        "all localalloc balancing cpunodebind= physcpubind= membind= interleave= preferred= preferred-many= "
        "weighted-interleave=",
    ),
    "stdbuf": _Wrapper("i:o:e:", "input= output= error="),
    "tini": _Wrapper("gsvwp:e:"),
    "dumb-init": _Wrapper("cv", "single-child verbose"),
}
# They add options to SGLang's own parser, and pass what it reads on (NVIDIA Dynamo's worker).
_TAKES_OPTIONS_OF_SGLANG = ("dynamo.sglang", "dynamo.sglang.main")
_SHELLS = ("bash", "sh", "dash", "zsh", "ksh")
_PYTHON = re.compile(r"python(3(\.\d+)?)?")
_NAMES_A_SERVER = re.compile(r"sglang[\w.]*\s+serve\b|launch_server\b|\.sglang\b")
_OF_CONTAINER = "the container's folder"
_NAMES_A_MODEL = ("--model-path", "--model", "--speculative-draft-model-path", "--speculative-draft-model")


def names_a_server(text: str) -> bool:
    """Whether a command's words hold a command of SGLang, or something like it."""
    return bool(_NAMES_A_SERVER.search(text))


def runs_another(program: str) -> bool:
    """Whether every word counts after `program`: SGLang's options follow, or a command does."""
    name = PurePosixPath(program).name
    known = ("sglang", "env", "sudo", "exec", *_WRAPPERS, *_SHELLS, *containers.PROGRAMS)
    return name in known or bool(_PYTHON.fullmatch(name)) or program.startswith("-")


def started(words: Sequence[str], process: Process, run_script: RunScript) -> CommandLine | None:
    """The server that a command starts; None for a program that starts none.

    Args:
        words: of the command, expanded.
        process: what the command is started with.
        run_script: for ``bash -c``.

    Raises:
        CommandLineError: it may start a server in a way that is not read, or with what is not known.
    """
    if not words:
        return None
    check_known(words[0])
    program, rest = PurePosixPath(words[0]).name, list(words[1:])
    if words[0].startswith("-"):
        return _server(words, process)
    if program == "sglang" and rest[:1] == ["serve"]:
        return _server(_serve_options(rest[1:]), process)
    if _PYTHON.fullmatch(program) and (module := _module(rest)):
        if module[0] == "sglang.launch_server":
            return _server(module[1:], process)
        if module[0] in _TAKES_OPTIONS_OF_SGLANG:
            return replace(_server(module[1:], process), program=module[0])
        rest = module[1:]
    elif program == "env":
        process, rest = _by_env(words, process)
        return started(rest, process, run_script)
    elif program == "sudo":
        process, rest = _by_sudo(words, process)
        return started(rest, process, run_script)
    elif program in _WRAPPERS:
        wrapper = _WRAPPERS[program]
        _, rest = options(words, wrapper.letters, wrapper.names.split())
        return started(rest[wrapper.operands :], process, run_script)
    elif program in _SHELLS:
        given, rest = options(words, "ceilrsuvxo:O:", ["login", "norc", "noprofile", "posix"])
        if ("-c", "") in given:
            check_known(*rest[:1])
            return run_script(rest[0], process) if rest and "sglang" in rest[0] else None
    elif program in containers.PROGRAMS and (
        found := containers.docker_run(words, process.values(), process.folder)
    ):
        return in_container(found, run_script)
    if names_a_server(" ".join(rest)):
        raise CommandLineError(
            f"what `{program}` does with the command after it is not known here: leave it out, or {ALONE}"
        )
    return None


def in_container(container: Container, run_script: RunScript) -> CommandLine | None:
    """As `started`, with a container's variables alone."""
    words = container.words
    if words and words[0].startswith("-") and not any(word.startswith("--model") for word in words):
        return None  # options of another image's program
    process = Process(container.variables, inherits=False, folder=_OF_CONTAINER)
    return started(words, process, run_script)


def _module(words: Sequence[str]) -> list[str]:
    """What ``python -m`` runs, and its arguments; empty without ``-m``."""
    at = 0
    while at < len(words) and words[at].startswith("-") and not words[at].startswith("-c"):
        if words[at].startswith("-m"):
            attached = [words[at][2:]] if words[at] != "-m" else []
            return [*attached, *words[at + 1 :]]
        at += 2 if words[at] in ("-X", "-W") else 1
    return []


def _serve_options(words: Sequence[str]) -> list[str]:
    """As ``sglang/cli/serve.py`` does before it parses: ``--model-type`` is its own, and a first word without
    a dash is the model.
    """
    kept: list[str] = []
    kind, at = "auto", 0
    while at < len(words):
        if words[at] == "--model-type":
            kind, at = (words[at + 1] if at + 1 < len(words) else ""), at + 1
        elif words[at].startswith("--model-type="):
            kind = words[at].partition("=")[2]
        else:
            kept.append(words[at])
        at += 1
    if kind not in ("auto", "llm"):
        raise CommandLineError(
            f"--model-type {kind or 'without a value'}: HiCache is in auto and llm servers"
        )
    if kept and not kept[0].startswith("-"):
        return ["--model-path", *kept]
    return kept


def _by_env(words: Sequence[str], process: Process) -> tuple[Process, list[str]]:
    given, rest = options(words, "iu:0v", ["ignore-environment", "unset=", "null", "debug"])
    if rest[:1] == ["-"]:
        given, rest = [*given, ("-i", "")], rest[1:]
    if any(option in ("-i", "--ignore-environment") for option, _ in given):
        process = Process({}, inherits=False, folder=process.folder)
    process = process.with_variables({name: None for option, name in given if option in ("-u", "--unset")})
    while rest and "=" in rest[0]:
        name, _, text = rest.pop(0).partition("=")
        process = process.with_variables({name: text})
    return process, rest


def _by_sudo(words: Sequence[str], process: Process) -> tuple[Process, list[str]]:
    listed = any(word.startswith("--preserve-env=") for word in words)
    names = ["preserve-env=" if listed else "preserve-env", "set-home", "non-interactive", "user=", "group="]
    given, rest = options(words, "EHknSu:g:", names)
    kept = {name for option, text in given if option == "--preserve-env" for name in text.split(",")}
    everything = any(option == "-E" or (option, text) == ("--preserve-env", "") for option, text in given)
    after: dict[str, Value | None] = {}
    while rest and re.match(r"[A-Za-z_]\w*=", rest[0]):
        name, _, text = rest.pop(0).partition("=")
        after[name] = text
    if not everything:
        lost = sorted(set(process.values()) - kept - set(after))
        if lost and "sglang" in " ".join(rest):
            raise CommandLineError(
                f"sudo drops {', '.join(lost)}: write sudo -E, or the variables after sudo as NAME=value"
            )
        process = replace(process, inherits=False, around=frozenset())
    return process.with_variables(after), rest


def _server(argv: Sequence[str], process: Process) -> CommandLine:
    check_known(*argv, *process.variables)
    variables: dict[str, str | None] = {}
    for name, value in process.variables.items():
        each = unknown_in(value) or value if isinstance(value, str) else value
        if not isinstance(each, Unknown):
            variables[name] = each
        elif name.startswith(VARIABLES_OF_SGLANG):
            raise CommandLineError(f"{name}: {each.why}")
    if process.folder:
        _check_paths(argv, variables.get(POLICY_VARIABLE), process.folder)
    return CommandLine(variables, list(argv), process.inherits)


def _check_paths(argv: Sequence[str], policy: str | None, folder: str) -> None:
    """Raises CommandLineError for a file or folder that is named relative to one that is not here."""
    named = [(POLICY_VARIABLE, policy)] if policy else []
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        option, equals, rest = word.partition("=")
        if option.startswith("--"):
            named.append((option, rest if equals else following))
    for option, path in named:
        of_hub = option in (*_NAMES_A_MODEL, "--tokenizer-path")
        if of_hub and re.fullmatch(r"\w[\w.-]*/[\w.-]+" if folder != _OF_CONTAINER else r"\w[\w./-]*", path):
            continue  # a name of the hub, or a folder that is then not found
        file = of_hub or option in (POLICY_VARIABLE, "--hicache-io-policy", "--config")
        if (file and not path.startswith("/")) or path.startswith(("./", "../")):
            raise CommandLineError(f"`{path}` is relative to {folder}: write absolute paths")
