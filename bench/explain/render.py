"""Decisions and policies for people, with rich. Nothing is cut off: what does not fit a line is wrapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from ...io_backends.sglang.diagnose import serving
from ...policy import sentences
from ...policy.decide import Considered
from ...policy.fact_spec import FactValue
from ...policy.format.layers import DEFAULT_RULE, Policy
from ...policy.format.schema import Default, Rule
from ...policy.format.validators import USES
from ...policy.match import word_of
from ...policy.terminal import styled
from ...policy.text import first_sentence
from ..layout import pairs, table
from . import pool_rows
from .explanation import Explanation
from .what_if import difference


def show_explanation(out: Console, shown: Explanation) -> None:
    """Print a decision: what, why, what it costs, from which facts, and past which rules."""
    out.print(pairs(_summary(shown)))
    _heading(out, "Why")
    _show_reasons(out, shown)
    _show_cost(out, shown)
    _show_pools(out, shown)
    _heading(out, "Facts")
    known = [(name, _fact(fact.value), fact.source) for name, fact in shown.facts.items()]
    out.print(table(out, ("fact", "value", "from"), known))
    _heading(out, "Rules considered, the first match decides")
    if not shown.decision.considered:
        out.print("None: the backend was given by hand, and no rule applies to it.")
        return
    for each in shown.decision.considered:
        out.print(styled(each.rule, (f" ({each.layer})", "dim")))
        out.print(pairs([(f"  {_mark(each)}", _reason(each))]))


def show_summary(out: Console, shown: Explanation) -> None:
    """Print a decision in about ten lines: what must not be overlooked, what waits, and why in a sentence."""
    decision, backends = shown.decision, shown.policy.backends
    rows = _warnings(shown)
    rows.insert(0, ("D2H backend", sentences.backend_sentence(decision)))
    rows.append(("Fences", sentences.fence_sentence(decision, backends)))
    rows.append(("Decided by", sentences.decided_by(decision, shown.policy)))
    rows.append(("Why", " ".join(dict.fromkeys(first_sentence(each.because) for each in decision.routes))))
    out.print(pairs(rows))


def show_what_if(out: Console, now: Explanation, then: Explanation, other: Mapping[str, FactValue]) -> None:
    """Print the decision `then`, with `other` facts, and what is not as `now`."""
    given = ", ".join(f"{name}={_fact(value)}" for name, value in other.items())
    _heading(out, f"What if {given}")
    out.print(pairs(_summary(then)))
    out.print()
    changes = difference(now.decision, then.decision)
    if not changes:
        out.print("Nothing changes: the same rules decide the same.")
        return
    out.print(table(out, ("what changes", "now", "then"), [_change(each) for each in changes]))
    if now.decision.because != then.decision.because:
        _heading(out, "Why, then")
        _show_reasons(out, then)


_MATRIX_COLUMNS = 120
"""A terminal that is narrower gets a list: the table would break its words."""


def show_matrix(out: Console, rows: Sequence[Sequence[str]]) -> None:
    """Print the table that `matrix.rows` makes."""
    titles, *body = rows
    if out.width >= _MATRIX_COLUMNS:
        # One name a line: a folded list would break names.
        out.print(table(out, titles, [(names.replace(", ", "\n"), *cells) for names, *cells in body]))
        return
    for names, *cells in body:
        _heading(out, names)
        archs: dict[str, list[str]] = {}
        for arch, cell in zip(titles[1:], cells, strict=True):
            archs.setdefault(cell, []).append(arch)
        out.print(pairs([(", ".join(which), cell) for cell, which in archs.items()]))


def show_policy(out: Console, policy: Policy) -> None:
    """Print every rule of `policy` in order, then its default."""
    count = len(policy.rules)
    rules = f"{count} rule{'' if count == 1 else 's'}"
    out.print(f"{policy.source}: {rules}, the first match decides", style="bold")
    for number, rule in enumerate(policy.rules, 1):
        _heading(out, f"{number}. {rule.name}")
        out.print(pairs(_rule_rows(policy, rule)))
    _heading(out, "default, when no rule matches")
    out.print(pairs(_rule_rows(policy, policy.default)))


def show_unmeasured(out: Console, policy: Policy, entries: Sequence[Mapping[str, str]]) -> None:
    """Print what no measurement supports."""
    if not entries:
        out.print(f"{policy.source}: no rule says that anything of it is unmeasured")
        return
    out.print(f"{policy.source}: what nobody measured", style="bold")
    rows = [(each["rule"], each["path"], each["what"]) for each in entries]
    out.print(table(out, ("rule", "part", "unmeasured"), rows))


def _summary(shown: Explanation) -> list[tuple[str, str]]:
    """What must not be overlooked first, then what is decided."""
    decision, backends = shown.decision, shown.policy.backends
    rows = [("D2H backend", sentences.backend_sentence(decision)), *_warnings(shown)]
    rows.append(("Fences", sentences.fence_sentence(decision, backends)))
    rows += list(sentences.forward_sentences(decision, shown.facts, backends).items())
    rows += [
        ("Decided by", sentences.decided_by(decision, shown.policy)),
        ("SGLang gets", sentences.upstream_sentence(decision)),
    ]
    if not shown.pools and (others := serving.other_pools(decision, shown.facts)):
        waiting = " and ".join(decision.fences()) or "no forward"
        rows.append(("SGLang copies", f"pools of {', '.join(others)} itself; {waiting} would wait for that"))
    if memory := sentences.memory_sentence(decision, backends):
        rows.append(("GPU memory", memory))
    options = {route.backend: route.options for route in decision.routes if route.options}
    rows += [("Options", f"{backend}: {_options(each)}") for backend, each in options.items()]
    return rows


def _warnings(shown: Explanation) -> list[tuple[str, str]]:
    """What must not be overlooked."""
    rows = []
    if shown.refused:
        rows.append(("A server", f"would refuse this: {shown.refused}"))
    if shown.fallback:
        rows.append(("Pools", shown.fallback))
    if shown.lost:
        rows.append(("Careful", sentences.lost_sentence(shown.lost, shown.policy)))
    rows += [("Careful", f"{name}: {doubt}") for name, doubt in shown.facts.doubts().items()]
    if note := shown.careful():
        rows.append(("Careful", note))
    return rows


def _show_reasons(out: Console, shown: Explanation) -> None:
    """The reason of each route, with its rule's name where there are several."""
    for route in shown.decision.routes:
        out.print(f"{route.rule}: {route.because}" if len(shown.decision.routes) > 1 else route.because)


