"""Indices of a write, left where they are until it is known who copies it.

SGLang moves host indices to the GPU or device indices to the host before it submits a write, the latter with
a wait for the forward in flight. Our backends take host indices on the host, device indices on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..pools.geometry import translated

Move = Callable[..., tuple[Any, Any]]
"""``move(host, device, may_stage=)``: indices as SGLang's own copy of a pool wants them."""


class PlainIndices:
    """Which pools' indices were left as they came, and how to move them after all.

    Args:
        serves: whether one of our backends may copy a pool.
    """

    def __init__(self, serves: Callable[[Any], bool]) -> None:
        self._serves = serves
        self._moves: dict[int, Move] = {}

    def move_of(self, host_pool: Any) -> Move | None:
        """Moves this pool's indices of the present write; None if SGLang has done so."""
        return self._moves.get(id(host_pool))

    def move_write_operation(self, original: Callable[..., Any], controller: Any, operation: Any) -> Any:
        """Hook around ``_move_write_operation``: leave indices where they are, for the route to be chosen.

        SGLang submits the write next, which moves them if it turns out to need that.
        """
        group = controller.mem_pool_host
        anchor = getattr(group, "anchor_entry", None)
        pool = group if anchor is None else anchor.host_pool
        side = operation.pool_transfers or []
        sides = [group.entry_map[transfer.name].host_pool for transfer in side]
        draft = draft_pool_of(controller)
        for each in (pool, *sides, draft):
            self._moves.pop(id(each), None)
        if getattr(controller, "is_kv_sharded", False) or not any(
            self._stays_plain(controller, each) for each in [pool, *sides]
        ):
            return original(controller, operation)
        host, device = self._leave_or_move(controller, pool, operation.host_indices, operation.device_indices)
        if draft is not None and id(pool) in self._moves:
            self._moves[id(draft)] = self._moves[id(pool)]
        if anchor is None:
            return host, device, None
        moved = None
        if side:
            moved = []
            for transfer, side_pool in zip(side, sides, strict=True):
                side_host, side_device = self._leave_or_move(
                    controller, side_pool, transfer.host_indices, transfer.device_indices
                )
                moved.append(replace(transfer, host_indices=side_host, device_indices=side_device))
        return host, device, moved

    def _stays_plain(self, controller: Any, pool: Any) -> bool:
        if not self._serves(pool):
            return False
        entries = getattr(controller.mem_pool_host, "entries", ())
        device_pools = [entry.device_pool for entry in entries if entry.host_pool is pool]
        return not any(map(translated, device_pools or [getattr(controller, "mem_pool_device", None)]))

    def _leave_or_move(self, controller: Any, pool: Any, host: Any, device: Any) -> tuple[Any, Any]:
        move = functools.partial(self._move, controller, pool)
        if self._stays_plain(controller, pool):
            self._moves[id(pool)] = move
            return host, device
        return move(host, device, may_stage=True)

    @staticmethod
    def _move(controller: Any, pool: Any, host: Any, device: Any, *, may_stage: bool) -> tuple[Any, Any]:
        """Indices as SGLang's own copy wants them; its staged path takes host indices on the host."""
        # SGLang's rule for a pool of its own, as in each version's _move_write_operation.
        staged = (
            may_stage
            and controller.io_backend == "kernel"
            and controller.mem_pool_host.layout == "page_first"
        )
        per_pool = getattr(controller, "_move_pool_indices", None)
        if per_pool is not None:
            moved: tuple[Any, Any] = per_pool(pool, host, device, write_back_jit=staged)
            return moved
        if staged and getattr(pool, "can_use_write_back_jit", False):
            return (host.cpu() if host.is_cuda else host), device
        moved = controller.move_indices(host, device)
        return moved


def draft_pool_of(controller: Any) -> Any:
    """The draft's host pool where it is apart and gets the target's indices (SGLang 0.5.18); else None."""
    return getattr(controller, "mem_pool_host_draft", None)
