"""``hicache-io explain``: what would run here, and why.

Exit status 0: good; 1: a server would refuse to start like this; 2: the input is wrong (`shared`).
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...io_backends.policy_files import policy_in_force
from ...io_backends.registry import AUTO, BACKENDS, UPSTREAM_NAMES
from ...io_backends.sglang.diagnose.gpu_memory import GpuMemory
from ...io_backends.sglang.handover.machine_facts import detect
from ...policy import completion
from ...policy.decide import check_backend
from ...policy.fact_spec import FactValue
from ...policy.fact_table import ANY_ATTENTION, ATTENTION_FACTS, CONDITIONS
from ...policy.facts import Facts
from ...policy.format.load import POLICY_VARIABLE
from ...policy.gpu_names import memory_gib
from ...policy.names import NameProblem
from ...policy.terminal import console, working
from ...policy.text import answer
from ..json_option import Json
from ..layout import pairs
from . import launch_line, render
from . import matrix as table
from .explanation import Explanation
from .shared import PolicyPath, print_json, refusing, typed_fact
from .what_if import changed, difference, parse_facts

if TYPE_CHECKING:
    from ...io_backends.sglang.diagnose.dry_run import Server


def _option(*names: str, metavar: str, help: str, complete: completion.Complete | None = None) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, show_default=False, autocompletion=complete)


def _takes_facts(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with an option for each fact that has one; its first argument is what was typed, by fact."""
    facts = [spec for spec in CONDITIONS.values() if spec.metavar]

    def with_options(**given: Any) -> None:
        command({spec.name: given.pop(spec.name) for spec in facts}, **given)

    options = {
        spec.name: Annotated[
            str | None,
            _option(spec.option, metavar=spec.metavar, help=spec.meaning, complete=completion.of_fact(spec)),
        ]
        for spec in facts
    }
    _, *others = inspect.signature(command, eval_str=True).parameters.values()
    signature = inspect.Signature(
        [
            *(
                Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=each)
                for name, each in options.items()
            ),
            *others,
        ]
    )
    # All that typer reads of a function.
    with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
    with_options.__signature__ = signature  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
    return with_options


