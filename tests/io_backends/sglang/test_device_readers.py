"""Who reads rows of the device pool, in every supported SGLang: all that goes to the host passes the hook.

The hook is on ``L2TransferEngine.submit_device_to_host``. Here the published wheels are read as source, and
each function that copies device rows away, or takes the pool's memory as such, is one that was looked at. A
new one fails the test: read it, and write down what it is.
"""

from __future__ import annotations

import ast
from functools import cache

import pytest
from repository import VERSIONS

from sglang_hicache.io_backends.sglang.versions import SUPPORTED

WHEELS = VERSIONS

ELSEWHERE = (
    "layers/",  # forwards
    "models/",
    "hardware_backend/",  # not CUDA
    "kv_canary/",  # a debugging aid that patches pools
    "mem_cache/pool_host/",  # the host pools: what they do is asked for by those below
    "mem_cache/memory_pool_host.py",
)

COPIES = ("submit_device_to_host", "backup_from_device", "get_cpu_copy", "transfer_kv", "transfer_hicache")
"""How names of functions that copy rows of a device pool begin (``jit_`` left out)."""

MEMORY = (
    "k_buffer",
    "v_buffer",
    "kv_buffer",
    "index_k_with_scale_buffer",
    "get_contiguous_buf_infos",
    "get_state_buf_infos",
    "get_device_pool_infos",
    "get_kv_buffer",
    "get_key_buffer",
    "get_value_buffer",
    "get_index_k_with_scale_buffer",
)
"""Attributes that give a pool's memory: whoever has it can copy from it by means of his own."""

HOOKED = "asks the engine: passes the hook"
WAITS = (
    "the pools' own copy to a plain tensor (retraction with cpu_tensor): the host waits for the whole device "
    "before it and behind it, so nothing runs beside it"
)
HISPARSE = (
    "PAST THE HOOK: --enable-hisparse copies by SGLang's kernel from streams of its own, to a host pool of "
    "its own. Its copies wait for the forward; no forward waits for them"
)

CALLERS: dict[str, dict[str, list[str]]] = {
    HOOKED: {
        "managers/cache_controller.py": ["HiCacheController.start_writing"],
        "mem_cache/unified_radix_cache.py": [
            "UnifiedRadixCache.backup_kv_cache",
            "UnifiedRadixCache.retraction_backup",
        ],
        "mem_cache/l2_transfer.py": ["L2TransferEngine.submit_device_to_host"],
    },
    WAITS: {
        "managers/schedule_batch.py": ["Req.offload_kv_cache"],
        "mem_cache/allocator/paged.py": ["PagedTokenToKVPoolAllocator.get_cpu_copy"],
        "mem_cache/allocator/swa.py": ["SWATokenToKVPoolAllocator.get_cpu_copy"],
        "mem_cache/allocator/token.py": ["TokenToKVPoolAllocator.get_cpu_copy"],
        "mem_cache/allocator/unified_mamba.py": ["UnifiedMambaTokenToKVPoolAllocator.get_cpu_copy"],
        "mem_cache/memory_pool.py": ["DSATokenToKVPool.get_cpu_copy", "HybridLinearKVPool.get_cpu_copy"],
        "mem_cache/minimax_m3_nvfp4_pool.py": ["MiniMaxM3Nvfp4KVPool.get_cpu_copy"],
        "mem_cache/swa_memory_pool.py": ["SWAKVPool.get_cpu_copy"],
        "mem_cache/unified_memory_pool.py": [
            "UnifiedSWAKVPool.get_cpu_copy",
            "UnifiedMHATokenToKVPool.get_cpu_copy",
            "UnifiedMLATokenToKVPool.get_cpu_copy",
        ],
    },
    HISPARSE: {
        "managers/hisparse_coordinator.py": [
            "HiSparseCoordinator._eager_backup_previous_token",
            "HiSparseCoordinator.admit_request_into_staging",
            "HiSparseSpecSwapManager._backup_device_locs_to_host",
        ],
    },
    "rows of one device pool to another": {
        "mem_cache/hisparse_memory_pool.py": ["HiSparseDSATokenToKVPool.transfer_values_on_device"],
    },
}
"""What each caller is: its file below srt/, and functions."""

HOLDERS: dict[str, list[str]] = {
    "the device pools themselves": [
        "mem_cache/deepseek_v4_memory_pool.py",
        "mem_cache/dsa_cache_layer_split.py",
        "mem_cache/dsv41_request_window.py",
        "mem_cache/memory_pool.py",
        "mem_cache/minimax_m3_nvfp4_pool.py",
        "mem_cache/page_interleave_pool.py",
        "mem_cache/swa_memory_pool.py",
        "mem_cache/unified_draft_pool.py",
        "mem_cache/unified_memory_pool.py",
    ],
    "builds host pools from their shapes": [
        "mem_cache/hybrid_cache/hybrid_pool_assembler.py",
        "mem_cache/kv_cache_builder.py",
    ],
    "attention, within the forward": [
        "dllm/attention.py",
        "mem_cache/sparsity/algorithms/base_algorithm.py",
        "mem_cache/sparsity/algorithms/quest_algorithm.py",
        "mem_cache/sparsity/core/sparse_coordinator.py",
    ],
    "the host pool's memory, to storage": [
        "managers/cache_controller.py",
        "mem_cache/storage/aibrix_kvcache/unit_test.py",
        "mem_cache/storage/eic/eic_storage.py",
        "mem_cache/storage/mooncake_store/mooncake_store.py",
        "mem_cache/storage/mooncake_store/test_mooncake_store.py",
        "mem_cache/storage/nixl/hicache_nixl.py",
        "mem_cache/storage/npu_memcache/npu_memcache_store.py",
        "mem_cache/storage/simm/hicache_simm.py",
        "mem_cache/storage/simm/test_simm.py",
        "mem_cache/storage/tensorcast_store/tensorcast_store.py",
        "mem_cache/storage/tensorcast_store/test_tensorcast_store.py",
        "mem_cache/storage/umbp/umbp_store.py",
    ],
    "host rows of one rank to the device pools of others": ["mem_cache/mla_host_dedup.py"],
    "PAST THE HOOK: PD disaggregation, where a network card reads the rows": [
        "disaggregation/decode.py",
        "disaggregation/prefill.py",
        "disaggregation/utils.py",
    ],
    "PAST THE HOOK: other systems in HiCache's place, which copy by themselves (LMCache, FlexKV, linkers)": [
        "mem_cache/hybrid_cache/linker_pool_assembler.py",
        "mem_cache/storage/flexkv/flexkv_connector.py",
        "mem_cache/storage/lmcache/lmc_radix_cache.py",
    ],
    HISPARSE: ["managers/hisparse_coordinator.py"],
}
"""What each file does with the memory that it takes."""


