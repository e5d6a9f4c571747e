"""``hicache-io explain`` and ``hicache-io policy``: what would run here and why, and what a policy file says.

Exit status 0: good; 2: the input is wrong (an unknown name, a policy file that cannot be used), with one line
on standard error. Nothing here ends with 1: there is nothing to find wrong besides the input.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from sglang_hicache.policy import render, serving
from sglang_hicache.policy.decide import check_backend, decide
from sglang_hicache.policy.facts import FactValue, detect
from sglang_hicache.policy.json_schema import policy_json_schema
from sglang_hicache.policy.load import PolicyError, load_policy, policy_in_force
from sglang_hicache.policy.schema import Policy, Rule, Use
from sglang_hicache.policy.vocabulary import NameProblem, check_fact

policy_app = typer.Typer(help="Show or check a policy file.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PolicyPath = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="FILE",
        help="The policy file; without it SGLANG_HICACHE_IO_POLICY, else the shipped policy.",
        show_default=False,
    ),
]


def _fact(*names: str, metavar: str, help: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, show_default=False)


def explain(
    attention_backend: Annotated[
        str | None, _fact("--attention-backend", metavar="NAME", help="Backend of prefill and decode.")
    ] = None,
    prefill_attention_backend: Annotated[
        str | None, _fact("--prefill-attention-backend", metavar="NAME", help="Backend of prefill alone.")
    ] = None,
    decode_attention_backend: Annotated[
        str | None, _fact("--decode-attention-backend", metavar="NAME", help="Backend of decode alone.")
    ] = None,
    gpu_arch: Annotated[str | None, _fact("--gpu-arch", metavar="ARCH", help="Such as sm90, or cpu.")] = None,
    sgl_kernel: Annotated[
        str | None, _fact("--sgl-kernel", metavar="VERSION", help="Version of sglang-kernel.")
    ] = None,
    sglang: Annotated[str | None, _fact("--sglang", metavar="VERSION", help="Version of SGLang.")] = None,
    kv_kind: Annotated[str | None, _fact("--kv-kind", metavar="KIND", help="mha or mla.")] = None,
    mem_layout: Annotated[
        str | None,
        _fact("--mem-layout", metavar="LAYOUT", help="Layout of the host pool."),
    ] = None,
    page_size: Annotated[str | None, _fact("--page-size", metavar="TOKENS", help="Tokens in a page.")] = None,
    policy: PolicyPath = None,
    backend: Annotated[
        str, typer.Option("--backend", metavar="NAME", help="What --hicache-io-backend would say.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Say which backend copies KV cache to the host, which forwards wait for it, and why.

    What is not given is detected on this machine, and shown as detected.
    """
    typed = {
        "attention_backend": attention_backend,
        "prefill_attention_backend": prefill_attention_backend,
        "decode_attention_backend": decode_attention_backend,
        "gpu_arch": gpu_arch,
        "sgl_kernel": sgl_kernel,
        "sglang": sglang,
        "kv_kind": kv_kind,
        "mem_layout": mem_layout,
        "page_size": page_size,
    }
    given: dict[str, FactValue] = {}
    for name, text in typed.items():
        if text is not None:
            try:
                given[name] = check_fact(name, text)
            except NameProblem as error:
                _refuse(f"--{name.replace('_', '-')}: {error}")
    try:
        check_backend(backend)
    except NameProblem as error:
        _refuse(f"--backend: {error}")
    in_force = _policy(policy)
    facts = detect(given)
    decision = decide(in_force, facts, backend=backend)
    refused = serving.refusal(decision, facts, backend=backend)
    fallback = serving.fallback(decision, facts, backend=backend)
    if as_json:
        undecided = list(render.might_match(decision, in_force, facts))
        _print_json({**decision.to_dict(), "undecided": undecided, "refused": refused, "fallback": fallback})
    else:
        notes = [("A server", f"would refuse this: {refused}")] if refused else []
        notes += [("Pools", fallback)] if fallback else []
        render.show_decision(render.console(), decision, in_force, facts, notes)


@policy_app.command("show")
def show(policy: PolicyPath = None, as_json: Json = False) -> None:
    """Print a policy's rules in order, with the reason of each."""
    in_force = _policy(policy)
    if as_json:
        _print_json(_policy_dict(in_force))
    else:
        render.show_policy(render.console(), in_force)


@policy_app.command("validate")
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The policy file to check.")],
    as_json: Json = False,
) -> None:
    """Check a policy file as a server would, and say what is wrong with it, where, and what is near."""
    try:
        found = load_policy(file)
    except PolicyError as error:
        if as_json:
            _print_json({"ok": False, "errors": [error.to_dict()]})
            raise typer.Exit(2) from None
        _refuse(str(error))
    count = len(found.rules)
    if as_json:
        _print_json({"ok": True, "rules": count, "errors": []})
    else:
        typer.echo(f"{file}: ok, {count} rule{'' if count == 1 else 's'}")


@policy_app.command("schema")
def schema(
    as_json: Annotated[bool, typer.Option("--json", help="The output is JSON with or without this.")] = False,
) -> None:
    """Print the JSON Schema of the policy file format, for editors and generators."""
    _print_json(policy_json_schema())


def _policy(path: str | None) -> Policy:
    try:
        return policy_in_force(path)
    except PolicyError as error:
        _refuse(str(error))


def _policy_dict(policy: Policy) -> dict[str, Any]:
    """The policy as its file could say it, with every key of ``use`` written out, and with its source."""
    return {
        "source": policy.source,
        "version": policy.file.version,
        "rules": [
            {"name": rule.name, "when": _when_dict(rule), "use": _use_dict(rule.use), "because": rule.because}
            for rule in policy.rules
        ],
        "default": {"use": _use_dict(policy.default.use), "because": policy.default.because},
    }


def _when_dict(rule: Rule) -> dict[str, list[int | str]]:
    return {key: list(values) for key, values in rule.when.written().items()}


def _use_dict(use: Use) -> dict[str, Any]:
    return {"backend": use.backend, "fence_forward": list(use.fence_forward), "options": dict(use.options)}


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def _refuse(message: str) -> NoReturn:
    """End with exit status 2 and one line on standard error."""
    typer.echo(message, err=True)
    raise typer.Exit(2)
