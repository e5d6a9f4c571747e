"""How much host memory the host pools of a server take, by SGLang's own rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import versions
from ..pools import records
from ..pools.host_pools import HostPool
from .host_memory import Room

RESERVE = 10 * 2**30
"""Bytes that SGLang leaves to others of what is free (HICACHE_HOST_MEMORY_RESERVE_BYTES in
``pool_host/base.py``, the same in every release that is known)."""

_GB = 10**9
"""``--hicache-size`` counts in these (``pool_host/base.py``: ``host_size * 1e9``)."""


@dataclass(frozen=True)
class Sizing:
    """How large a server makes its host pools, by its resolved arguments.

    Attributes:
        size_gb: of one rank's, in GB; 0: by the ratio.
        ratio: host to device pool; None: SGLang decides it with the pools (a decode server).
        fraction: of the free memory of a machine, up to which SGLang lowers the ratio; None: it does not.
        ranks: of one replica.
        replicas: data-parallel ones, each with pools of its own.
        stages: of the pipeline, each with some of the layers.
        nodes: machines, with equally many ranks.
        max_tokens: that the device pool holds at most; None: what fits the GPU.
        gpu_fraction: of a GPU's memory that weights and device pool take; None: unknown.
        shared: SGLang divides what is free by the ranks of a replica on a machine before it compares.
        in_cgroups: SGLang takes limits of cgroups for what is free.
    """

    size_gb: float = 0
    ratio: float | None = None
    fraction: float | None = None
    ranks: int = 1
    replicas: int = 1
    stages: int = 1
    nodes: int = 1
    max_tokens: int | None = None
    gpu_fraction: float | None = None
    shared: bool = True
    in_cgroups: bool = True

    @property
    def sharing(self) -> int:
        """Ranks of one replica on one machine (SGLang's ``ranks_per_host``)."""
        return max(self.ranks // self.nodes, 1)

    @property
    def here(self) -> int:
        """All ranks of the server on one machine."""
        return max(self.ranks * self.replicas // self.nodes, 1)


def sizing(config: Any) -> Sizing:
    """From SGLang's resolved arguments; SGLang is imported."""
    release = versions.current()
    return Sizing(
        size_gb=config.hicache_size,
        ratio=config.hicache_ratio,
        fraction=getattr(config, "hicache_host_memory_fraction", None),
        ranks=config.tp_size * config.pp_size,
        replicas=1 if config.enable_dp_attention else config.dp_size,
        stages=config.pp_size,
        nodes=config.nnodes,
        max_tokens=config.max_total_tokens,
        gpu_fraction=config.mem_fraction_static,
        shared=release.host_memory_shared,
        in_cgroups=release.host_memory_in_cgroups,
    )


_OF_A_DRAFT = frozenset({"draft", "draft_indexer"})
"""Pools with as many tokens as the first has (``PoolName.DRAFT``, ``DRAFT_INDEXER``)."""

_SHARING_THE_SIZE = frozenset({"DeepSeekV4PagedHostPool", "MiniMaxM3Nvfp4MainKVPoolHost"})
"""First pools whose size is that of all (``_deepseek_v4_num_host_pages``,
``build_minimax_sparse_hicache_stack``)."""


class Need(NamedTuple):
    """Bytes of one rank's host pools; `largest`: of the largest, at least, as SGLang compares each alone."""

    bytes: int
    largest: int


def by_size(asked: Sizing, pools: Sequence[HostPool]) -> Need | None:
    """What one rank's pools take at least by ``--hicache-size``; None: they are sized by the ratio.

    Pools of states and of a sliding window get a part of that size (``_split_hicache_size`` in
    ``hybrid_pool_assembler.py``); one that follows the first pool's indices comes on top, with as many tokens
    as that has (``pool_host/dsa.py``), and so do a draft's own pools (``build_full_draft_pools``). The parts
    of DeepSeek-V4 and the NVFP4 pools of MiniMax-M3 share the size, drafts included. Where pools have parts,
    those that follow are not counted: how many tokens the first has is known with the device pools.
    """
    if asked.size_gb <= 0:
        return None
    size = int(asked.size_gb * _GB)
    if pools and pools[0].kind in _SHARING_THE_SIZE:
        return Need(size, 0)
    apart = sum(_has_a_part(pool) for pool in pools[1:])
    if not pools or apart:
        return Need(size, size // (apart + 1) if pools else 0)
    first = pools[0]
    tokens = size * (first.tokens or 0) // first.bytes
    more = sum(
        tokens * pool.bytes // (pool.tokens or 1)
        for pool in pools[1:]
        if pool.kind in records.FOLLOWING or pool.name in _OF_A_DRAFT
    )
    return Need(size + more, size)


def refused(asked: Sizing, need: Need, room: Room) -> bool:
    """Whether SGLang refuses to start where so much is free."""
    free = room.within if asked.in_cgroups else room.machine
    return need.largest > (free - RESERVE) // (asked.sharing if asked.shared else 1)


def fitting(asked: Sizing, need: Need, room: Room) -> int:
    """The largest ``--hicache-size`` with which all ranks have room, and SGLang its reserve.

    Args:
        asked: with another size.
        need: by that.
        room: for all ranks.
    """
    each = max(0, room.within - RESERVE) // asked.here
    return int(each * asked.size_gb // need.bytes)


def _has_a_part(pool: HostPool) -> bool:
    return pool.tokens is None or "swa" in pool.name.lower()


def by_ratio(asked: Sizing, pools: Sequence[HostPool], gpu_bytes: int | None) -> int | None:
    """Bytes that one rank's pools take at most by ``--hicache-ratio``; None: unknown.

    The device pool is what the weights leave of the GPU's static memory, or what ``--max-total-tokens`` says.
    """
    if asked.ratio is None:
        return None
    bounds = []
    if gpu_bytes is not None and asked.gpu_fraction is not None:
        bounds.append(asked.gpu_fraction * gpu_bytes)
    if asked.max_tokens is not None and pools and not any(map(_has_a_part, pools)):
        bounds.append(sum(asked.max_tokens * pool.bytes / (pool.tokens or 1) for pool in pools))
    return int(asked.ratio * min(bounds)) if bounds else None