def _show_cost(out: Console, shown: Explanation) -> None:
    entries = shown.cost()
    if not entries:
        return
    _heading(out, "What it costs")
    rows = [(each["backend"], each["kind"], each["text"]) for each in entries]
    out.print(table(out, ("backend", "", "one write"), rows))
    for source in dict.fromkeys(each["source"] for each in entries if each["source"]):
        out.print(f"Measured on: {source}")


def _show_pools(out: Console, shown: Explanation) -> None:
    if shown.pools:
        _heading(out, pool_rows.TITLE)
        out.print(table(out, pool_rows.COLUMNS, pool_rows.pool_rows(shown.pools)))
    elif shown.pools_unknown:
        _heading(out, "Host pools")
        out.print(f"Unknown: {shown.pools_unknown}")


def _fact(value: FactValue) -> str:
    return "unknown" if value is None else word_of(value)


def _mark(each: Considered) -> str:
    if not each.matched:
        return "no"
    return "some writes" if each.writes else "yes"


def _reason(each: Considered) -> str:
    return f"{each.reason}; {each.writes}" if each.writes else each.reason


def _change(each: Mapping[str, Any]) -> tuple[str, str, str]:
    return each["what"], _value(each["now"]), _value(each["then"])


def _value(value: Any) -> str:
    """A JSON value in a table."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(f"{route['backend']} by {route['rule']}" for route in value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return _options(value) or "none" if isinstance(value, dict) else str(value)


def _rule_rows(policy: Policy, rule: Rule | Default) -> list[tuple[str, str]]:
    name = rule.name if isinstance(rule, Rule) else DEFAULT_RULE
    rows = []
    if isinstance(rule, Rule):
        written = rule.when.written()
        conditions = [
            f"{key}: {' or '.join(word_of(value) for value in values)}" for key, values in written.items()
        ]
        rows.append(("when", "\n".join(conditions) or "always"))
        if rule.unknown:
            rows.append(("unknown counts as a match", ", ".join(sorted(rule.unknown_matches()))))
    rows.append(("use", rule.use.backend))
    fences = ", ".join(rule.use.fence_forward) or "none"
    if USES in rule.use.fence_forward:
        fences += " (the forwards that run a backend named in when)"
    rows.append(("forwards that wait", fences))
    if rule.use.options:
        rows.append(("options", _options(rule.use.options)))
    rows.append(("because", rule.because))
    if rule.unmeasured:
        rows.append(("unmeasured", "\n".join(f"{path}: {what}" for path, what in rule.unmeasured.items())))
    rows.append(("from", str(policy.origins[name])))
    return rows


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {word_of(value)}" for name, value in options.items())


def _heading(out: Console, title: str) -> None:
    out.print()
    out.print(title, style="bold")