@_takes_facts
def explain(
    typed: Mapping[str, str | None],
    *,
    fact: Annotated[
        list[str] | None,
        _option(
            "--fact",
            metavar="NAME=VALUE",
            help="Any other fact, such as row_bytes=2048. May be repeated.",
        ),
    ] = None,
    policy: PolicyPath = None,
    backend: Annotated[
        str | None,
        _option(
            "--backend",
            metavar="NAME",
            help="What --hicache-io-backend would say; auto if not given.",
            complete=completion.one_of((AUTO, *BACKENDS, *UPSTREAM_NAMES)),
        ),
    ] = None,
    server_args: Annotated[
        str | None,
        _option(
            "--server-args",
            metavar="'OPTIONS'",
            help="A whole SGLang command line: facts, backend and policy as SGLang resolves them.",
        ),
    ] = None,
    gpu_memory: GpuMemory = None,
    what_if: Annotated[
        str | None,
        _option(
            "--what-if",
            metavar="FACT=VALUE,...",
            help="Show the decision with these facts too, and what changes.",
        ),
    ] = None,
    matrix: Annotated[
        bool,
        typer.Option(
            "--matrix", help="The decision for every attention backend and architecture, as a table."
        ),
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --matrix: in Markdown.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Evidence, cost, facts, and the rules considered, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say which backend copies KV cache to the host, which forwards wait for it, and why.

    What is not given is detected on this machine, and shown as detected; --matrix detects nothing, and takes
    SGLang's defaults for what is not given. Exit status 0: a server would start; 1: it would be refused; 2:
    the input is wrong.
    """
    with refusing(as_json):
        given: dict[str, FactValue] = {}
        for name, text in typed.items():
            if text is not None:
                with _naming(CONDITIONS[name].option):
                    given[name] = typed_fact(name, text)
        if fact:
            with _naming("--fact"):
                given |= parse_facts(fact)
        server = None
        if server_args is not None:
            if matrix:
                raise NameProblem("--matrix is about every server; leave --server-args out")
            with _naming("--server-args"):
                memory = gpu_memory or memory_gib(typed["gpu_arch"] or "")
                server = _server(server_args, given, memory, as_json)
        typed_backend = backend
        with _naming("--backend"):
            backend = check_backend(backend or (server.backend if server else AUTO), BACKENDS)
        other = None
        if what_if is not None:
            with _naming("--what-if"):
                other = parse_facts([what_if])
        if markdown and not matrix:
            raise NameProblem("--markdown belongs to --matrix")
        if matrix and other is not None:
            raise NameProblem("--matrix shows every attention backend and architecture; leave --what-if out")
        of_the_table = [name for name in given if name in ("gpu_arch", *ATTENTION_FACTS, ANY_ATTENTION.name)]
        if matrix and of_the_table:
            raise NameProblem(
                f"--matrix goes through every attention backend and architecture; leave {of_the_table[0]} out"
            )
        in_force = server.policy_in_force() if server and policy is None else policy_in_force(policy)
    if matrix:
        _show_matrix(table.matrix(in_force, given, backend=backend), markdown, as_json)
        return
    if server:
        facts = server.facts
    else:
        with working("looking for a GPU"):
            facts = detect(given)
    pools = (server.pools, server.pools_unknown) if server else ((), None)
    explanation = Explanation.of(in_force, facts, backend=backend, pools=pools)
    then = None
    if other is not None:
        then = Explanation.of(in_force, changed(facts, other), backend=backend, pools=pools)
    words = _launch_line(facts, server, backend, policy, typed_backend)
    if as_json:
        found = {**explanation.to_dict(), "command": shlex.join(words)}
        found["not_read"] = server.not_read if server else None
        if then is not None:
            found["what_if"] = {
                "decision": then.to_dict(),
                "changes": difference(explanation.decision, then.decision),
            }
        print_json(found)
    else:
        _show(explanation, words, verbose, server.not_read if server else None)
        if then is not None and other is not None:
            render.show_what_if(console(), explanation, then, other)
    if explanation.refused is not None:
        raise typer.Exit(1)


def _show(explanation: Explanation, words: list[str], verbose: bool, not_read: str | None) -> None:
    out = console()
    if not_read is not None:
        out.print(pairs([("Not read", not_read)]))
    if verbose:
        render.show_explanation(out, explanation)
    else:
        render.show_summary(out, explanation)
    if explanation.refused is None:
        out.print(launch_line.folded(words, out.width), soft_wrap=True)
    if not verbose:
        out.print("--verbose: the evidence, the cost, every fact, and the rules considered.", style="dim")


def _launch_line(
    facts: Facts, server: Server | None, backend: str, policy: str | None, typed_backend: str | None
) -> list[str]:
    if server is None or server.command is None:
        return launch_line.of_facts(facts, backend=backend, policy=policy)
    from ...io_backends.sglang.diagnose.programs import VARIABLES_OF_SGLANG

    variables = {
        name: value
        for name, value in server.command.variables.items()
        if name.startswith(VARIABLES_OF_SGLANG) and not (policy and name == POLICY_VARIABLE)
    }
    return launch_line.of_server(
        server.command.argv,
        variables,
        backend=typed_backend,
        policy=policy,
        program=server.command.program,
    )


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Say which option a wrong name was given to."""
    try:
        yield
    except NameProblem as error:
        raise NameProblem(f"{option}: {error.message}", error.hint) from None


def _server(command_line: str, given: Mapping[str, FactValue], gpu_gib: int | None, as_json: bool) -> Server:
    """What `command_line` resolves to. Raises NameProblem, also for a server without HiCache; ends with
    status 1 where such a server would be refused before anything is decided.
    """
    # Here, because it is the one thing in this package that needs an installed SGLang.
    from ...io_backends.sglang.diagnose.dry_run import server_facts_of
    from ...io_backends.sglang.diagnose.shell_words import ServerRefusedError

    try:
        server = server_facts_of(command_line, given, gpu_gib=gpu_gib)
    except ServerRefusedError as error:
        if as_json:
            print_json({"ok": False, "refused": error.message})
        else:
            console().print(pairs([("A server", f"would refuse this: {error.message}")]))
        raise typer.Exit(1) from None
    if not server.hicache:
        raise NameProblem("this server runs without HiCache: add --enable-hierarchical-cache")
    return server


def _show_matrix(entries: list[dict[str, Any]], markdown: bool, as_json: bool) -> None:
    if as_json:
        print_json(entries)
    elif markdown:
        answer(table.markdown(entries).removesuffix("\n"))
    else:
        render.show_matrix(console(), table.rows(entries))
