"""The command that starts the server which was explained."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from ...policy.fact_table import CONDITIONS
from ...policy.facts import GIVEN, Facts

_BACKEND, _POLICY = "--hicache-io-backend", "--hicache-io-policy"


def of_facts(facts: Facts, *, backend: str, policy: str | None) -> list[str]:
    """The words that start a server with the facts that a user gave."""
    given = {name: fact.value for name, fact in facts.items() if fact.source == GIVEN}
    prefill, decode = given.get("prefill_attention_backend"), given.get("decode_attention_backend")
    if prefill is not None and prefill == decode:
        given = {"attention_backend": prefill, **given}
        del given["prefill_attention_backend"], given["decode_attention_backend"]
        if given.get("draft_attention_backend") == prefill:  # follows it
            del given["draft_attention_backend"]
    words = ["sglang", "serve", "--model-path", "MODEL"]
    for name, spec in CONDITIONS.items():
        if name in given:
            words += spec.launch_words(given[name])
    if "--enable-hierarchical-cache" not in words:
        words.append("--enable-hierarchical-cache")
    return with_ours(words, backend=backend, policy=policy)


def of_server(
    argv: Sequence[str],
    variables: Mapping[str, str | None],
    *,
    backend: str | None,
    policy: str | None,
    program: str = "",
) -> list[str]:
    """The words that start a server which was given as a command line, with another backend or policy.

    Args:
        program: a module that starts it instead of ``sglang serve``.
    """
    assigned = [f"{name}={value}" for name, value in variables.items() if value is not None]
    start = ["python", "-m", program] if program else ["sglang", "serve"]
    return with_ours([*assigned, *start, *argv], backend=backend, policy=policy)


def with_ours(words: Sequence[str], *, backend: str | None, policy: str | None) -> list[str]:
    """`words` with these values of this project's options instead of those that are there; None: as it is."""
    found = list(words)
    for option, value in ((_BACKEND, backend), (_POLICY, policy)):
        if value is None:
            continue
        kept: list[str] = []
        skip = False
        for word in found:
            if not skip and word != option and not word.startswith(f"{option}="):
                kept.append(word)
            skip = word == option
        found = [*kept, option, value]
    return found


def folded(words: Sequence[str], columns: int) -> str:
    """`words` for a shell, in lines of at most `columns` characters where a word lets them."""
    pieces: list[str] = []
    for word in map(_quoted, words):
        # An option and its value stay together.
        value = pieces and pieces[-1].startswith("--") and " " not in pieces[-1] and not word.startswith("-")
        if value:
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    lines = [""]
    for piece in pieces:
        room = columns - 2
        if lines[-1] and len(lines[-1]) + 1 + len(piece) > room:
            lines.append(f"  {piece}")
        else:
            lines[-1] += f" {piece}" if lines[-1] else piece
    return " \\\n".join(lines)


def _quoted(word: str) -> str:
    name, equals, value = word.partition("=")
    if equals and name.isidentifier():
        return f"{name}={shlex.quote(value)}"
    return shlex.quote(word)
