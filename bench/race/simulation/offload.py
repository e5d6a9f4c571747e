"""SGLang's ``DecodeKVCacheOffloadManager``, with a storage that takes everything at once."""

from __future__ import annotations

from queue import Queue
from typing import Any


def offload_manager(cache: Any) -> Any:
    """Built as ``Scheduler.__init__`` does, in a group of one process.

    Its controller has no storage backend, whose threads would make a seed many runs: a page is stored when it
    is handed over, after the host has waited for its copy.
    """
    import torch.distributed as dist
    from sglang.srt.disaggregation.decode_kvcache_offload_manager import DecodeKVCacheOffloadManager

    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    manager = DecodeKVCacheOffloadManager(cache.requests, cache.allocator, dist.group.WORLD, cache.tree)
    controller = manager.cache_controller
    controller.ack_backup_queue = Queue()
    controller.write_storage = _Storage(controller.ack_backup_queue).write
    # SGLang compiles its own; nobody looks a page up again.
    controller.get_hash_str = lambda tokens, prior=None, **_: ""
    return manager


def restart_offload(manager: Any) -> None:
    """As after a start of the server: nothing is on its way."""
    manager.cache_controller.reset()
    manager.decode_host_mem_pool.clear()
    manager.cache_controller.ack_backup_queue.queue.clear()
    for pending in (manager.ongoing_offload, manager.ongoing_backup):
        pending.clear()
    for known in (manager.offloaded_state, manager.offload_inflight):
        known.clear()


class _Storage:
    """``HiCacheController.write_storage`` and its backup thread."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    def write(self, host_indices: Any, token_ids: Any, hash_value: Any = None, **_: Any) -> int:
        from sglang.srt.managers.cache_controller import StorageOperation

        operation = StorageOperation(host_indices, token_ids, hash_value=hash_value)
        self._stored.put(operation)
        return int(operation.id)
