"""Policy files that are written for somebody: one for this server, and one that says all of a policy."""

from __future__ import annotations

import io
import json
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from ...io_backends.registry import BACKENDS
from ...policy.decide import Decision
from ...policy.fact_table import CONDITIONS, FORWARDS_OF
from ...policy.facts import Facts
from ...policy.names import NO_SPECULATION
from ...policy.text import escaped

_PINNED = (
    "gpu_arch",
    "gpu_name",
    *FORWARDS_OF,
    "kv_kind",
    "mem_layout",
    "page_size",
    "row_bytes",
    "speculative",
)
"""Facts by which a rule tells one server from another."""

_NEEDED = ("gpu_arch", "prefill_attention_backend", "decode_attention_backend")
"""Without one of them a rule would be for servers that need other fences."""

_COLUMNS = 100


def for_server(decision: Decision, facts: Facts, *, file: str) -> str:
    """A commented policy file in which a rule pins what is decided for these facts, for its owner to change.

    Where it is not known which GPU or attention backend it is for, the rule is a comment.

    Args:
        decision: by the policy in force, with ``auto``.
        facts: what it was made from.
        file: what the file will be called, for the comments.
    """
    active = all(facts.value(name) is not None for name in _NEEDED)
    rules = "\n".join(_rule(decision, facts, at) for at in range(len(decision.routes)))
    if active:
        rules = f"rules:\n{rules}"
    else:
        missing = " and ".join(name for name in _NEEDED if facts.value(name) is None)
        rules = (
            _comment(
                f"{missing}: unknown here, so this rule is a comment. Give them to policy init, or fill in."
            )
            + "\nrules: []\n"
            + "\n".join(f"# {line}".rstrip() for line in rules.splitlines())
        )
    return f"{_head(file)}\nversion: 1\nextends: default\n\n{rules}\n"


def _head(file: str) -> str:
    return "\n".join(
        [
            _comment(
                f"Policy of sglang-hicache-io: which backend copies KV cache to the host, and which forwards "
                f"wait for it. Made by `hicache-io policy init`. Start the server with --hicache-io-policy "
                f"{escaped(file)}, or name this file in SGLANG_HICACHE_IO_POLICY."
            ),
            _comment(
                f"Check it after a change: hicache-io policy validate {escaped(file)}. All conditions and "
                "options: hicache-io policy schema, docs/policy.md."
            ),
            "#",
            _comment(
                "extends: default: these rules come before the shipped ones (and those of calibrate), which "
                "go on deciding where no rule here matches. The first match wins."
            ),
        ]
    )


def _rule(decision: Decision, facts: Facts, at: int) -> str:
    """The rule of route `at` of the decision."""
    route = decision.routes[at]
    name = "this-server" if len(decision.routes) == 1 else f"this-server-{at + 1}"
    when, unknown = _when(facts)
    lines = [f"  - name: {name}", "    when:              # all must hold; a list means any of"]
    for key, (value, why) in when.items():
        lines.append(f"      {f'{key}: {value}':<38} # {why}")
    for key, values in route.when.items():
        lines.append(f"      {f'{key}: {_flow(list(values))}':<38} # of one write")
    lines += [f"      {f'# {key}:':<38} # {why}" for key, why in unknown.items()]
    lines += [
        "    use:",
        f"      backend: {route.backend}   # {', '.join(BACKENDS)}",
        f"      fence_forward: {_flow(list(route.fence_forward))}   # that wait: extend, decode, or []",
    ]
    options = BACKENDS[route.backend].options or ()
    if route.options:
        lines.append(f"      options: {_flow(dict(route.options))}")
    elif options:
        lines.append(f"      # options: {{...}}   # {', '.join(each.name for each in options)}")
    because = f"as rule {route.rule} of the {route.layer} decides (hicache-io policy init): {route.because}"
    lines.append("    because: >-        # what you saw, where, on which hardware and versions")
    lines += textwrap.wrap(
        because, _COLUMNS, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
    )
    return "\n".join(lines)


def _when(facts: Facts) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """The conditions that the known facts meet, and the facts that are not known, each with its source."""
    known: dict[str, tuple[str, str]] = {}
    unknown: dict[str, str] = {}
    speculates = facts.value("speculative") not in (None, NO_SPECULATION)
    for name in _PINNED:
        spec, fact = CONDITIONS[name], facts[name]
        if spec.speculative_only and not speculates:
            continue
        why = escaped(fact.source)
        if fact.value is None:
            unknown[name] = why
        else:
            known[name] = (_flow(fact.value if spec.python_type is int else [fact.value]), why)
    return known, unknown


def whole(policy: Mapping[str, Any], source: str) -> str:
    """A policy as one file could say it, with every rule of every layer.

    Args:
        policy: version, rules and default, as `PolicyFile` reads them.
        source: where it is from, for the first line.
    """
    yaml = YAML()
    yaml.width = _COLUMNS
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump(_commented(policy), out)
    return f"{_comment(f'All rules in force: {escaped(source)}.')}\n{out.getvalue()}"


def _commented(value: Any) -> Any:
    if isinstance(value, Mapping):
        return CommentedMap({key: _commented(each) for key, each in value.items()})
    if isinstance(value, list) and not any(isinstance(each, Mapping) for each in value):
        row = CommentedSeq(value)
        row.fa.set_flow_style()
        return row
    return [_commented(each) for each in value] if isinstance(value, list) else value


def _flow(value: Any) -> str:
    """A value in one line of YAML: JSON, without the quotes that a plain word needs not."""
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_flow(each)}' for key, each in value.items())}}}"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*( [A-Za-z0-9_]+)*", value):
        return value if value.lower() not in _WORDS_OF_YAML else json.dumps(value)
    return json.dumps(value)


_WORDS_OF_YAML = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")


def _comment(text: str) -> str:
    return "\n".join(
        textwrap.wrap(text, _COLUMNS, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    )
