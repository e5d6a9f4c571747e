"""Decisions and policies for people, with rich. Nothing is cut off: what does not fit a line is wrapped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_hicache.io_backends.registry import UPSTREAM_NAMES
from sglang_hicache.policy.decide import Decision, match
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.fields import USES
from sglang_hicache.policy.load import SHIPPED
from sglang_hicache.policy.schema import Default, Policy, Rule

# What operators call the forwards; extend is SGLang's name for prefill, chunked or not.
_FORWARD_WORDS = {"extend": "prefill (extend)", "decode": "decode"}


def console() -> Console:
    """Standard output. Texts come from policy files, so no markup and no emoji codes are read in them."""
    return Console(markup=False, emoji=False, highlight=False)


def show_decision(
    out: Console, decision: Decision, policy: Policy, facts: Facts, notes: Sequence[tuple[str, str]] = ()
) -> None:
    """Print `decision`, which `policy` made from `facts`: what, why, which facts, and past which rules.

    `notes` are (name, text) of what must not be overlooked; they come first, like what is not decided yet.
    """
    rows = [("D2H backend", decision.backend), *notes]
    if note := _unknown_note(decision, policy, facts):
        rows.append(("Careful", note))
    rows += [
        ("Forwards", fence_sentence(decision)),
        ("Decided by", _decided_by(decision)),
        ("SGLang gets", _upstream_sentence(decision)),
    ]
    if decision.options:
        rows.append(("Options", _options(decision.options)))
    out.print(_pairs(rows))
    _heading(out, "Why")
    out.print(decision.because)
    _heading(out, "Facts")
    known = [(name, str(fact), fact.source) for name, fact in facts.items()]
    out.print(_table(("fact", "value", "from"), known))
    _heading(out, "Rules considered, the first match decides")
    if not decision.considered:
        out.print("None: the backend was given by hand, and no rule applies to it.")
        return
    marks = {True: "yes", False: "no"}
    considered = [(each.rule, marks[each.matched], each.reason) for each in decision.considered]
    out.print(_table(("rule", "matches", "because"), considered))


def show_policy(out: Console, policy: Policy) -> None:
    """Print every rule of `policy` in order, then its default."""
    count = len(policy.rules)
    rules = f"{count} rule{'' if count == 1 else 's'}"
    out.print(f"{policy.source}: {rules}, the first match decides", style="bold")
    for number, rule in enumerate(policy.rules, 1):
        _heading(out, f"{number}. {rule.name}")
        out.print(_pairs(_rule_rows(rule)))
    _heading(out, "default, when no rule matches")
    out.print(_pairs(_rule_rows(policy.default)))


def fence_sentence(decision: Decision) -> str:
    """Which forwards wait for what, in words an operator understands."""
    if decision.backend in UPSTREAM_NAMES:
        return "No fence of this project: SGLang's own behaviour, untouched."
    producer = "D2H waits, on the GPU, for the forward that writes the rows."
    if not decision.fence_forward:
        return f"No forward waits: compute and write-back overlap fully. {producer}"
    who = " and ".join(_FORWARD_WORDS[forward] for forward in decision.fence_forward)
    if decision.backend == "copy_engine":
        return (
            f"No forward waits for copy_engine, which has no work on the SMs; {who} would wait for a pool "
            f"that falls back to SGLang's own copy. {producer}"
        )
    what = {
        "hybrid": "for the last gather within GPU memory, not for the copy to the host",
        "fenced_kernel": "for the whole of the last transfer to the host",
    }.get(decision.backend, "for the backend's last work on the SMs")
    verb = "wait" if len(decision.fence_forward) > 1 else "waits"
    return f"{who[0].upper()}{who[1:]} {verb}, on the GPU, {what}. {producer}"


def _decided_by(decision: Decision) -> str:
    if decision.rule == "default":
        return f"the default of {_the(decision.policy)}: no rule matched"
    if not decision.considered:
        return f"{decision.rule}, given by hand"
    return f"rule {decision.rule} of {_the(decision.policy)}"


def _the(policy: str) -> str:
    return "the shipped policy" if policy == SHIPPED else policy


def _upstream_sentence(decision: Decision) -> str:
    if decision.backend in UPSTREAM_NAMES:
        return f"io backend {decision.upstream_io_backend}, as asked"
    return (
        f"io backend {decision.upstream_io_backend}, for host-to-device copies and for pools that "
        f"{decision.backend} does not support"
    )


def might_match(decision: Decision, policy: Policy, facts: Facts) -> dict[str, tuple[str, ...]]:
    """Rules that were passed over only because facts are unknown, with those facts."""
    passed = {each.rule for each in decision.considered if not each.matched}
    unknown = {rule.name: match(rule.when, facts).unknown for rule in policy.rules if rule.name in passed}
    return {name: missing for name, missing in unknown.items() if missing}


def _unknown_note(decision: Decision, policy: Policy, facts: Facts) -> str | None:
    """Which rules might still match, and the options that give what is missing."""
    unknown = might_match(decision, policy, facts)
    rules = list(unknown)
    if not rules:
        return None
    missing = dict.fromkeys(name for rule in rules for name in unknown[rule])
    both = {"prefill_attention_backend", "decode_attention_backend"} <= missing.keys()
    names = [("attention_backend" if both and "attention" in name else name) for name in missing]
    # device has no option: it follows from gpu_arch.
    options = dict.fromkeys(
        f"--{'gpu-arch' if name == 'device' else name.replace('_', '-')}" for name in names
    )
    return f"with more known, another rule might match ({', '.join(rules)}): give {', '.join(options)}."


def _rule_rows(rule: Rule | Default) -> Sequence[tuple[str, str]]:
    rows = []
    if isinstance(rule, Rule):
        written = rule.when.written()
        conditions = [f"{key}: {' or '.join(map(str, values))}" for key, values in written.items()]
        rows.append(("when", "\n".join(conditions) or "always"))
    rows.append(("use", rule.use.backend))
    fences = ", ".join(rule.use.fence_forward) or "none"
    if USES in rule.use.fence_forward:
        fences += " (the forwards that run a backend named in when)"
    rows.append(("forwards that wait", fences))
    if rule.use.options:
        rows.append(("options", _options(rule.use.options)))
    rows.append(("because", rule.because))
    return rows


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _heading(out: Console, title: str) -> None:
    out.print()
    out.print(title, style="bold")


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for position, title in enumerate(titles):
        # The first column holds names, which are looked for whole.
        table.add_column(title, overflow="fold", no_wrap=position == 0)
    for row in rows:
        table.add_row(*row)
    return table
