"""What a whole SGLang command line resolves to, by SGLang's own code, in a process of its own.

Nothing is downloaded and nothing is loaded onto a device. SGLang asks the GPU while it resolves (backends,
page sizes); for an architecture that is given, the child gets a stand-in for what ``torch.cuda`` says of it.

`dry_run_child` is what runs there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....policy.decide import check_backend
from ....policy.fact_spec import FactValue
from ....policy.facts import Facts
from ....policy.format.errors import PolicyError
from ....policy.format.layers import Policy
from ....policy.format.load import MACHINE_VARIABLE, POLICY_VARIABLE
from ....policy.names import NameProblem
from ....policy.terminal import working
from ...policy_files import load_policy, policy_in_force
from ...registry import BACKENDS
from ..errors import PREFIX
from ..pools.host_pools import HostPool
from .command_line import CommandLine, CommandLineError, read
from .pool_sizes import Sizing
from .programs import VARIABLES_OF_SGLANG
from .shell_words import ServerRefusedError

_CHILD = "sglang_hicache.io_backends.sglang.diagnose.dry_run_child"

PYTHON: Sequence[str] = (sys.executable,)
"""The command that runs Python, for the process that imports SGLang."""

RESOLVING = "asking SGLang what this command line resolves to"

TIMEOUT_S = 300
"""A resolution takes 6 to 10 s on two busy cores, most of it imports."""

_OF_MODELS = ("--model-path", "--model", "--tokenizer-path", "--speculative-draft-model-path")

OF_POLICIES = (POLICY_VARIABLE, MACHINE_VARIABLE)

ONLY_CONFIG = "nothing is downloaded, and only a model's config.json is read: name a folder that holds it"

_OF_A_MACHINE = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME", "HOME")
"""Variables by which a process finds what is installed: the server's say nothing of this machine."""


@dataclass(frozen=True)
class Server:
    """What a command line asks for.

    Attributes:
        facts: of the server, each with its source.
        backend: what ``--hicache-io-backend`` says, or SGLang's default.
        policy: the file that ``--hicache-io-policy`` or its variable names, or None.
        hicache: whether HiCache is in use at all.
        retraction, offload: what a PD decode server writes to the host for requests that it retracts, and of
            those that it decodes, and past which fence of SGLang, in a sentence; None where it does not.
        variables: those of the policy as the server has them; None: as this process has them.
        command: what the text was understood as.
        not_read: what another program than SGLang was given besides SGLang's options, in a sentence.
        pools: its host pools, which nobody is to write yet; see :mod:`..pools.prediction`.
        pools_unknown: why there are none, or None.
        sizing: how large its host pools are to be.
        memory_saver: ``--enable-memory-saver``: device pools can be unmapped while it runs.
        gpu_gib: memory of its GPU, where that was told.
    """

    facts: Facts
    backend: str
    policy: str | None
    hicache: bool
    retraction: str | None = None
    offload: str | None = None
    variables: Mapping[str, str] | None = None
    command: CommandLine | None = None
    not_read: str | None = None
    pools: tuple[HostPool, ...] = ()
    pools_unknown: str | None = None
    sizing: Sizing | None = None
    memory_saver: bool = False
    gpu_gib: int | None = None

    def policy_in_force(self) -> Policy:
        """What this server decides by. Raises PolicyError."""
        variables = self.variables
        if variables is None:
            return policy_in_force(self.policy)
        by_variable = self.policy == variables.get(POLICY_VARIABLE)
        kept = {name: os.environ.pop(name, None) for name in OF_POLICIES}
        os.environ.update(variables)
        try:
            return policy_in_force(None if by_variable else self.policy)
        finally:
            for name, value in kept.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def server_facts_of(
    command_line: str, given: Mapping[str, FactValue] | None = None, *, gpu_gib: int | None = None
) -> Server:
    """Resolve ``command_line`` as the server would.

    Args:
        command_line: a text that `command_line.read` understands.
        given: facts that count instead of resolved and detected ones; of ``gpu_arch`` SGLang is told.
        gpu_gib: memory of a GPU of that architecture; without it every size that there is is asked about.

    Raises:
        CommandLineError: the text is not read, SGLang or this plug-in refuses it, a model's config.json is
            not here, or no GPU is here and no architecture was given.
        NameProblem: ``given`` holds a name that is no fact.
    """
    with working(RESOLVING):
        return resolved(understood(command_line), given, gpu_gib=gpu_gib)


