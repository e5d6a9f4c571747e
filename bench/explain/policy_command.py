"""``hicache-io policy``: what a policy file says, and whether it can be used.

Exit status as for ``explain``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...io_backends.policy_files import load_policy, policy_in_force, policy_json_schema
from ...policy.format.layers import DEFAULT_RULE, Policy
from ...policy.format.lint import warnings
from ...policy.format.schema import Default, Rule
from ...policy.names import NameProblem
from ...policy.terminal import console
from ..json_option import Json
from . import render
from .shared import PolicyPath, print_json, refusing

if TYPE_CHECKING:
    pass

policy_app = typer.Typer(help="Show or check a policy file.", no_args_is_help=True)


@policy_app.command("show")
def show(
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="The policy file, as --policy.", show_default=False)
    ] = None,
    policy: PolicyPath = None,
    unmeasured: Annotated[
        bool, typer.Option("--unmeasured", help="Only what no measurement supports, rule by rule.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print a policy's rules in order, with the reason of each and where it comes from."""
    with refusing(as_json):
        if file is not None and policy is not None:
            raise NameProblem("the policy file is named twice: FILE and --policy")
        in_force = policy_in_force(file if file is not None else policy)
    if unmeasured:
        found = _unmeasured(in_force)
        if as_json:
            print_json({"source": in_force.source, "unmeasured": found})
        else:
            render.show_unmeasured(console(), in_force, found)
    elif as_json:
        print_json(_policy_dict(in_force))
    else:
        render.show_policy(console(), in_force)


@policy_app.command("validate")
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
    typer.echo(f"{file}: ok, {count} rule{'' if count == 1 else 's'}")
    for each in odd:
        typer.echo(str(each), err=True)


@policy_app.command("schema")
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
