"""What containers are started with: ``docker run``, and the YAML of Compose and Kubernetes.

A container has none of the variables around it. What it gets from outside of the text (``-e NAME`` alone,
``valueFrom``, an ``env_file``) is `Unknown`. What its image sets is in no text, and nothing is said of it.
"""

from __future__ import annotations

import getopt
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .shell_expansion import check_known
from .shell_words import CommandLineError, Unknown, Value

PROGRAMS = ("docker", "podman", "nerdctl", "nvidia-docker")

# Options of `docker run` and `podman run` from their references; those that end in = take a value.
_GLOBAL_LETTERS, _GLOBAL_OPTIONS = (
    "Dc:H:l:",
    ["config=", "context=", "debug", "host=", "log-level=", "namespace="],
)
_LETTERS = "a:c:de:h:il:m:p:Pqtu:v:w:"
_FLAGS = """
    detach init interactive no-healthcheck oom-kill-disable privileged publish-all quiet read-only replace
    rm rmi tty"""
_WITH_VALUE = """
    add-host annotation attach authfile blkio-weight cap-add cap-drop cgroup-parent cgroupns cgroups cidfile
    cpu-period cpu-quota cpu-rt-period cpu-rt-runtime cpu-shares cpus cpuset-cpus cpuset-mems detach-keys
    device device-cgroup-rule device-read-bps device-read-iops device-write-bps device-write-iops dns
    dns-option dns-search domainname entrypoint env env-file expose gpus group-add health-cmd
    health-interval health-retries health-start-period health-timeout hostname ip ip6 ipc isolation label
    label-file link log-driver log-opt mac-address memory memory-reservation memory-swap memory-swappiness
    mount name net net-alias network network-alias oom-score-adj pid pids-limit platform pod publish pull
    restart runtime secret security-opt shm-size stop-signal stop-timeout storage-opt sysctl tmpfs ulimit
    user userns uts volume volume-driver volumes-from workdir"""
_OPTIONS = [*_FLAGS.split(), *(f"{name}=" for name in _WITH_VALUE.split())]


@dataclass(frozen=True)
class Container:
    """One container: what it is called, its variables, and the words of its command."""

    name: str
    variables: dict[str, Value]
    words: list[str]


def docker_run(words: Sequence[str], around: Mapping[str, Value], folder: str) -> Container | None:
    """The container that a ``docker run`` starts; None for another of its commands.

    Args:
        words: of the command, its program first.
        around: the variables of the process that runs it, for ``-e NAME``.
        folder: what a relative ``--env-file`` starts from, in words; empty for this process's folder.

    Raises:
        CommandLineError: an option that is not known, or a file of variables that is not here.
    """
    _, rest = options(words, _GLOBAL_LETTERS, _GLOBAL_OPTIONS)
    if rest[:1] == ["container"]:
        rest = rest[1:]
    if rest[:1] != ["run"]:
        return None
    given, rest = options(["docker run", *rest[1:]], _LETTERS, _OPTIONS)
    from_files, variables = dict[str, Value](), dict[str, Value]()
    entry_point: list[str] = []
    for option, value in given:
        if option in ("-e", "--env"):
            variables.update(_variable(value, around))
        elif option == "--env-file":
            if folder and not value.startswith("/"):
                raise CommandLineError(f"`{value}` is relative to {folder}: write absolute paths")
            for line in _lines(value):
                from_files.update(_variable(line, around))
        elif option == "--entrypoint":
            entry_point = [value] if value else []
    return Container(rest[0] if rest else "", from_files | variables, entry_point + rest[1:])