def understood(command_line: str) -> CommandLine:
    """The variables and options in the text, checked as far as that takes no time. Raises NameProblem."""
    command = read(command_line, os.environ)
    _check_what_needs_no_sglang(command.argv)
    return command


def resolved(
    command: CommandLine, given: Mapping[str, FactValue] | None = None, *, gpu_gib: int | None = None
) -> Server:
    """`server_facts_of` a command line that is `understood`: takes seconds. Raises as that."""
    known: dict[str, Any] = {name: value for name, value in (given or {}).items() if value is not None}
    answer = _ask(command, known.get("gpu_arch"), gpu_gib, known.get("cuda"))
    facts = {**Facts.from_dict(answer["facts"])}
    facts.update({name: fact for name, fact in Facts.given(**known).items() if fact.value is not None})
    return Server(
        Facts(facts),
        answer["backend"],
        answer["policy"],
        answer["hicache"],
        **answer["decode"],
        variables=answer["variables"],
        command=command,
        not_read=answer["not_read"],
        pools=tuple(HostPool.from_dict(each) for each in answer.get("pools", ())),
        pools_unknown=answer.get("pools_unknown"),
        sizing=Sizing(**answer["sizing"]),
        memory_saver=answer["memory_saver"],
        gpu_gib=gpu_gib,
    )


def _check_what_needs_no_sglang(argv: Sequence[str]) -> None:
    """Refuse what is wrong whatever SGLang resolves: importing it takes longer than anybody wants to wait for
    a typo. Raises CommandLineError.
    """
    for option, value in _values(argv, "--hicache-io-backend", "--hicache-io-policy"):
        try:
            check_backend(value, BACKENDS) if option == "--hicache-io-backend" else load_policy(value)
        except (NameProblem, PolicyError) as error:
            raise CommandLineError(f"{option}: {error}") from None
    for option, value in _values(argv, *_OF_MODELS):
        if value.startswith(("/", "./", "../", "~")) and not Path(value).exists():
            raise CommandLineError(f"{option}: there is no folder {value} on this machine; {ONLY_CONFIG}")


def _values(argv: Sequence[str], *options: str) -> Iterator[tuple[str, str]]:
    """The values that `argv` gives `options` by their full names."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in options and (value := value if equals else following):
            yield name, value


def _ask(
    command: CommandLine, gpu_arch: FactValue, gpu_gib: int | None = None, cuda: FactValue = None
) -> dict[str, Any]:
    """The child's answer. Raises CommandLineError, of which ServerRefusedError is one."""
    from ..no_gpu import fake_libcuda

    with tempfile.TemporaryDirectory(prefix="hicache-io-") as scratch:
        answer = Path(scratch, "answer.json")
        request = {"argv": command.argv, "gpu_arch": gpu_arch, "gpu_gib": gpu_gib, "answer": str(answer)}
        request |= {"program": command.program, "cuda": cuda}
        try:
            environment = {
                **_variables(command, fake_libcuda.environment(Path(scratch, "libcuda"))),
                # The model's configuration is read where it is; nothing is fetched to answer a question.
                **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
                **({"CUDA_VISIBLE_DEVICES": ""} if gpu_arch is not None else {}),
            }
            done = subprocess.run(
                [*PYTHON, "-m", _CHILD],
                input=json.dumps(request),
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except fake_libcuda.NoCompilerError as error:
            raise CommandLineError(str(error)) from None
        except subprocess.TimeoutExpired:
            raise CommandLineError(f"SGLang did not resolve it within {TIMEOUT_S} s") from None
        found: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
    if "facts" in found:
        return found
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
    reason = found.get("error") or said[-1]
    if reason.startswith(f"{PREFIX}: "):
        raise ServerRefusedError(reason.removeprefix(f"{PREFIX}: "))
    raise CommandLineError(reason)


def _variables(command: CommandLine, of_child: Mapping[str, str]) -> dict[str, str]:
    """The child's: this machine's, without SGLang's own where the server has only what its text says."""
    found = {
        name: value
        for name, value in {**os.environ, **of_child}.items()
        if command.inherits or not name.startswith(VARIABLES_OF_SGLANG)
    }
    for name, value in command.variables.items():
        if name in _OF_A_MACHINE:
            continue
        if value is None:
            found.pop(name, None)
        else:
            found[name] = value
    return found