@cache
def readers(version: str) -> tuple[frozenset[tuple[str, str]], frozenset[str]]:
    """(file, function) that call for a copy, and files that take memory."""
    callers, holders = set(), set()
    root = WHEELS / version / "sglang/srt"
    assert root.is_dir(), f"SGLang {version} is not unpacked: run `make versions`"
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if not name.startswith(ELSEWHERE):
            functions, holds = readers_in(path.read_text(encoding="utf-8-sig"))
            callers.update((name, function) for function in functions)
            holders.update([name] if holds else [])
    return frozenset(callers), frozenset(holders)


@cache
def readers_in(text: str) -> tuple[frozenset[str], bool]:
    """Functions that call for a copy, and whether anything takes memory."""
    if not any(part in text for part in (*COPIES, *MEMORY)):
        return frozenset(), False
    callers: set[str] = set()
    holds = False
    left: list[tuple[str, ast.AST]] = [("", ast.parse(text))]
    while left:
        function, node = left.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            function = f"{function}.{node.name}".lstrip(".")
        elif isinstance(node, ast.Call):
            called = name_of(node.func)
            if called.removeprefix("jit_").startswith(COPIES):
                callers.add(function)
            # getattr(pool, "k_buffer", None)
            named = node.args[1] if called in ("getattr", "hasattr") and len(node.args) > 1 else None
            holds = holds or getattr(named, "value", None) in MEMORY
        elif isinstance(node, ast.Attribute):
            holds = holds or node.attr in MEMORY
        left += [(function, child) for child in ast.iter_child_nodes(node)]
    return frozenset(callers), holds


def name_of(node: ast.AST) -> str:
    """What is called: ``f`` or ``x.f``."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def reviewed_callers() -> set[tuple[str, str]]:
    return {
        (path, function)
        for files in CALLERS.values()
        for path, functions in files.items()
        for function in functions
    }


def reviewed_holders() -> set[str]:
    return {path for files in HOLDERS.values() for path in files}


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_reader_of_the_device_pool_is_known(version: str) -> None:
    callers, holders = readers(version)
    assert callers - reviewed_callers() == set()
    assert holders - reviewed_holders() == set()


def test_each_that_is_known_is_there() -> None:
    found = [readers(version) for version in SUPPORTED]
    assert reviewed_callers() - set().union(*(callers for callers, _ in found)) == set()
    assert reviewed_holders() - set().union(*(holders for _, holders in found)) == set()


@pytest.mark.parametrize("version", SUPPORTED)
def test_all_that_hicache_writes_passes_the_hook(version: str) -> None:
    """One function hands rows to the host pools, and HiCache's callers ask for it."""
    callers, _ = readers(version)
    hooked = {path for path, _ in callers if path in CALLERS[HOOKED]}
    assert hooked == set(CALLERS[HOOKED])


@pytest.mark.parametrize("version", SUPPORTED)
def test_copies_to_plain_tensors_wait_for_the_device(version: str) -> None:
    """Before the first copy and behind the last, in each pool that has such a copy of its own."""
    waiting = 0
    for name in (
        "memory_pool.py",
        "swa_memory_pool.py",
        "unified_memory_pool.py",
        "minimax_m3_nvfp4_pool.py",
    ):
        path = WHEELS / version / "sglang/srt/mem_cache" / name
        if not path.is_file():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8-sig"))):
            if not isinstance(node, ast.FunctionDef) or node.name != "get_cpu_copy":
                continue
            calls = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
            copies = [
                each.lineno
                for each in calls
                if name_of(each.func) == "to" and getattr(each.args[0], "value", None) == "cpu"
            ]
            waits = [each.lineno for each in calls if name_of(each.func) == "synchronize"]
            if copies:
                waiting += 1
                assert min(waits) < min(copies), f"{name}:{node.lineno}"
                assert max(waits) > max(copies), f"{name}:{node.lineno}"
    assert waiting


def test_a_new_reader_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = dict(CALLERS[HOOKED])
    del kept["mem_cache/unified_radix_cache.py"]
    monkeypatch.setitem(CALLERS, HOOKED, kept)
    with pytest.raises(AssertionError, match="backup_kv_cache"):
        test_every_reader_of_the_device_pool_is_known(SUPPORTED[-1])
