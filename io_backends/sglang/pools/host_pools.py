"""The host pools of a server, each with who writes it and its share of what is written.

The same list is made of a built scheduler's pools and of the pools that a command line would have
(:mod:`~.prediction`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from ....policy.backend_spec import spec_of
from ....policy.decide import Decision
from ...registry import BACKENDS
from . import records
from .errors import ShortHostRowsError, UnsupportedPoolError
from .geometry import (
    TRANSLATED,
    WITHOUT_BYTES,
    describe_pool,
    refuse_lost_index,
    refuse_lost_scales,
    translated,
)

PROMPT_TOKENS = 8192
"""Tokens of the prompt that shares are of, written once and as one node of the radix tree: every token's rows
and index pages, a window of the sliding layers, one state. SGLang's default chunk of a prefill on GPUs with
60 GiB and more. A longer prompt gives pools of states and windows less of a share."""

SGLANG = "SGLang"
"""Stands for SGLang's own copy where a writer is named."""


@dataclass(frozen=True)
class HostPool:
    """One host pool.

    Attributes:
        name: SGLang's (``kv``, ``swa``, ``mamba``, ``indexer``, ...).
        kind: its class in SGLang.
        layout: of its host memory, as backends are asked for it.
        kv_kind: what it holds, likewise (`PoolGeometry.kv_kind`); None: no backend is given it.
        record: what an index moves: ``token``, ``page`` or ``state``; ``row``, of which each rank of decode
            context parallelism or of sharded KV has its own.
        bytes: of one record in all layers.
        tokens: that a record stands for; None: a state stands for a whole prefix.
        window: tokens that are written of any prompt at most; None: all.
        undescribed: why no backend is given it, or None.
        index_step: indices that stand for one of its rows together (`PoolGeometry.index_step`).
        share: of all bytes that are written for a prompt of :data:`PROMPT_TOKENS`, 0 to 1.
        writer: the backends that write it, or :data:`SGLANG`.
        why: why SGLang's own copy writes it, in part or always; None: it does not.
    """

    name: str
    kind: str
    layout: str
    kv_kind: str | None
    record: str
    bytes: int
    tokens: int | None
    window: int | None
    undescribed: str | None
    index_step: int = 1
    share: float = 0.0
    writer: tuple[str, ...] = (SGLANG,)
    why: str | None = None

    @property
    def ours(self) -> bool:
        """Whether any backend writes it."""
        return self.writer != (SGLANG,)

    def written(self, prompt: int = PROMPT_TOKENS) -> int:
        """Bytes of it that are written for a prompt of so many tokens."""
        if self.tokens is None:
            return self.bytes
        tokens = prompt if self.window is None else min(prompt, self.window)
        return -(-tokens // self.tokens) * self.bytes

    def in_words(self) -> str:
        """One line for a log."""
        unit = self.record if self.tokens in (None, 1) else f"{self.record} of {self.tokens} tokens"
        line = f"{self.name} {self.bytes:,} bytes a {unit}, {self.share:.0%} by {' and '.join(self.writer)}"
        return f"{line} ({self.why})" if self.why else line

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "writer": list(self.writer), "share": round(self.share, 4)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "writer": tuple(data["writer"])})


def host_pools(
    entries: Sequence[tuple[str, Any, Any]], window: int | None = None, cache: Any = None
) -> tuple[HostPool, ...]:
    """The pools of a group, first the one of keys and values, with their shares; nobody writes them yet.

    Args:
        entries: SGLang's name, host pool and device pool of each.
        window: tokens of the model's sliding window.
        cache: the device cache that they are of, as a whole; None: not known.

    Raises:
        ShortHostRowsError: a pool cannot hold what it is for, or there is none for something.
    """
    refuse_lost_index(cache, {type(pool).__name__ for _, pool, _ in entries})
    pools = [
        _pool(name, pool, device, window)
        for name, pool, device in entries
        if type(pool).__name__ not in WITHOUT_BYTES
    ]
    _refuse_short_sidecars(entries)
    total = sum(pool.written() for pool in pools) or 1
    return tuple(replace(pool, share=pool.written() / total) for pool in pools)


