"""How much host memory a server's pools take, by SGLang's own rules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repository import VERSIONS

from sglang_hicache.io_backends.sglang import versions
from sglang_hicache.io_backends.sglang.diagnose import pool_sizes
from sglang_hicache.io_backends.sglang.diagnose.host_memory import Room
from sglang_hicache.io_backends.sglang.diagnose.pool_sizes import RESERVE, Need, Sizing
from sglang_hicache.io_backends.sglang.pools.host_pools import HostPool

GB, GIB = 10**9, 2**30


def pool(name: str, kind: str, nbytes: int, tokens: int | None = 1) -> HostPool:
    return HostPool(name, kind, "page_first", None, "token", nbytes, tokens, None, None)


KV = pool("kv", "MLATokenToKVPoolHost", 1000)
INDEXER = pool("indexer", "DSAIndexerPoolHost", 64 * 250, 64)
STATES = pool("mamba", "MambaPoolHost", 10**6, None)
DRAFT = pool("draft", "MHATokenToKVPoolHost", 400)
PAGED = pool("swa", "DeepSeekV4PagedHostPool", 64 * 400, 64)
WINDOW = pool("swa", "MHATokenToKVPoolHost", 400)


@pytest.mark.parametrize(
    ("pools", "expected"),
    [
        ([], Need(50 * GB, 0)),  # which pools there are is unknown
        ([KV], Need(50 * GB, 50 * GB)),
        ([KV, INDEXER], Need(62_500_000_000, 50 * GB)),
        ([KV, DRAFT], Need(70 * GB, 50 * GB)),
        ([PAGED, PAGED], Need(50 * GB, 0)),
        ([KV, WINDOW], Need(50 * GB, 25 * GB)),
        ([KV, WINDOW, STATES], Need(50 * GB, 50 * GB // 3)),
    ],
)
def test_what_one_rank_takes_by_its_size(pools: list[HostPool], expected: Need) -> None:
    assert pool_sizes.by_size(Sizing(size_gb=50), pools) == expected


def test_the_largest_is_not_known_where_no_pool_is() -> None:
    assert not pool_sizes.refused(Sizing(), Need(10**15, 0), Room(20 * GIB, 20 * GIB))


def test_without_a_size_the_ratio_counts() -> None:
    asked = Sizing(ratio=2.0, gpu_fraction=0.5)
    assert pool_sizes.by_size(asked, [KV]) is None
    assert pool_sizes.by_ratio(asked, [KV], None) is None
    assert pool_sizes.by_ratio(asked, [KV], 80 * GIB) == 80 * GIB
    limited = Sizing(ratio=2.0, gpu_fraction=0.5, max_tokens=1000)
    assert pool_sizes.by_ratio(limited, [KV, INDEXER], 80 * GIB) == 2 * 1000 * 1250
    assert pool_sizes.by_ratio(limited, [KV, STATES], None) is None, "states are not counted by tokens"
    assert pool_sizes.by_ratio(limited, [], None) is None
    assert pool_sizes.by_ratio(Sizing(gpu_fraction=0.5), [KV], 80 * GIB) is None


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "attention_dp", "nodes", "sharing", "here"),
    [
        (1, 1, 1, False, 1, 1, 1),
        (8, 1, 1, False, 1, 8, 8),
        (8, 2, 1, False, 2, 8, 8),
        (2, 1, 4, False, 1, 2, 8),
        (8, 1, 8, True, 1, 8, 8),
        (16, 1, 16, True, 2, 8, 8),
    ],
)
def test_ranks_on_one_machine(
    tp: int, pp: int, dp: int, attention_dp: bool, nodes: int, sharing: int, here: int
) -> None:
    config = SimpleNamespace(
        hicache_size=0,
        hicache_ratio=2.0,
        tp_size=tp,
        pp_size=pp,
        dp_size=dp,
        enable_dp_attention=attention_dp,
        nnodes=nodes,
        max_total_tokens=None,
        mem_fraction_static=0.8,
    )
    found = pool_sizes.sizing(config)
    assert (found.sharing, found.here, found.stages, found.fraction) == (sharing, here, pp, None)


def test_what_releases_compare_with() -> None:
    for version in versions.SUPPORTED:
        release = versions.release_of(version)
        cache = VERSIONS / version / "sglang/srt/mem_cache"
        base = (cache / "pool_host/base.py").read_text()
        assert release.host_memory_shared == ("ranks_per_host" in base), version
        assert release.host_memory_in_cgroups == (cache / "host_memory.py").exists(), version
        assert "HICACHE_HOST_MEMORY_RESERVE_BYTES: int = 10 * (1024**3)" in base, version
        assert "int(host_size * 1e9 // self.size_per_token)" in base, version


asked = st.builds(
    Sizing,
    size_gb=st.integers(1, 4000),
    ranks=st.integers(1, 64),
    replicas=st.integers(1, 8),
    nodes=st.integers(1, 8),
    shared=st.booleans(),
    in_cgroups=st.booleans(),
)
rooms = st.tuples(st.integers(0, 4096), st.integers(0, 4096)).map(
    lambda each: Room(max(each) * GIB, min(each) * GIB)
)
pools = st.lists(st.sampled_from([INDEXER, WINDOW, STATES]), max_size=3).map(lambda more: [KV, *more])


@given(asked=asked, pools=pools, room=rooms)
def test_the_size_that_fits_is_the_largest(asked: Sizing, pools: list[HostPool], room: Room) -> None:
    from dataclasses import replace

    need = pool_sizes.by_size(asked, pools)
    assert need is not None
    assert need.bytes >= need.largest > 0
    assert need.bytes >= asked.size_gb * GB
    fits = pool_sizes.fitting(asked, need, room)
    if fits:
        smaller = replace(asked, size_gb=fits)
        its = pool_sizes.by_size(smaller, pools)
        assert its is not None
        assert its.bytes * asked.here + RESERVE <= room.within
        assert not pool_sizes.refused(smaller, its, room)
    above = pool_sizes.by_size(replace(asked, size_gb=fits + 1), pools)
    assert above is not None
    # What follows the first pool is counted in whole tokens: one for each rank at most.
    assert (above.bytes + 1250) * asked.here + RESERVE > room.within


@given(asked=asked, room=rooms, size=st.integers(1, 4096))
def test_sglangs_refusal(asked: Sizing, room: Room, size: int) -> None:
    """``requested_bytes > host_memory_budget_bytes(...)`` of its pools."""
    free = (room.within if asked.in_cgroups else room.machine) - 10 * GIB
    budget = free // max(asked.ranks // asked.nodes, 1) if asked.shared else free
    assert pool_sizes.refused(asked, Need(size * GIB, size * GIB), room) == (size * GIB > budget)


def test_sglangs_own_pools_take_that_much() -> None:
    """What `HostKVCache` of the installed SGLang makes of a size, without its memory."""
    from sglang.srt.mem_cache.pool_host import base

    class Pool(base.HostKVCache):
        def __init__(self, **more: Any) -> None:
            shared = {"dtype": None, "start_layer": 0, "end_layer": 1, "layout": "page_first"}
            super().__init__(**shared, pin_memory=False, device="cpu", is_dummy=True, **more)

    Pool.__abstractmethods__ = frozenset()  # type: ignore[misc]
    Pool.clear = lambda self: None  # type: ignore[method-assign]
    for size, page in ((1, 1), (3, 64), (50, 64)):
        made = Pool(
            device_capacity_tokens=100,
            size_per_token=KV.bytes,
            host_to_device_ratio=2.0,
            host_size=size,
            page_size=page,
        )
        need = pool_sizes.by_size(Sizing(size_gb=size), [KV])
        assert need is not None
        assert need.bytes <= made.size * made.size_per_token <= need.bytes + 2 * page * KV.bytes
