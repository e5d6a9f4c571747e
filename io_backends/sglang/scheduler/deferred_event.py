"""The completion that SGLang holds while parts of a transfer are still to be enqueued.

SGLang polls ``query``, and calls ``synchronize`` and ``elapsed_time``, on an event. An event that was never
recorded reads as complete, so one that is recorded later must not be handed out as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...device.base import Stream
from ...interface import Pending


def deferred(
    native: Any,
    timing: bool,
    stream: Stream,
    pending: Sequence[Pending],
    advance: Callable[[], None],
    flush: Callable[[], None],
    seen_done: Callable[[], None] | None = None,
) -> Any:
    """An event of ``native``'s kind that becomes complete when everything in ``pending`` has run.

    Args:
        native: the event that SGLang recorded too early.
        timing: whether it measures time.
        stream: where the rest of the transfer ends; the event is recorded there.
        pending: what is left.
        advance: called when SGLang polls, to enqueue what can be.
        flush: called when SGLang waits, to enqueue all of it.
        seen_done: called once, when SGLang first sees it complete.
    """
    kind = type(native)
    if kind not in _types:
        _types[kind] = _deferred_type(kind)
    event = _types[kind](**({"enable_timing": True} if timing else {}))
    event._defer(stream, pending, advance, flush, seen_done)
    return event


_types: dict[type, Any] = {}


def _deferred_type(native: Any) -> Any:
    class DeferredEvent(native):  # type: ignore[misc]
        """An event that is not complete before it is recorded."""

        def _defer(
            self,
            stream: Stream,
            pending: Sequence[Pending],
            advance: Callable[[], None],
            flush: Callable[[], None],
            seen_done: Callable[[], None] | None,
        ) -> None:
            self._pending = tuple(pending)
            self._left = len(pending)
            self._advance = advance
            self._flush_all = flush
            self._seen_done = seen_done
            self._stream = stream
            if not pending:
                super().record(stream)
            for part in pending:
                part.then(self._part_enqueued)

        def _part_enqueued(self) -> None:
            self._left -= 1
            if not self._left:
                super().record(self._stream)

        def _flush(self) -> None:
            self._raise_if_failed()
            if self._left:
                self._flush_all()

        def _raise_if_failed(self) -> None:
            """A write that failed half-way must never read as done, whatever became of its other parts."""
            for part in self._pending:
                part.enqueued()

        def query(self) -> bool:
            self._raise_if_failed()
            if self._left:
                self._advance()
                self._raise_if_failed()
            done = not self._left and bool(super().query())
            if done:
                self._is_done()
            return done

        def synchronize(self) -> None:
            self._flush()
            super().synchronize()
            self._is_done()

        def _is_done(self) -> None:
            told, self._seen_done = self._seen_done, None
            if told is not None:
                told()

        def wait(self, stream: Stream = None) -> None:
            self._flush()
            super().wait(stream)

    return DeferredEvent
