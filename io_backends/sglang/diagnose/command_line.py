"""A command line as people write it: which variables reach the server, and which options.

The text is a shell's, or the YAML of Compose or Kubernetes. It is understood or refused in one sentence,
never skipped: a variable left out could be the policy. Of the statements before the server only those count
that can change a variable; a program cannot change its parent's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from . import containers
from .containers import options
from .programs import ALONE, CommandLine, Process, in_container, names_a_server, runs_another, started
from .shell_expansion import assignment, expand, value
from .shell_words import AndOrList, Command, CommandLineError, Kind, Value, Word, parse

__all__ = ["CommandLine", "CommandLineError", "read"]

# Names, separated by blanks.
_STRUCTURE = "if then elif else fi for while until do done case esac select function coproc { } ! [[ ]]"
_CHANGES = "export declare typeset unset set cd pushd popd"
# What can change variables, or what a name means; from conda on, usually functions of a shell.
_NOT_READ = """
    source . eval alias unalias builtin trap shopt read mapfile readarray getopts let local readonly shift
    enable conda mamba micromamba module ml spack nvm pyenv deactivate workon"""
# Builtins, and programs that name a server without starting one.
_CHANGES_NOTHING = """: echo printf true false test [ pwd ulimit umask wait kill jobs hash type disown
    pkill pgrep killall grep egrep ps which"""
_SET_NAMES = "errexit nounset xtrace verbose pipefail allexport"
_SET_LETTERS = frozenset("euxvEfhmbC")
_OF_SHELLS = ("IFS", "BASH_ENV", "SHELLOPTS", "BASHOPTS")


def read(text: str, around: Collection[str] = ()) -> CommandLine:
    """Understand `text`.

    Args:
        text: one command line, a script, or a Compose or Kubernetes file, with one server.
        around: names that the shell around the text has exported: assigning one of them exports it.

    Raises:
        CommandLineError: there is no server in it, or two, or something that could change one of its
            variables or options and is not read.
    """
    if "\0" in text:
        raise CommandLineError("the text holds a NUL character")
    if containers.is_yaml(text):
        return _in_containers(containers.containers(text))
    found = run_script(text, Process({}, around=frozenset(around)))
    if found is None:
        raise CommandLineError("there is no command in the text")
    return found


def run_script(text: str, process: Process) -> CommandLine | None:
    """The server that a script starts in a shell of its own; None for a script without a program.

    Raises:
        CommandLineError: as `read`.
    """
    shell = _Shell(process)
    for statement in parse(text, options_alone=text.lstrip().startswith("-")):
        shell.run_list(statement)
    if shell.found is None and shell.other:
        raise CommandLineError(f"`{shell.other}` is no command of SGLang that is read: {ALONE}")
    return shell.found


def _in_containers(found: Sequence[containers.Container]) -> CommandLine:
    servers = [(each.name, server) for each in found if (server := in_container(each, run_script))]
    if not servers:
        raise CommandLineError(f"no container in the text has a command that starts SGLang: {ALONE}")
    if len(servers) > 1:
        names = ", ".join(name for name, _ in servers)
        raise CommandLineError(f"there are {len(servers)} servers in the text ({names}): leave one")
    return servers[0][1]


class _Shell:
    """A shell's variables while a script's statements go by.

    Attributes:
        found: the server, once there is one.
        other: the last program that is none, as it was written.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self.values = process.values()
        self.exported = set(self.values) | process.around
        self.removed = {name for name, each in process.variables.items() if each is None}
        self.folder = process.folder
        self.export_all = False
        self.found: CommandLine | None = None
        self.other = ""

    def run_list(self, statement: AndOrList) -> None:
        """What stands between the server and ``&&`` went well: it is asked what the server does.

        Raises:
            CommandLineError: whether a variable changes depends on how a program ends, or it changes in a
                process of its own; and as `run_command`.
        """
        before, changed, doubtful, sure = self.found, "", "", True
        for index, command in enumerate(statement.commands):
            if command.before == "||":
                if doubtful:
                    break
                sure = False
            changes = self.run_command(command, first=index == 0)
            if self.found is not before:
                return
            following = statement.commands[index + 1].before if index + 1 < len(statement.commands) else ""
            if changes and "|" in (command.before, following):
                changed = changes
                break
            changed = changed or changes
            if changes and not sure:
                doubtful = doubtful or changes
                if command.before == "||":
                    break
            # A folder may not be there, and $(...) may fail.
            sure = sure and bool(changes) and not re.match(r"cd|pushd|popd|.*[`(]", changes, re.DOTALL)
        else:
            if not statement.background and not doubtful:
                return
        if before is None and doubtful:
            raise CommandLineError(
                f"whether `{doubtful}` runs depends on the command before it: give the lines that do run"
            )
        if before is None and changed:
            raise CommandLineError(
                f"`{changed}` is in a process of its own (`|` or `&`) and never reaches the server: end it "
                "with && or ;"
            )

    def run_command(self, command: Command, *, first: bool) -> str:
        """The source of a command that changes the shell; empty for every other. Raises CommandLineError."""
        words = list(command.words)
        prefix: dict[str, Value] = {}
        while words and (found := assignment(words[0])):
            if found[0] in _OF_SHELLS:
                raise CommandLineError(f"`{found[0]}=` is not read: it changes how a shell reads")
            prefix[found[0]] = value(found[1], self.values | prefix)
            words.pop(0)
        while words and not _bare(words[0]) and not self.expanded(words[:1]):
            words.pop(0)  # an empty variable: the next word is the command
        source = " ".join(word.source for word in words)
        if not words:
            for name, each in prefix.items():
                self.assign(name, each)
            return " ".join(word.source for word in command.words)
        if not prefix and _bare(words[0]) in _STRUCTURE.split():
            raise CommandLineError(
                f"`{words[0].source}` is not read: give the lines that run, without conditions, loops and "
                "functions of the shell"
            )
        if not prefix and _bare(words[0]) in ("time", "command"):
            skip = 2 if len(words) > 1 and _bare(words[1]) in ("-p", "--") else 1
            if len(words) > skip and not words[skip].source.startswith("-"):
                return self.run_command(replace(command, words=tuple(words[skip:])), first=first)
        name = "[" if _bare(words[0]) == "[" else expand(words[0], self.values)[0]
        if name in _NOT_READ.split() or (name == "printf" and "-v" in source):
            raise CommandLineError(
                f"`{name}` is not read, because it can change the server's variables: leave it out, and "
                "write the variables that it sets before the command, as NAME=value"
            )
        if name in ("exit", "return", "logout"):
            if first and self.found is None:
                raise CommandLineError(f"nothing after `{source}` runs")
        elif name in _CHANGES.split():
            if prefix:
                raise CommandLineError(f"variables before `{name}` are not read")
            self.change(name, words[1:], source)
            return source
        elif name not in _CHANGES_NOTHING.split() and not re.match(r"command -[vV]", source):
            self.start(words, self.started_with().with_variables(prefix), source)
        return ""

    def start(self, words: Sequence[Word], process: Process, source: str) -> None:
        """A program: the server, or one that changes nothing here."""
        name = expand(words[0], self.values)[0]
        try:
            expanded = [each for word in words for each in expand(word, self.values, marking=True)]
        except CommandLineError:
            if runs_another(name) or names_a_server(source):
                raise
            expanded = [name]
        if name == "exec":
            _, expanded = options(expanded, "la:", [])
        found = started(expanded, process, run_script)
        if name == "exec" and expanded and found is None:
            raise CommandLineError(f"nothing after `{source}` runs")
        if found and self.found:
            if name.startswith("-"):
                raise CommandLineError(
                    f"a line begins with {name}: put a \\ at the end of the line before it"
                )
            raise CommandLineError("there are two servers in the text: give the command line of one")
        self.found = self.found or found
        self.other = re.split(r"\s--", source)[0] if found is None else self.other

    def started_with(self) -> Process:
        kept = {name: each for name, each in self.values.items() if name in self.exported}
        gone: Mapping[str, None] = dict.fromkeys(self.removed - set(kept))
        return replace(self.process, variables={**gone, **kept}, folder=self.folder)

    def expanded(self, words: Sequence[Word]) -> list[str]:
        return [each for word in words for each in expand(word, self.values)]

    def assign(self, name: str, new: Value, *, export: bool = False) -> None:
        self.values[name] = new
        if export or self.export_all:
            self.exported.add(name)

    def change(self, name: str, words: Sequence[Word], source: str) -> None:
        """A builtin that changes the shell. Raises CommandLineError for an option that is not read."""
        if name in ("cd", "pushd", "popd"):
            self.folder = f"where `{source}` leads"
        elif name == "set":
            self.set_options(self.expanded(words), source)
        elif name == "unset":
            names = self.expanded(words)
            if "-f" in names:
                return  # functions are not read
            for each in names:
                self.values.pop(each, None)
                self.exported.discard(each)
                self.removed.add(each)
        else:
            self.declare(words, source, export=name == "export")

    def set_options(self, words: Sequence[str], source: str) -> None:
        on, named = True, False
        for word in words:
            letters = set[str]()
            if named:
                name, named = word, False
            elif re.fullmatch(r"[-+][A-Za-z]+", word):
                name, on, letters = "", word[0] == "-", set(word[1:])
                named = "o" in letters
            else:
                name = word
            if letters - _SET_LETTERS - {"a", "o"} or (name and name not in _SET_NAMES.split()):
                raise CommandLineError(f"`{source}` is not read with {word}")
            if "a" in letters or name == "allexport":
                self.export_all = on

    def declare(self, words: Sequence[Word], source: str, *, export: bool) -> None:
        for word in words:
            if found := assignment(word):
                self.assign(found[0], value(found[1], self.values), export=export)
                continue
            for each in expand(word, self.values):
                name, equals, text = each.partition("=")
                if each in ("-p", "--", "-g", "-x", "-gx"):
                    export = export or "x" in each
                elif not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                    raise CommandLineError(f"`{source}` is not read with {each}")
                elif equals:
                    self.assign(name, text, export=export)
                elif export:
                    self.exported.add(name)


def _bare(word: Word) -> str:
    """The text of a word without quotes and expansions, which alone can be the shell's own."""
    plain = len(word.parts) == 1 and word.parts[0].kind == Kind.LITERAL and not word.parts[0].quoted
    return word.parts[0].text if plain else ""
