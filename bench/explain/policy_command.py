"""``hicache-io policy``: what a policy file says, and whether it can be used.

Exit status as for ``explain``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...io_backends.policy_files import (
    load_policy,
    load_policy_text,
    policy_in_force,
    policy_json_schema,
)
from ...io_backends.sglang.handover.machine_facts import detect
from ...policy import completion
from ...policy.decide import decide
from ...policy.fact_spec import FactValue
from ...policy.format.layers import DEFAULT_RULE, Policy
from ...policy.format.lint import warnings
from ...policy.format.schema import Default, Rule
from ...policy.names import NameProblem
from ...policy.terminal import console
from ...policy.text import answer, say
from ..examples import epilog
from ..json_option import Json
from ..outputs import check_file, refuse
from ..whole_help import WholeHelpGroup
from . import policy_text, render
from .shared import PolicyPath, print_json, refusing, typed_fact
from .what_if import parse_facts

policy_app = typer.Typer(
    cls=WholeHelpGroup,
    help="Make, show or check a policy file.",
    epilog=epilog("policy"),
    no_args_is_help=True,
    rich_markup_mode=None,
)


@policy_app.command("init", epilog=epilog("policy init"))
def init(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="Where to write it; standard output without.", show_default=False
        ),
    ] = None,
    server_args: Annotated[
        str | None,
        typer.Option(
            "--server-args", metavar="'OPTIONS'", help="The server that it is for.", show_default=False
        ),
    ] = None,
    gpu_arch: Annotated[
        str | None,
        typer.Option(
            "--gpu-arch",
            metavar="ARCH",
            help="Its GPU, if not this machine's: sm90, H100, ...",
            show_default=False,
            autocompletion=completion.one_of(completion.ARCHITECTURES),
        ),
    ] = None,
    fact: Annotated[
        list[str] | None,
        typer.Option(
            "--fact",
            metavar="NAME=VALUE",
            help="Any other fact, such as attention_backend=fa3. May be repeated.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the text and its file as JSON.")] = False,
) -> None:
    """Write a commented policy file for this machine and a server, as it is decided now, to be changed.

    What is not given is detected here. Unlike calibrate it measures nothing.
    """
    with refusing(as_json):
        given: dict[str, FactValue] = parse_facts(fact) if fact else {}
        if gpu_arch is not None:
            given["gpu_arch"] = typed_fact("gpu_arch", gpu_arch)
        if server_args is None:
            server, facts = None, detect(given)
        else:
            from ...io_backends.sglang.diagnose.dry_run import server_facts_of

            server = server_facts_of(server_args, given)
            facts = server.facts
        in_force = server.policy_in_force() if server else policy_in_force()
    if file is not None:
        if file.exists() and not force:
            refuse(f"{file}: is there already; --force writes over it")
        check_file("policy init", file)
    with refusing(as_json):
        text = policy_text.for_server(decide(in_force, facts), facts, file=str(file or "policy.yaml"))
        load_policy_text(text, str(file or "policy.yaml"))  # what is written can be used
    if file is not None:
        file.write_text(text, encoding="utf-8")
    if as_json:
        print_json({"file": None if file is None else str(file), "text": text})
    elif file is None:
        answer(text.removesuffix("\n"))
    else:
        answer(f"{file}: written; hicache-io policy validate checks it after a change")


@policy_app.command("show", epilog=epilog("policy show"))
def show(
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="The policy file, as --policy.", show_default=False)
    ] = None,
    policy: PolicyPath = None,
    unmeasured: Annotated[
        bool, typer.Option("--unmeasured", help="Only what no measurement supports, rule by rule.")
    ] = False,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="As one policy file that says all of it, to start another from.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print a policy's rules in order, with the reason of each and where it comes from."""
    with refusing(as_json):
        if file is not None and policy is not None:
            raise NameProblem("the policy file is named twice: FILE and --policy")
        if as_yaml and (as_json or unmeasured):
            raise NameProblem(f"--yaml and {'--json' if as_json else '--unmeasured'} exclude each other")
        in_force = policy_in_force(file if file is not None else policy)
    if unmeasured:
        found = _unmeasured(in_force)
        if as_json:
            print_json({"source": in_force.source, "unmeasured": found})
        else:
            render.show_unmeasured(console(), in_force, found)
    elif as_json:
        print_json(_policy_dict(in_force))
    elif as_yaml:
        answer(policy_text.whole(_as_file(in_force), in_force.source).removesuffix("\n"))
    else:
        render.show_policy(console(), in_force)


@policy_app.command("validate", epilog=epilog("policy validate"))
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The policy file to check.")],
    as_json: Json = False,
) -> None:
    """Check a policy file as a server would, and say what is wrong with it, where, and what is near.

    Warnings, on standard error, are about what works and may not be meant.
    """
    with refusing(as_json):
        found = load_policy(file)
    count = len(found.rules)
    odd = warnings(found)
    if as_json:
        print_json({"ok": True, "rules": count, "errors": [], "warnings": [each.to_dict() for each in odd]})
        return
    answer(f"{file}: ok, {count} rule{'' if count == 1 else 's'}")
    for each in odd:
        say(str(each))


@policy_app.command("schema", epilog=epilog("policy schema"))
def schema(
    as_json: Annotated[bool, typer.Option("--json", help="The output is JSON with or without this.")] = False,
) -> None:
    """Print the JSON Schema of the policy file format, for editors and generators."""
    print_json(policy_json_schema())


def _policy_dict(policy: Policy) -> dict[str, Any]:
    """The policy as one file could say it, with every key of ``use``, and where each rule is from."""
    return {
        "source": policy.source,
        "version": 1,
        "rules": [{**_rule_dict(rule), **_origin_dict(policy, rule.name)} for rule in policy.rules],
        "default": {**_chosen_dict(policy.default), **_origin_dict(policy, DEFAULT_RULE)},
    }


def _as_file(policy: Policy) -> dict[str, Any]:
    """`_policy_dict` without what no file says."""
    rules = [_rule_dict(rule) for rule in policy.rules]
    return {"version": 1, "rules": rules, "default": _chosen_dict(policy.default)}


def _rule_dict(rule: Rule) -> dict[str, Any]:
    when = {key: list(values) for key, values in rule.when.written().items()}
    unknown = {"unknown": list(rule.unknown)} if rule.unknown else {}
    return {"name": rule.name, "when": when, **unknown, **_chosen_dict(rule)}


def _chosen_dict(chosen: Rule | Default) -> dict[str, Any]:
    use = chosen.use
    written = {"backend": use.backend, "fence_forward": list(use.fence_forward), "options": dict(use.options)}
    unmeasured = {"unmeasured": dict(chosen.unmeasured)} if chosen.unmeasured else {}
    return {"use": written, "because": chosen.because, **unmeasured}


def _origin_dict(policy: Policy, rule: str) -> dict[str, Any]:
    origin = policy.origins[rule]
    return {"layer": origin.layer, "file": origin.source, "line": origin.line}


def _unmeasured(policy: Policy) -> list[dict[str, str]]:
    """What no measurement supports, in the order of the rules."""
    chosen: list[tuple[str, Rule | Default]] = [(rule.name, rule) for rule in policy.rules]
    return [
        {"rule": name, "layer": policy.layer(name), "path": path, "what": what}
        for name, each in [*chosen, (DEFAULT_RULE, policy.default)]
        for path, what in each.unmeasured.items()
    ]
