"""Policy files that are written for somebody: one for this server, and one that says all of a policy."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ...io_backends.registry import BACKENDS
from ...policy.decide import Decision
from ...policy.fact_table import CONDITIONS, FORWARDS_OF
from ...policy.facts import Facts
from ...policy.names import NO_SPECULATION
from ...policy.text import escaped, wrapped
from ..policy_yaml import COLUMNS, as_yaml

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

_COMMENTS_AT = 45
"""Column of the comments beside conditions."""
_ROOM_FOR_COMMENT = 30


def for_server(decision: Decision, facts: Facts, *, file: str) -> str:
    """A commented policy file in which a rule pins what is decided for these facts, for its owner to change.

    Where it is not known which GPU or attention backend it is for, the rule is a comment.

    Args:
        decision: by the policy in force, with ``auto``.
        facts: what it was made from.
        file: what the file will be called, for the comments.
    """
    active = all(facts.value(name) is not None for name in _NEEDED)
    columns = COLUMNS if active else COLUMNS - len("# ")
    rules = "\n".join(_rule(decision, facts, at, columns) for at in range(len(decision.routes)))
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


def _rule(decision: Decision, facts: Facts, at: int, columns: int) -> str:
    """The rule of route `at` of the decision, in lines of `columns`."""
    route = decision.routes[at]
    name = "this-server" if len(decision.routes) == 1 else f"this-server-{at + 1}"
    when, unknown = _when(facts)
    lines = [f"  - name: {name}", "    when:              # all must hold; a list means any of"]
    for key, (value, why) in when.items():
        lines += _beside(f"      {key}: {value}", why, columns)
    for key, values in route.when.items():
        lines += _beside(f"      {key}: {_flow(list(values))}", "of one write", columns)
    for key, why in unknown.items():
        lines += _beside(f"      # {key}:", why, columns)
    lines += [
        "    use:",
        *_beside(f"      backend: {route.backend}", ", ".join(BACKENDS), columns, at=0),
        f"      fence_forward: {_flow(list(route.fence_forward))}   # that wait: extend, decode, or []",
    ]
    options = BACKENDS[route.backend].options or ()
    if route.options:
        lines.append(f"      options: {_flow(dict(route.options))}")
    elif options:
        lines += _beside("      # options: {...}", ", ".join(each.name for each in options), columns, at=0)
    because = f"as rule {route.rule} of the {route.layer} decides (hicache-io policy init): {route.because}"
    lines.append("    because: >-        # what you saw, where, on which hardware and versions")
    lines += wrapped(because, columns, " " * 6)
    return "\n".join(lines)


def _beside(written: str, comment: str, columns: int, *, at: int = _COMMENTS_AT) -> list[str]:
    """A line of YAML with a comment that begins at column `at`, or a little past the line, and goes on below;
    above it where that leaves no room.
    """
    left = f"{written:<{at}}" if len(written) < at else f"{written}   "
    if columns - len(left) < _ROOM_FOR_COMMENT and len(left) + len("# ") + len(comment) > columns:
        return [*wrapped(comment, columns, " " * 6 + "# "), written]
    first, *more = wrapped(comment, columns - len(left), "# ") or ["#"]
    return [left + first, *(" " * len(left) + line for line in more)]


def _when(facts: Facts) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """The conditions that the known facts meet, and the facts that are not known, each with its source."""
    known: dict[str, tuple[str, str]] = {}
    unknown: dict[str, str] = {}
    speculates = facts.value("speculative") not in (None, NO_SPECULATION)
    for name in _PINNED:
        spec, fact = CONDITIONS[name], facts[name]
        if spec.speculative_only and not speculates:
            continue
        why = "; ".join(filter(None, (escaped(fact.source), spec.doubt(fact.value))))
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
    return f"{_comment(f'All rules in force: {escaped(source)}.')}\n{as_yaml(policy)}"


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
    return "\n".join(wrapped(text, COLUMNS, "# "))
