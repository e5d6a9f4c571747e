"""Device rows of requests: SGLang's allocator and table of requests, by whole pages."""

from __future__ import annotations

from typing import Any

import torch

from .cache import Cache


class RowAllocator:
    """What mem_cache/allocation.py does for a batch, without its kernels.

    Args:
        cache: whose allocator and table.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.page_size = cache.setup.page_size

    @property
    def free(self) -> int:
        """Rows that can be had: free ones, and those that the tree can give up."""
        free: int = self._cache.allocator.available_size() + self._cache.tree.evictable_size()
        return free

    def whole_pages(self, tokens: int) -> int:
        """Rows of the pages that hold so many tokens."""
        return -(-tokens // self.page_size) * self.page_size

    def of(self, request: Any) -> torch.Tensor:
        """The request's row of the table: device slots by position, int32 [positions]."""
        row: torch.Tensor = self._cache.requests.req_to_token[request.kv.req_pool_idx]
        return row

    def extend(self, requests: list[Any]) -> None:
        """``alloc_for_extend``: rows for ``[prefix_len, extend_end)`` of each.

        Raises:
            RuntimeError: they are not to be had.
        """
        from sglang.srt.mem_cache.allocation import alloc_req_slots

        table = self._cache.requests
        prefixes = [self._prefix(request) for request in requests]
        alloc_req_slots(table, requests, self._cache.tree)
        for request, prefix in zip(requests, prefixes, strict=True):
            start, stop = request.prefix_len, request.extend_end
            slots = self._allocate(stop - start)
            row = request.kv.req_pool_idx
            table.write((row, slice(0, start)), prefix.to(torch.int32))
            table.write((row, slice(start, stop)), slots[: stop - start].to(torch.int32))
            request.kv.kv_allocated_len = request.kv.kv_committed_len = stop

    def grow(self, request: Any) -> tuple[int, int]:
        """``alloc_for_decode``: a row for one more token. Returns its position, and the next one.

        Raises:
            RuntimeError: it is not to be had.
        """
        at = request.kv.kv_committed_len
        row = self.of(request)
        row[at] = self._allocate(1)[0] if at % self.page_size == 0 else row[at - 1] + 1
        request.kv.kv_allocated_len += 1
        request.kv.kv_committed_len += 1
        return at, at + 1

    def reserve(self, request: Any, length: int) -> None:
        """``alloc_for_spec_decode``: rows up to ``length``, whole pages.

        Raises:
            RuntimeError: they are not to be had.
        """
        row, start = self.of(request), request.kv.kv_allocated_len
        slots = iter(self._allocate(max(0, length - self.whole_pages(start))))
        for at in range(start, length):
            row[at] = next(slots) if self.whole_pages(start) <= at else row[at - 1] + 1
        request.kv.kv_allocated_len = max(start, length)

    def needed_to_grow(self, requests: list[Any]) -> int:
        """Rows that one more token of each takes from the pool."""
        growing = sum(each.kv.kv_committed_len % self.page_size == 0 for each in requests)
        return int(self.page_size * growing)

    def _prefix(self, request: Any) -> torch.Tensor:
        """``_prefix_kv_indices``."""
        if request.kv.holds_kv:
            return self.of(request)[: request.prefix_len]
        if not request.prefix_len:
            return torch.empty(0, dtype=torch.int64)
        prefix: torch.Tensor = self._cache.tree.prefix_device_indices(request)
        return prefix

    def _allocate(self, tokens: int) -> torch.Tensor:
        from sglang.srt.mem_cache.common import evict_from_tree_cache

        wanted = self.whole_pages(tokens)
        evict_from_tree_cache(self._cache.tree, wanted)
        slots: torch.Tensor | None = self._cache.allocator.alloc(wanted)
        if slots is None:
            raise RuntimeError(f"the modelled scheduler promised {wanted} rows that are not to be had")
        return slots
