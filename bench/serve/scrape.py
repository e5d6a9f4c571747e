"""What a server counts itself: SGLang's own metrics (``--enable-metrics``), the same for every arm.

The names are those of SGLang 0.5.23; older releases lack some, a server without HiCache has none of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .. import serving

Samples = Mapping[str, float]
"""By name, and for buckets ``name|bound``; summed over labels, ranks included."""

_WRITE = "sglang_hicache_backup_duration_seconds"
_COUNTERS = {
    "written_bytes": "sglang_hicache_backup_bytes_total",
    "written_tokens": "sglang_hicache_backup_tokens_total",
    "loaded_tokens": "sglang_load_back_tokens_total",
    "evicted_tokens": "sglang_evicted_tokens_total",
    "dropped_tokens": "sglang_hicache_dropped_tokens_total",
}


@dataclass(frozen=True)
class Written:
    """What SGLang counted between two looks; None where it has no such metric.

    Attributes:
        writes: to host memory; those merged by SGLang count as one.
        write_mean_s: from the first copy of one to its last, by the GPU's clock.
        write_p99_s: the same, the upper bound of the bucket that 99 % do not exceed; None: beyond all.
        written_bytes, written_tokens: of all writes.
        loaded_tokens: brought back from host memory.
        evicted_tokens: that left the device pool.
        dropped_tokens: that left it without having been written.
    """

    writes: int | None = None
    write_mean_s: float | None = None
    write_p99_s: float | None = None
    written_bytes: float | None = None
    written_tokens: float | None = None
    loaded_tokens: float | None = None
    evicted_tokens: float | None = None
    dropped_tokens: float | None = None

    def rows_locked(self, seconds: float) -> float | None:
        """Device rows that a write in flight kept from being evicted, on average over ``seconds``.

        By Little's law: rows written a second, times the seconds that a write took.
        """
        if self.written_tokens is None or self.write_mean_s is None or seconds <= 0:
            return None
        return self.written_tokens / seconds * self.write_mean_s

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse(text: str) -> dict[str, float]:
    """Samples of Prometheus's text format, in either spelling of SGLang's prefix."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.replace(":", "_")
            bound = sample.labels.get("le")
            found[name if bound is None else f"{name}|{float(bound)}"] += sample.value
    return dict(found)


def between(before: Samples, after: Samples) -> Written:
    """What was counted from one look to the next."""

    def gained(name: str) -> float | None:
        # A counter that nothing has counted yet may not be there before.
        return after[name] - before.get(name, 0.0) if name in after else None

    writes = gained(f"{_WRITE}_count")
    total = gained(f"{_WRITE}_sum")
    mean = total / writes if writes and total is not None else None
    counters = {field: gained(name) for field, name in _COUNTERS.items()}
    return Written(
        None if writes is None else int(writes), mean, _percentile(before, after, writes, 0.99), **counters
    )


def _percentile(before: Samples, after: Samples, count: float | None, share: float) -> float | None:
    if not count:
        return None
    prefix = f"{_WRITE}_bucket|"
    bounds = sorted(float(name[len(prefix) :]) for name in after if name.startswith(prefix))
    for bound in bounds:
        name = f"{prefix}{bound}"
        if after[name] - before.get(name, 0.0) >= share * count:
            return bound
    return None


def look(url: str, timeout_s: float = 30) -> dict[str, float]:
    """The metrics of a server now.

    Raises:
        OSError: it does not answer.
    """
    with serving.open_url(f"{url}/metrics/", timeout_s=timeout_s) as answer:
        return parse(answer.read().decode())
