"""SGLang's tree of a model with sliding layers, its pools and controller, and writes that are not done.

What copies is replaced by :mod:`late_writes`. What a token's row is depends on all tokens before it.
"""

from __future__ import annotations

import random
import zlib
from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from late_writes import Engine, Rows

WINDOW = 8
"""Tokens."""
FULL_PAGES, WINDOW_PAGES = 160, 72
"""Of the device pools: so few that the tree must give some up."""


class Request:
    """A request, and which rows it has."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.slots: list[int] = []
        self.protected = self.evicted = self.inserted = self.decoded = 0
        self.node: Any = None
        self.receipt: Any = None
        self.early = False


class Tree:
    """The tree, and requests that use it.

    Args:
        policy: ``--hicache-write-policy``.
        page: tokens a page.
    """

    def __init__(self, policy: str, page: int = 1) -> None:
        self.page = page
        server_args = _server_args(policy, page)
        _publish(server_args)
        from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        self.swa = ComponentType.SWA
        sizes = FULL_PAGES * page, WINDOW_PAGES * page
        pool = SWAKVPool(*sizes, page, torch.bfloat16, 1, 64, [0], [1], "cpu", enable_memory_saver=False)
        table = ReqToTokenPool(8, 256 * page, "cpu", False)
        self.allocator = SWATokenToKVPoolAllocator(*sizes, page, torch.bfloat16, "cpu", pool, False)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=table,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page,
            sliding_window_size=WINDOW,
            tree_components=(ComponentType.FULL, ComponentType.SWA),
        )
        self.tree = UnifiedRadixCache(params)
        self.tree.init_hicache(server_args, params)
        self.controller = self.tree.cache_controller

    def restart(self, seed: int) -> None:
        """Empty, as after a start."""
        self.rng = random.Random(seed)
        pages = {"full": FULL_PAGES, "swa": WINDOW_PAGES}
        self.rows = Rows({kind: (count + 1) * self.page for kind, count in pages.items()})
        self.tree.reset()
        self.allocator.clear()
        self.engine = self.controller.l2_transfer_engine = Engine(self.rows)
        self.requests: list[Request] = []
        self.borrowed: list[tuple[Any, Any]] = []
        self.said: list[list[int]] = []
        self._junk = -1

    # What a server does.

    def play(self, steps: int) -> None:
        actions = {
            self.arrive: 4,
            self.prefill: 6,
            self.decode: 14,
            self.leave: 3,
            self.abort: 0.5,
            self.borrow: 2,
            self.give_back: 2,
            self.press: 8,
            self.press_host: 1,
            self.others: 6,
            self.acknowledge: 2,
        }
        for _ in range(steps):
            self.rng.choices(list(actions), list(actions.values()))[0]()
        while self.requests:
            self.leave()
        while self.borrowed:
            self.give_back()
        self.acknowledge(everything=True)

    def arrive(self) -> None:
        if len(self.requests) >= 3:
            return
        before = self.rng.choice(self.said)[:] if self.said and self.rng.random() < 0.85 else []
        kept = before[: self._whole(self.rng.choice((len(before), len(before) // 2, 3 * len(before) // 4)))]
        fresh = [self.rng.randrange(1, 1 << 20) for _ in range(self.rng.choice((2, 5, 11, 21)) * self.page)]
        request = Request([*kept, *fresh][: 40 * self.page])
        found = self._match(request.tokens[:-1])
        request.slots = self._rows_of(found)
        request.protected = len(request.slots)
        request.node = found.last_device_node
        request.receipt = self.tree.inc_lock_ref(request.node).to_dec_params()
        self.requests.append(request)
        self.said.append(request.tokens)

    def prefill(self) -> None:
        request = self._one(lambda each: len(each.slots) < len(each.tokens))
        if request is None:
            return
        left = len(request.tokens) - len(request.slots)
        chunk = left if self.rng.random() < 0.5 else min(left, self.rng.choice((4, 8, 12)) * self.page)
        if self._extend(request, chunk):
            self._checkpoint(request, chunked=len(request.slots) < len(request.tokens))

    def decode(self) -> None:
        request = self._one(
            lambda each: len(each.slots) == len(each.tokens) and len(each.tokens) < 60 * self.page
        )
        if request is None:
            return
        for _ in range(self.rng.choice((1, 1, 4, 9))):
            # A page's tokens at once.
            request.tokens += [self.rng.randrange(1, 1 << 20) for _ in range(self.page)]
            if not self._extend(request, self.page):
                del request.tokens[-self.page :]
                return
            request.decoded += self.page
            # maybe_evict_swa
            self._free_passed(request, len(request.tokens) - 1)
            if request.decoded >= WINDOW and not request.early:
                self._release_early(request)

    def leave(self) -> None:
        """A request is finished."""
        request = self._one(lambda each: True)
        if request is None:
            return
        self.requests.remove(request)
        length = self._whole(len(request.slots))
        if length > request.protected:
            self._insert(request, length)
        self._release(request, max(length, request.protected))

    def abort(self) -> None:
        request = self._one(lambda each: True)
        if request is not None:
            self.requests.remove(request)
            self._release(request, request.protected)

    def borrow(self) -> None:
        """A decode server of PD disaggregation locks what it has of a prompt (``_match_prefix_and_lock``)."""
        if self.said and len(self.borrowed) < 2:
            node = self._match(self.rng.choice(self.said)).last_device_node
            self.borrowed.append((node, self.tree.inc_lock_ref(node).to_dec_params()))

    def give_back(self) -> None:
        """It releases the lock: in 0.5.18 and 0.5.19 without what it was told when it took it."""
        if self.borrowed:
            node, receipt = self.borrowed.pop(self.rng.randrange(len(self.borrowed)))
            if hasattr(receipt, "skip_lock_node_ids"):
                self.tree.dec_lock_ref(node)
            else:
                self.tree.dec_lock_ref(node, receipt)

    def press(self) -> None:
        """Others want rows."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        full, window = self.rng.choice(((0, 4), (0, 12), (0, 40), (4, 0), (20, 4), (80, 0)))
        self.tree.evict(EvictParams(num_tokens=full * self.page, swa_num_tokens=window * self.page))

    def press_host(self) -> None:
        self.tree.evict_host(self.rng.choice((1, 8)), self.rng.choice((self.swa, *self.tree.tree_components)))

    def others(self) -> None:
        """A forward of others writes every row that is free."""
        for kind, allocator in (
            ("full", self.allocator.full_attn_allocator),
            ("swa", self.allocator.swa_attn_allocator),
        ):
            self._junk -= 1
            free = allocator.alloc(allocator.available_size())
            if free is not None and len(free):
                self.rows.device[kind][free.numpy()] = self._junk
                allocator.free(free)

    def acknowledge(self, everything: bool = False) -> None:
        """Some writes are done, in their order, and SGLang polls."""
        if self.controller.write_queue:
            self.controller.start_writing()
        waiting = [each for each in self.engine.writes if not each.done]
        for each in waiting if everything else waiting[: self.rng.choice((0, 1, 2))]:
            each.finish()
        self.tree.writing_check()

    # Rows of requests.

    def _one(self, suits: Any) -> Request | None:
        there = [each for each in self.requests if suits(each)]
        return self.rng.choice(there) if there else None

    def _whole(self, tokens: int) -> int:
        return tokens // self.page * self.page

    def _key(self, tokens: list[int]) -> Any:
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(array("q", tokens)).page_aligned(self.page)

    def _match(self, tokens: list[int]) -> Any:
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        return self.tree.match_prefix(MatchPrefixParams(key=self._key(tokens)))

    def _extend(self, request: Request, tokens: int) -> bool:
        """Rows for so many more tokens, which a forward writes at once."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        allocator = self.allocator
        missing = [
            max(0, tokens - each)
            for each in (allocator.full_available_size(), allocator.swa_available_size())
        ]
        if any(missing):
            self.tree.evict(EvictParams(num_tokens=missing[0], swa_num_tokens=missing[1]))
        if min(allocator.full_available_size(), allocator.swa_available_size()) < tokens:
            return False
        slots = allocator.full_attn_allocator.alloc(tokens)
        allocator.full_to_swa_index_mapping[slots] = allocator.swa_attn_allocator.alloc(tokens)
        start = len(request.slots)
        request.slots += [int(each) for each in slots]
        tags = [tag(request.tokens[: at + 1]) for at in range(start, start + tokens)]
        self.rows.device["full"][slots.numpy()] = tags
        self.rows.device["swa"][allocator.translate_loc_from_full_to_swa(slots).numpy()] = tags
        return True

    def _free_passed(self, request: Request, length: int) -> None:
        """``free_swa_out_of_window_slots``."""
        start = max(request.evicted, request.protected)
        stop = max(start, self._whole(length - max(WINDOW, self.page)))
        request.evicted = start
        if stop > start:
            self.allocator.free_swa(torch.tensor(request.slots[start:stop]))
            request.evicted = stop

    def _insert(self, request: Request, length: int, chunked: bool = False) -> Any:
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        params = InsertParams(
            key=self._key(request.tokens[:length]),
            value=torch.tensor(request.slots[:length]),
            prev_prefix_len=request.protected,
        )
        if hasattr(params, "chunked"):
            params.chunked = chunked
        if hasattr(params, "inserted_len"):
            params.inserted_len = request.inserted
        if hasattr(params, "set_evicted_seqlen"):
            params.set_evicted_seqlen(self.swa, request.evicted)
        else:
            params.swa_evicted_seqlen = request.evicted
        request.inserted = length
        return self.tree.insert(params)

    def _rows_of(self, found: Any) -> list[int]:
        """Of what was matched or inserted."""
        if hasattr(self.tree, "path_device_indices"):
            return [int(each) for each in self.tree.path_device_indices(found.last_device_node)]
        return [int(each) for each in found.device_indices]

    def _checkpoint(self, request: Request, chunked: bool) -> None:
        """``checkpoint_into_tree``."""
        length = self._whole(len(request.slots))
        self._free_passed(request, length - 1)
        if length <= request.protected:
            return
        inserted = self._insert(request, length, chunked)
        # From 0.5.21 on where the insert ended; before, what is matched then.
        found = (
            inserted if hasattr(self.tree, "path_device_indices") else self._match(request.tokens[:length])
        )
        rows = self._rows_of(found)
        assert len(rows) == length, (len(rows), length)
        request.slots[:length] = rows
        self._unlock(request)
        request.node = found.last_device_node
        request.receipt = self.tree.inc_lock_ref(request.node).to_dec_params()
        request.early, request.decoded = False, 0
        request.protected = length

    def _release(self, request: Request, kept: int) -> None:
        """``release_kv_cache``."""
        self._unlock(request)
        own = request.slots[kept:]
        dead = max(0, min(len(own), request.evicted - kept))
        if own[:dead]:
            self.allocator.full_attn_allocator.free(torch.tensor(own[:dead]))
        if own[dead:]:
            self.allocator.free(torch.tensor(own[dead:]))

    # Locks, in each release's words.

    def _unlock(self, request: Request) -> None:
        self.tree.dec_lock_ref(request.node, request.receipt, skip_swa=request.early)

    def _release_early(self, request: Request) -> None:
        """Where ``maybe_evict_swa`` does: a request has gone a window further than its prefix."""
        receipt, tree = request.receipt, self.tree
        if hasattr(receipt, "component_lock_uuids"):
            uuid = receipt.component_lock_uuids.get(self.swa)
        else:
            uuid = receipt.swa_uuid_for_lock
        if uuid is None:
            return
        request.early = True
        if hasattr(tree, "release_swa"):
            tree.release_swa(SimpleNamespace(node=request.node, receipt=receipt, swa_released=False))
        elif hasattr(receipt, "skip_lock_node_ids"):
            tree.dec_swa_lock_only(request.node, uuid, receipt.skip_lock_node_ids)
        else:
            tree.dec_swa_lock_only(request.node, receipt)


def tag(tokens: list[int]) -> int:
    """What the row of the last of these tokens holds."""
    return zlib.crc32(np.asarray(tokens, dtype=np.int64).tobytes()) << 8 | len(tokens)


def _server_args(policy: str, page: int) -> Any:
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(
        model_path="dummy",
        device="cpu",
        enable_hierarchical_cache=True,
        hicache_ratio=4.0,
        hicache_mem_layout="layer_first",
        hicache_io_backend="kernel",
        hicache_write_policy=policy,
        page_size=page,
    )


def _publish(server_args: Any) -> None:
    from sglang.srt.runtime_context import publish

    publish(server_args, role="scheduler")


def install() -> None:
    """Makes SGLang's controller and pools work on ordinary memory. Changes the process for good."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # Up to 0.5.21 SGLang brings configurations that the newest one's transformers has itself.
    mapping: Any = CONFIG_MAPPING
    register = mapping.register
    mapping.register = lambda key, value, exist_ok=False: register(key, value, exist_ok=True)
    from sglang.srt.managers import cache_controller
    from sglang.srt.mem_cache import l2_transfer
    from sglang.srt.mem_cache.pool_host import common

    nothing = SimpleNamespace(
        Stream=lambda *args, **named: SimpleNamespace(),
        Event=lambda *args, **named: SimpleNamespace(record=lambda *given: None),
    )
    for module in (l2_transfer, cache_controller):
        module.device_module = nothing
    common.ALLOC_MEMORY_FUNCS["cpu"] = lambda dims, dtype, device, pin_memory, allocator, **_: (
        allocator.allocate(dims, dtype=dtype, device=device)
    )
