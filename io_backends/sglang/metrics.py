"""What write-back does, on SGLang's own Prometheus endpoint (``--enable-metrics``).

Labels are those of the cache's own metrics (cache type, what ``--extra-metric-labels`` adds), the model and
this scheduler's ranks; names follow SGLang's. Without ``--enable-metrics`` nothing here is made, and a write
asks for one attribute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..device.base import Device, Event, Stream
from ..interface import Submission
from . import versions

PREFIX = "sglang:hicache_io_"

SAMPLED = 16
"""Every how many forward fences one is timed: two events that measure time cost more than the fence."""

_SECONDS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Upper bounds: from a gather of one page (10 us) to a transfer of 100 GB over PCIe."""


@runtime_checkable
class Timing(Protocol):
    """A device whose events measure time. The CPU's do not."""

    def query(self, event: Event) -> bool: ...

    def record_timed(self, stream: Stream) -> Event:
        """As ``record``, with an event that :meth:`seconds_between` takes."""
        ...

    def seconds_between(self, start: Event, end: Event) -> float:
        """GPU time from ``start`` to ``end``, both complete."""
        ...


_OF_INFO = ("backend", "rule", "fence_forward", "version", "unsafe_fences")
_OWN_LABELS = frozenset({"pool", "reason", *_OF_INFO})


class _Written(NamedTuple):
    """What counts the writes of one pool by one backend."""

    bytes: Callable[[float], None]
    writes: Callable[[], None]
    entries: Callable[[float], None]
    short: Callable[[], None]


