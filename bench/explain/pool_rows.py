"""The host pools of a server in rows for people, and what a decision costs of the bytes that it moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...io_backends.sglang.pools.host_pools import PROMPT_TOKENS, HostPool, share_of

TITLE = f"Host pools, and shares of what is written for a prompt of {PROMPT_TOKENS:,} tokens"
COLUMNS = ("pool", "bytes", "written by", "share", "why SGLang's own copy")


def pool_rows(pools: Sequence[HostPool]) -> list[tuple[str, str, str, str, str]]:
    """A row for each pool, as :data:`COLUMNS` says."""
    return [
        (
            pool.name,
            f"{pool.bytes:,} a {unit_of(pool)}",
            " or ".join(pool.writer),
            f"{pool.share:.0%}",
            pool.why or "",
        )
        for pool in pools
    ]


def unit_of(pool: HostPool) -> str:
    """What the bytes of a pool are of, in words."""
    unit = pool.record if pool.tokens in (None, 1) else f"{pool.record} of {pool.tokens} tokens"
    return unit if pool.window is None else f"{unit}, {pool.window} of a prompt"


def of_its_share(entries: Sequence[Mapping[str, Any]], pools: Sequence[HostPool]) -> list[dict[str, Any]]:
    """Entries of `policy.cost.cost`, none of them for bytes that SGLang's own copy moves.

    Args:
        entries: one a route.
        pools: of the server, with their writers; empty where they are not known.
    """
    if not pools:
        return [dict(entry) for entry in entries]
    found = []
    for entry in entries:
        share = share_of(pools, entry["backend"])
        if not share:
            text = f"{entry['backend']} writes no pool of this server: SGLang's own copy does, not measured"
            found.append({**entry, "kind": "unknown", "text": text, "source": None})
        elif share < 0.995:
            text = f"{share:.0%} of the bytes: {entry['text']}; SGLang's own copy of the rest: not measured"
            found.append({**entry, "text": text})
        else:
            found.append(dict(entry))
    return found
