"""SGLang's tree without what holds the slots of a write: tests see by it that this is what holds them."""

from __future__ import annotations

import sys
from typing import Any

import pytest


def without_lock(monkeypatch: pytest.MonkeyPatch, tree: Any, component: Any) -> None:
    """The lock that a write takes on ``tree`` leaves this component out; locks of requests do not."""
    core = type(tree.tree_core)
    lock = core.inc_lock_ref

    def of_the_others(self: Any, node: int, skip: Any = ()) -> Any:
        callers = (sys._getframe(depth).f_code.co_name for depth in (1, 2, 3))
        of_a_write = "_execute_and_commit_kv_backup" in callers
        return lock(self, node, (component,) if of_a_write else skip)

    monkeypatch.setattr(core, "inc_lock_ref", of_the_others)


def without_wait(monkeypatch: pytest.MonkeyPatch, tree: Any, controller: Any) -> None:
    """An eviction that writes back takes its writes as done without waiting for them."""
    check = tree.writing_check

    def without_waiting(write_back: bool = False, **more: Any) -> None:
        if not write_back:
            check(**more)
            return
        controller.start_writing()
        for ack in controller.ack_write_queue:
            for each in ack.node_ids:
                tree._finish_write_through_ack(each)
        controller.ack_write_queue.clear()

    monkeypatch.setattr(tree, "writing_check", without_waiting)