class Metrics:
    """The counters of one scheduler.

    Args:
        labels: of every metric in this process.
        kinds: where the metric classes come from: ``prometheus_client``, or what stands for it.
    """

    def __init__(self, labels: Mapping[str, str], kinds: Any) -> None:
        # --extra-metric-labels may hold any name; two labels of one name would fail at the first write.
        self._labels = {name: value for name, value in labels.items() if name not in _OWN_LABELS}
        names = list(self._labels)

        def counter(name: str, text: str, *more: str) -> Any:
            return kinds.Counter(name=PREFIX + name, documentation=text, labelnames=[*names, *more])

        def seconds(name: str, text: str, *more: str) -> Any:
            return kinds.Histogram(
                name=PREFIX + name, documentation=text, labelnames=[*names, *more], buckets=_SECONDS
            )

        def gauge(name: str, text: str, *more: str) -> Any:
            return kinds.Gauge(
                name=PREFIX + name,
                documentation=text,
                labelnames=[*names, *more],
                multiprocess_mode="mostrecent",
            )

        self._info = gauge(
            "info",
            "1: what write-back does, a series for each route of the decision. version: of this plug-in. "
            "unsafe_fences: the fences that an experiment leaves in place, empty without one.",
            *_OF_INFO,
        )
        self._bytes = counter("bytes_total", "Bytes written to host memory.", "backend", "pool")
        self._writes = counter("writes_total", "Writes of a pool to host memory.", "backend", "pool")
        self._entries = counter(
            "copy_entries_total",
            "Copy-engine entries of these writes; an SM kernel counts as one.",
            "backend",
            "pool",
        )
        self._short = counter(
            "short_entry_writes_total",
            "Writes whose entries were shorter on average than a copy engine needs to keep the link busy.",
            "backend",
            "pool",
        )
        self._fallbacks = counter(
            "fallback_writes_total", "Writes of a pool by SGLang's own copy, and why.", "pool", "reason"
        )
        self._transfers = seconds(
            "transfer_seconds",
            "From a write's first copy to its last, on the device. Not timed on the CPU engine.",
            "backend",
        )
        self._fences = counter("forward_fences_total", "Forwards that were told to wait for write-back.")
        self._stalls = seconds(
            "forward_fence_seconds",
            f"How long such a forward waited on the device; one in {SAMPLED} is timed.",
        )
        self._staging = gauge("staging_used_bytes", "Staging memory that is not drained yet.", "backend")
        self._staging_size = gauge("staging_total_bytes", "Staging memory.", "backend")
        self._waiting = gauge(
            "waiting_bytes",
            "Bytes of rows that were given to write-back and wait for a gap between forwards.",
            "backend",
        )
        self._oldest = gauge(
            "oldest_write_timestamp_seconds",
            "When the oldest write began that is not seen complete, seconds since 1970; 0 if there is none.",
        )
        self._written: dict[tuple[str, str], _Written] = {}
        self._children: dict[tuple[Any, ...], Any] = {}
        self._timed: deque[tuple[Event, Event]] = deque()
        self._fences_seen = 0
        self._told: tuple[object, float] | None = None

    def runs(self, backend: str, *, rule: str, fence_forward: str, version: str, unsafe_fences: str) -> None:
        """One route of the decision that holds here, in the words of ``/server_info``."""
        own = (backend, rule, fence_forward, version, unsafe_fences)
        self._of(self._info, **dict(zip(_OF_INFO, own, strict=True))).set(1)

    def expect(self, pool: str, backends: Sequence[str], reasons: Sequence[str]) -> None:
        """What may be counted of a pool is there from the start, at 0: the first event is then an increase.

        Args:
            pool: which.
            backends: that may write it.
            reasons: why SGLang's own copy may.
        """
        for backend in backends:
            self._written_by(backend, pool)
            self._of(self._transfers, backend=backend)
        for reason in reasons:
            self._of(self._fallbacks, pool=pool, reason=reason)
        self._of(self._fences)
        self._of(self._stalls)

    def wrote(self, backend: Any, pool: str, submission: Submission, *, short: bool) -> None:
        """A backend enqueued a write of a pool."""
        known = self._written.get((backend.name, pool))
        if known is None:
            known = self._written[backend.name, pool] = self._written_by(backend.name, pool)
        known.bytes(submission.nbytes)
        known.writes()
        known.entries(submission.copies)
        if short:
            known.short()

    def _written_by(self, backend: str, pool: str) -> _Written:
        """Looked up once: that costs more than counting."""
        by = {"backend": backend, "pool": pool}
        return _Written(
            bytes=self._of(self._bytes, **by).inc,
            writes=self._of(self._writes, **by).inc,
            entries=self._of(self._entries, **by).inc,
            short=self._of(self._short, **by).inc,
        )

    def on_its_way(self, staged: Mapping[str, tuple[int, int, int]], oldest: float) -> None:
        """What is on its way now.

        Args:
            staged: bytes of staging memory in use and in all, and of rows that wait, by backend; all its
                instances together.
            oldest: when the oldest write began, seconds since 1970; 0: there is none.
        """
        told = (dict(staged), oldest)
        if told == self._told:
            return  # asked before every forward, and mostly the same: a decode step would pay four writes
        for backend, (used, total, waiting) in staged.items():
            self._of(self._staging, backend=backend).set(used)
            self._of(self._staging_size, backend=backend).set(total)
            self._of(self._waiting, backend=backend).set(waiting)
        self._of(self._oldest).set(oldest)
        self._told = told  # last: what could not be set is set again

    def fell_back(self, pool: str, reason: str) -> None:
        """SGLang's own copy wrote a pool."""
        self._of(self._fallbacks, pool=pool, reason=reason).inc()

    def transferred(self, backends: Sequence[str], seconds: float) -> None:
        """A write of one or more pools is done."""
        self._of(self._transfers, backend="+".join(sorted(set(backends)))).observe(seconds)

    @contextmanager
    def fence(self, device: Device, stream: Stream) -> Iterator[None]:
        """Around the waits of one forward: counts it, and at times sees how long ``stream`` waits there."""
        self._of(self._fences).inc()
        self._fences_seen += 1
        if self._fences_seen % SAMPLED != 1 or not isinstance(device, Timing):
            yield
            return
        start = device.record_timed(stream)
        yield
        self._timed.append((start, device.record_timed(stream)))
        while self._timed and device.query(self._timed[0][1]):
            self._of(self._stalls).observe(device.seconds_between(*self._timed.popleft()))

    def _of(self, metric: Any, **more: str) -> Any:
        """The child of a metric for these labels."""
        key = (id(metric), *more.values())
        child = self._children.get(key)
        if child is None:
            labels = {**self._labels, **more}
            child = self._children[key] = metric.labels(**labels) if labels else metric
        return child


def metrics_of(scheduler: Any) -> Metrics | None:
    """Metrics for this scheduler if it has any itself, else None."""
    for owner in (scheduler.tree_cache, scheduler):
        collector = getattr(owner, "metrics_collector", None)
        labels = getattr(collector, "labels", None)
        if labels is not None:
            # Not before: it reads PROMETHEUS_MULTIPROC_DIR, which SGLang sets, when it is imported.
            import prometheus_client

            model = versions.view(scheduler.server_args).served_model_name
            # SGLang's cache metrics name no rank before 0.5.21, and none of --dp-size's replicas after:
            # series of one name would be added up, or overwrite each other, in the one endpoint of a node.
            ranks: dict[str, Any] = {**versions.rank_labels(scheduler)}
            return Metrics({"model_name": model, **labels, **ranks}, prometheus_client)
    return None