def options(
    words: Sequence[str], letters: str, names: Sequence[str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """The options after the program, and what follows them. Raises CommandLineError for one not listed."""
    try:
        return getopt.getopt(list(words[1:]), letters, list(names))
    except getopt.GetoptError as error:
        raise CommandLineError(f"`{words[0]}` is not read with this: {error}") from None


def _variable(written: str, around: Mapping[str, Value]) -> dict[str, Value]:
    name, equals, value = written.partition("=")
    outside = Unknown(f"{name} takes its value from outside of the text: write {name}=value")
    return {name: value if equals else around.get(name, outside)}


def _lines(file: str) -> Iterator[str]:
    """Of an ``--env-file``: Docker takes what follows ``=`` as it is, quotes included."""
    check_known(file)
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise CommandLineError(f"--env-file {file} cannot be read here: {why}") from None
    for line in text.splitlines():
        if (line := line.lstrip()) and not line.startswith("#"):
            yield line


def is_yaml(text: str) -> bool:
    """Whether a text is a Compose or Kubernetes file, by its first line that says something."""
    lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    return bool(re.match(r"""---|\s*\{\s*("|$)|\s*(- )?["']?[A-Za-z_][\w.-]*["']?:(\s|$)""", next(lines, "")))


def containers(text: str) -> list[Container]:
    """The containers of a Compose or Kubernetes file (``docker compose``, ``kubectl apply -f``) that name a
    command.

    Raises:
        CommandLineError: not YAML, or a container of SGLang takes variables from elsewhere.
    """
    if "{{" in text:
        raise CommandLineError("a template (`{{`) is not read: give what is rendered from it")
    yaml = YAML(
        typ="base", pure=True
    )  # every value as it is written: `1e3` and `yes` are no number and truth
    try:
        documents = [_merged(document) for document in yaml.load_all(text)]
    except (YAMLError, TypeError, RecursionError) as error:
        said = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise CommandLineError(f"the text begins like YAML and is none: {said}") from None
    return [each for document in documents for each in _walk(document, "")]


def _merged(node: Any) -> Any:
    """`node` with the merge keys (``<<``) of its mappings resolved, which the base loader leaves alone."""
    if isinstance(node, list):
        return [_merged(each) for each in node]
    if not isinstance(node, dict):
        return node
    below = node.get("<<", [])
    found: dict[str, Any] = {}
    for each in reversed(below if isinstance(below, list) else [below]):
        if not isinstance(each, dict):
            raise CommandLineError("the text begins like YAML and is none: `<<` takes mappings")
        found.update(_merged(each))
    return found | {str(key): _merged(value) for key, value in node.items() if key != "<<"}


def _walk(node: Any, name: str) -> Iterator[Container]:
    if isinstance(node, list):
        for each in node:
            yield from _walk(each, name)
    elif isinstance(node, dict):
        if any(isinstance(node.get(key), str | list) for key in ("command", "args", "entrypoint")):
            if found := _container(node, str(node.get("name") or node.get("container_name") or name)):
                yield found
            return
        for key, value in node.items():
            yield from _walk(value, key)


def _container(node: Mapping[str, Any], name: str) -> Container | None:
    kubernetes = "env" in node or "envFrom" in node or "args" in node
    written = [_words(node.get(key)) for key in ("entrypoint", "command", "args")]
    words = [word for each in written for word in each]
    if not any("sglang" in word or "--model" in word for word in words):
        return None  # a sidecar
    for key in ("envFrom", "env_file", "extends"):
        if node.get(key):
            raise CommandLineError(
                f"`{key}` of {name} is not read, because its variables are elsewhere: write them in the text"
            )
    variables: dict[str, Value] = {}
    for each, value in _environment(node.get("env") or node.get("environment") or {}, name):
        variables[each] = value if isinstance(value, Unknown) else _filled(value, variables, kubernetes, each)
    filled = [_filled(word, variables, kubernetes, "command") for word in words]
    for word in filled:
        if isinstance(word, Unknown):
            raise CommandLineError(word.why)
    return Container(name, variables, [word for word in filled if isinstance(word, str)])


def _words(written: Any) -> list[str]:
    if isinstance(written, list):
        return [str(each) for each in written]
    try:
        return shlex.split(written or "")
    except ValueError as error:
        raise CommandLineError(f"the command line cannot be read: {error}") from None


def _environment(written: Any, name: str) -> Iterator[tuple[str, Value]]:
    outside = "{} takes its value from outside of the text: write it"
    if isinstance(written, dict):
        for key, value in written.items():
            # `NAME:` is Compose's "from outside"; the base loader reads `NAME: ""` alike.
            yield key, value if isinstance(value, str) and value else Unknown(outside.format(key))
        return
    for each in written if isinstance(written, list) else [written]:
        if isinstance(each, str):
            key, equals, value = each.partition("=")
            yield key, value if equals else Unknown(outside.format(key))
        elif isinstance(each, dict) and "name" in each:
            key = str(each["name"])
            elsewhere = Unknown(f"{key} has `valueFrom` in {name}: write its value")
            yield key, elsewhere if "valueFrom" in each else str(each.get("value", ""))
        else:
            raise CommandLineError(f"a variable of {name} has no name")


def _filled(text: str, variables: Mapping[str, Value], kubernetes: bool, where: str) -> Value:
    """`text` with what is replaced before the container starts.

    Kubernetes replaces ``$(NAME)`` by what stands above it and leaves other names as they are; ``$$`` is
    ``$``. Compose replaces ``$NAME`` and ``${NAME}`` from its own surroundings; ``$$`` is ``$``.
    """
    if not kubernetes:
        if found := re.search(r"\$(\{[^}]*\}?|\w+)", text.replace("$$", "")):
            return Unknown(f"`{found[0]}` ({where}) is replaced from outside of the text: write its value")
        return text.replace("$$", "$")
    unknown: list[Unknown] = []

    def replaced(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        value = variables.get(found[1], found[0])
        if isinstance(value, Unknown):
            unknown.append(value)
            return ""
        return value

    filled = re.sub(r"\$\$|\$\(([A-Za-z_][\w.-]*)\)", replaced, text)
    return unknown[0] if unknown else filled
