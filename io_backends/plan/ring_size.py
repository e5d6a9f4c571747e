"""How much device memory the staging ring takes where forwards wait for gathers: one step's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .chunks import LEAD_BYTES, RING_PARTS, STAGING_ALIGNMENT
from .geometry import PoolGeometry

DEFAULT_STAGING_MB = 256
"""MiB of device memory for the ring; the contract's example value. By arithmetic, a chunk of half of it
drains in 2.4 ms at 55 GB/s (H200): long against what the next costs the host (`hicache-io bench submit`)."""

FREE_SHARE = 8
"""At most one part in so many of the memory that is free once SGLang has allocated its pools and captured its
graphs. Nobody measured what forwards need of it at most; SGLang 0.5.23 itself reserves 1.5 MB for each token
of a step (8,192 tokens: 12 GB), of which this is an eighth, and a step's rows are a tenth (147 KB a token,
Qwen3-8B)."""

_MIB = 2**20


class StagingSize(NamedTuple):
    """Bytes of the ring, and why so many, for the operator."""

    nbytes: int
    because: str


def least_staging(pools: Sequence[PoolGeometry]) -> int:
    """Bytes of the smallest ring that works: two units of each pool fit, and a chunk of some use."""
    units = max(pool.unit_bytes for pool in pools)
    padding = 2 * STAGING_ALIGNMENT * max(len(pool.components) for pool in pools)
    return max(min(DEFAULT_STAGING_MB * _MIB, LEAD_BYTES), 2 * units + padding)


def staging_size(
    pools: Sequence[PoolGeometry], step_tokens: int, free: int | None, sharers: int = 1
) -> StagingSize:
    """The ring that takes the rows of one step in one gap, wherever in the ring the last one ended.

    What is left at the ring's end unused is shorter than the least chunk (:func:`~.chunks.least_chunk`), one
    part in :data:`~.chunks.RING_PARTS` of the ring or :data:`~.chunks.LEAD_BYTES`: that much more than a
    step's rows it must hold. Never less than :data:`DEFAULT_STAGING_MB`, but for memory.

    Args:
        pools: that are written through the ring; a step writes its tokens to each that is by token.
        step_tokens: of a step at most.
        free: bytes of device memory that are free; None where nobody counts them.
        sharers: rings that divide the share of it among them.
    """
    by_token = [pool for pool in pools if pool.by_token]
    rows = sum(-(-step_tokens // pool.index_step) * pool.bytes_per_token for pool in by_token)
    per_token = sum(pool.bytes_per_token / pool.index_step for pool in by_token)
    # A state is written for a prompt, not for a token: room for the two that a ring must hold.
    states = sum(2 * pool.unit_bytes for pool in pools if not pool.by_token)
    step = rows + states
    wanted = max(DEFAULT_STAGING_MB * _MIB, step + step // (RING_PARTS - 1) + LEAD_BYTES)
    because = f"the rows of a step of {step_tokens:,} tokens, {per_token:,.0f} bytes each"
    if states:
        because += f", and {states:,} bytes of states"
    if free is not None and wanted > (share := free // (FREE_SHARE * sharers)):
        wanted = max(share, least_staging(pools))
        because += (
            f", held to an eighth of the {free / _MIB:,.0f} MiB that were free: forwards wait for the link "
            "where they leave more rows than that (staging_mb sets another size)"
        )
    return StagingSize(-(-wanted // _MIB) * _MIB, because)