def _pool(name: str, pool: Any, device_pool: Any, window: int | None) -> HostPool:
    page = int(getattr(pool, "page_size", 1))
    kind = type(pool).__name__
    refuse_lost_scales(name, pool, device_pool)
    undescribed, kv_kind, layout, step = None, None, str(getattr(pool, "layout", "unknown")), 1
    try:
        geometry = describe_pool(pool)
        if translated(device_pool):
            raise UnsupportedPoolError(TRANSLATED)
        layout, kv_kind, step = geometry.layout, geometry.kv_kind, geometry.index_step
    except ShortHostRowsError as error:
        raise ShortHostRowsError(f"pool {name}, {error}") from error
    except UnsupportedPoolError as error:
        undescribed = str(error)
    record, nbytes, tokens = _record_of(pool)
    return HostPool(
        name=name,
        kind=kind,
        layout=layout,
        kv_kind=kv_kind,
        record=record,
        bytes=nbytes,
        tokens=tokens,
        window=-(-window // page) * page if window is not None and _of_a_window(name, kind) else None,
        undescribed=undescribed,
        index_step=step,
    )


def _of_a_window(name: str, kind: str) -> bool:
    """Whether it is given the indices of sliding layers, of which a write has one window."""
    return "swa" in name.lower() or kind == "DeepSeekV4StateHostPool"


def _record_of(pool: Any) -> tuple[str, int, int | None]:
    """:attr:`HostPool.record`, its bytes, and the tokens that it stands for."""
    page, kind = int(getattr(pool, "page_size", 1)), type(pool).__name__
    per_token = int(getattr(pool, "size_per_token", 0))
    if kind in records.STATES:
        return "state", per_token, None
    if hasattr(pool, "item_bytes"):  # the pages of DeepSeek-V4 and QSA: of one layer
        return "page", int(pool.item_bytes) * int(pool.layer_num), page
    if hasattr(pool, "state_page_bytes"):  # DeepSeek-V4's states: of a page and layer
        return "page", int(pool.state_page_bytes) * int(pool.layer_num), page
    if kind == "DSAIndexerPoolHost":
        return "page", per_token * page, page
    ranks = int(getattr(pool, "dcp_size", 1)) * int(getattr(pool, "shard_size", 1))
    return "token" if ranks == 1 else "row", per_token, ranks


def bytes_of(pool: Any, indices: int) -> int:
    """Bytes that so many indices of a host pool move, in all layers."""
    _, nbytes, tokens = _record_of(pool)
    return -(-indices // (tokens or 1)) * nbytes


def _refuse_short_sidecars(entries: Sequence[tuple[str, Any, Any]]) -> None:
    """A pool that follows the first one's indices holds as many records, where ranks share that one's rows.

    With decode context parallelism an index stands for one rank's row in the first pool alone
    (``maybe_dcp_kernel_indices`` in SGLang's ``pool_host/mla.py``; ``dsa.py`` has no such step).
    """
    if not entries or getattr(entries[0][1], "dcp_size", 1) == 1:
        return
    anchor_name, anchor, _ = entries[0]
    indices = int(anchor.logical_size)
    for name, pool, _ in entries[1:]:
        if type(pool).__name__ in records.FOLLOWING and int(pool.size) < indices:
            raise ShortHostRowsError(
                f"pool {name} holds {int(pool.size):,} tokens and follows the indices of pool {anchor_name}, "
                f"which go up to {indices:,}: what is written past its end would be lost"
            )


Reason = Callable[[HostPool, str], str | None]
"""Why the backend of a name does not serve a pool, in a sentence with that name; None if it does."""


def by_spec(pool: HostPool, backend: str) -> str | None:
    """A :data:`Reason` from what is known of backends without making one."""
    reason = spec_of(BACKENDS, backend).cannot_serve(pool.layout, pool.kv_kind, pool.index_step)
    return None if reason is None else f"{backend} {reason}"


def assigned(pools: Sequence[HostPool], decision: Decision, reason: Reason = by_spec) -> tuple[HostPool, ...]:
    """The same pools, each with who writes it by a decision."""
    names = tuple(dict.fromkeys(route.backend for route in decision.routes))
    return tuple(_assigned(pool, names, reason) for pool in pools)


def _assigned(pool: HostPool, names: Sequence[str], reason: Reason) -> HostPool:
    if pool.undescribed is not None:
        return replace(pool, writer=(SGLANG,), why=pool.undescribed)
    reasons = {name: reason(pool, name) for name in names}
    writers = tuple(name for name, why in reasons.items() if why is None)
    missing = dict.fromkeys(why for why in reasons.values() if why is not None)
    return replace(pool, writer=writers or (SGLANG,), why="; ".join(missing) or None)


def share_of(pools: Sequence[HostPool], backend: str | None = None) -> float:
    """Share of what is written that one backend writes, or any; 0 to 1."""
    return sum(pool.share for pool in pools if (pool.ours if backend is None else backend in pool.writer))
