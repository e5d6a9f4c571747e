"""The place of a server's first rank, for code of SGLang that asks where it runs while it builds pools.

For a process that only predicts: its groups have a size and nobody in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

from .. import versions


@contextmanager
def first_rank(server_args: Any) -> Iterator[None]:
    """Sizes, ranks and groups that this release does not compute from the arguments alone.

    Args:
        server_args: SGLang's ``ServerArgs``, resolved and published.
    """
    from sglang.srt.runtime_context import get_parallel

    config = versions.view(server_args)
    sharded = getattr(config, "enable_kv_cache_sharding", False)
    values: dict[str, Any] = {}
    if versions.current().widths_of_groups:
        values = _place(config)
    if sharded:
        parallel = get_parallel()
        values |= _groups(attn_cp=parallel.attn_cp_size, attn_tp=parallel.attn_tp_size)
    with get_parallel().override(**values), _without_scratch() if sharded else nullcontext():
        yield


def _place(config: Any) -> dict[str, Any]:
    """As ``compute_dp_attention_world_info`` and ``ParallelContext`` of 0.5.18 have them."""
    dp, cp, dcp = versions.attention_dp(config), config.attn_cp_size or 1, getattr(config, "dcp_size", 1) or 1
    sizes = {
        "tp": config.tp_size,
        "pp": config.pp_size,
        "attn_dp": dp,
        "attn_cp": cp,
        "attn_tp": config.tp_size // dp // cp,
        "dcp": dcp,
        "attn_dcp": dcp,
    }
    return {
        "dcp_enabled": dcp > 1,
        **{f"{name}_size": size for name, size in sizes.items()},
        **{f"{name}_rank": 0 for name in sizes},
        **_groups(**{name: sizes[name] for name in ("tp", "pp", "attn_cp", "attn_tp", "dcp")}),
    }


def _groups(**sizes: int) -> dict[str, Any]:
    return {
        f"{name}_group": SimpleNamespace(world_size=size, rank_in_group=0) for name, size in sizes.items()
    }


@contextmanager
def _without_scratch() -> Iterator[None]:
    """Sharded rows: without memory to collect the pages of other ranks in, as long as eight contexts."""
    from sglang.srt.mem_cache.page_interleave_pool import PageInterleaveKVPoolMixin

    name = "_init_page_shard_state"
    before = getattr(PageInterleaveKVPoolMixin, name)
    setattr(PageInterleaveKVPoolMixin, name, _shard_state)
    try:
        yield
    finally:
        setattr(PageInterleaveKVPoolMixin, name, before)


def _shard_state(pool: Any, shard_spec: Any, shard_group: Any) -> None:
    from sglang.srt.mem_cache.page_interleave import PageInterleavePlacement

    pool.shard_spec, pool.shard_group = shard_spec, shard_group
    pool.shard_rank, pool.shard_size = shard_spec.shard_rank, shard_spec.shard_size
    pool.placement = PageInterleavePlacement(shard_spec)
