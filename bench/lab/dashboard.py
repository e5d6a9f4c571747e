"""Writes ``bench/grafana_dashboard.json`` and ``docs/deploy/alerts.yml``: ``python -m
sglang_hicache.bench.lab.dashboard``.

A metric has two spellings. Prometheus 2 asks for OpenMetrics, which allows no colon, and SGLang's endpoint
then answers with ``sglang_...`` for ``sglang:...``. So every query asks for both. Joined by ``or`` after
``rate``, and not by a pattern of names: ``rate`` drops names, and two series of one set of labels, in a range
in which a server changed its spelling, would be an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString

from ...io_backends.sglang.metrics import PREFIX

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "bench" / "grafana_dashboard.json"
ALERTS = ROOT / "docs" / "deploy" / "alerts.yml"

VARIABLES = {"instance": "Server", "model_name": "Model", "dp_rank": "DP rank", "tp_rank": "TP rank"}
"""What a reader chooses by: label and what Grafana calls it."""

CHOSEN = ", ".join(f'{label}=~"${label}"' for label in VARIABLES)
RATE = "rate({}[$__rate_interval])"

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}

STUCK_S = 60
"""A write that is not complete after this many seconds is stuck: 30 times what 100 GB take over a link of
PCIe 5. Nobody has seen one."""


def both(name: str, shape: str = "{}", labels: str = CHOSEN) -> str:
    """PromQL for a metric by both of its spellings, each within ``shape``."""
    spellings = (PREFIX, PREFIX.replace(":", "_"))
    chosen = f"{{{labels}}}" if labels else ""
    return "(" + " or ".join(shape.format(f"{each}{name}{chosen}") for each in spellings) + ")"


def total(name: str, by: str) -> str:
    """PromQL for a counter's rate."""
    return f"sum by ({by}) {both(name, RATE)}"


def quantile(share: float, name: str, by: str = "") -> str:
    """PromQL for a quantile of a histogram."""
    buckets = total(f"{name}_bucket", f"le, {by}" if by else "le")
    return f"histogram_quantile({share}, {buckets})"


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels, left to right and top to bottom."""
    who, pools = "{{backend}}", "{{backend}} {{pool}}"
    by_pool = "backend, pool"
    entries = f"{total('bytes_total', by_pool)} / {total('copy_entries_total', by_pool)}"
    began = both("oldest_write_timestamp_seconds")
    labels = ", ".join([*VARIABLES, "backend", "rule", "fence_forward", "version", "unsafe_fences"])
    made = [
        _table(
            "What runs",
            "A row for each rank and route of its decision. unsafe_fences: empty, unless somebody runs an "
            "experiment that leaves fences out.",
            f"max by ({labels}) {both('info')}",
        ),
        _graph(
            "Bytes to host memory",
            "Bps",
            "By backend and pool. SGLang's own copy is not in here: see Fallbacks.",
            (total("bytes_total", by_pool), pools),
        ),
        _graph(
            "Writes",
            "wps",
            "Writes of a pool. With several routes, which way they went.",
            (total("writes_total", by_pool), pools),
        ),
        _graph(
            "Bytes a copy-engine entry",
            "bytes",
            "Short entries are bound by the host's CPU, not by the link. An SM kernel counts as one entry.",
            (entries, pools),
        ),
        _graph(
            "Transfer time",
            "s",
            "First to last copy of a write, on the device. Empty on the CPU engine.",
            *((quantile(q, "transfer_seconds", "backend"), f"{who} p{q * 100:g}") for q in (0.5, 0.99)),
        ),
        _graph(
            "Forwards that waited",
            "short",
            "Forwards a second that were told to wait for SM-side write-back.",
            (
                total("forward_fences_total", "instance, dp_rank, tp_rank"),
                "{{instance}} {{dp_rank}}/{{tp_rank}}",
            ),
        ),
        _graph(
            "How long they waited",
            "s",
            "One fence in sixteen is timed. Empty on the CPU engine.",
            *((quantile(q, "forward_fence_seconds"), f"p{q * 100:g}") for q in (0.5, 0.99)),
        ),
        _graph(
            "Staging memory in use",
            "bytes",
            "Of the rank that uses most. Always full: writes arrive faster than the link drains them.",
            (f"max by (backend) {both('staging_used_bytes')}", f"{who} used"),
            (f"max by (backend) {both('staging_total_bytes')}", f"{who} in all"),
        ),
        _graph(
            "Rows that wait",
            "bytes",
            "Given to write-back, and not enqueued: they wait for a gap between forwards, and SGLang cannot "
            "evict them. More than a step's for long: forwards make more than the link takes.",
            (f"max by (backend) {both('waiting_bytes')}", who),
        ),
        _graph(
            "Age of the oldest write",
            "s",
            "Of those that SGLang has not seen complete. Grows without end: a write hangs.",
            (f"max by (instance) ((time() - {began}) * ({began} > bool 0))", "{{instance}}"),
        ),
        _graph(
            "Writes with short entries",
            "wps",
            "Entries below the break-even of a copy engine: the host pool is fragmented, or pages are small.",
            (total("short_entry_writes_total", by_pool), pools),
        ),
        _graph(
            "Fallbacks to SGLang's own copy",
            "wps",
            "Fenced like everything else. At 0: could happen, and does not.",
            (total("fallback_writes_total", "pool, reason"), "{{pool}}: {{reason}}"),
        ),
    ]
    return [_placed(panel, index) for index, panel in enumerate(made)]


def _placed(panel: dict[str, Any], index: int) -> dict[str, Any]:
    """The table is as wide as the page; graphs follow, three in a row."""
    row, column = divmod(index - 1, 3)
    place = (
        {"x": 8 * column, "y": 5 + 8 * row, "w": 8, "h": 8} if index else {"x": 0, "y": 0, "w": 24, "h": 5}
    )
    return {"id": index + 1, **panel, "datasource": _SOURCE, "gridPos": place}


def _graph(title: str, unit: str, text: str, *queries: tuple[str, str]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
        for index, (query, legend) in enumerate(queries)
    ]
    custom = {"fillOpacity": 10, "showPoints": "never"}
    return {
        "title": title,
        "type": "timeseries",
        "description": text,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": targets,
    }


def _table(title: str, text: str, query: str) -> dict[str, Any]:
    target = {"refId": "A", "datasource": _SOURCE, "expr": query, "instant": True, "format": "table"}
    hidden = {"excludeByName": {"Time": True, "Value": True}}
    return {
        "title": title,
        "type": "table",
        "description": text,
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {"showHeader": True},
        "transformations": [{"id": "organize", "options": hidden}],
        "targets": [target],
    }


def _variables() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "hide": 0,
            "refresh": 1,
            "current": {},
        }
    ]
    pattern = PREFIX.replace(":", "[:_]")
    chosen: list[str] = []
    for label, title in VARIABLES.items():
        matching = ", ".join([f'__name__=~"{pattern}info"', *chosen])
        query = f"label_values({{{matching}}}, {label})"
        chosen.append(f'{label}=~"${label}"')
        found.append(
            {
                "name": label,
                "label": title,
                "type": "query",
                "datasource": _SOURCE,
                "query": {"query": query, "refId": label},
                "definition": query,
                "refresh": 2,
                "includeAll": True,
                "multi": True,
                "current": {"text": "All", "value": "$__all"},
                "allValue": ".*",
                "sort": 1,
                "hide": 0,
            }
        )
    return found


def dashboard() -> str:
    """The file's text."""
    made = {
        "title": "SGLang HiCache write-back (sglang-hicache-io)",
        "uid": "sglang-hicache-io",
        "tags": ["sglang", "hicache"],
        "timezone": "browser",
        "schemaVersion": 39,
        "version": 2,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "panels": panels(),
    }
    return json.dumps(made, indent=2) + "\n"


def _rules() -> Sequence[dict[str, Any]]:
    where = "{{ $labels.instance }}, rank {{ $labels.dp_rank }}/{{ $labels.tp_rank }} (DP/TP)"
    waiting = both("waiting_bytes", labels="")
    return (
        {
            "alert": "HiCacheIoUnsafeFences",
            "expr": both("info", labels='unsafe_fences!=""') + " == 1",
            "labels": {"severity": "critical"},
            "annotations": {
                "summary": f"{where}: runs with fences left out on purpose",
                "description": "--hicache-io-unsafe-fences {{ $labels.unsafe_fences }} is an experiment: "
                "outputs may be wrong and the GPU may fault. Restart without it.",
            },
        },
        {
            "alert": "HiCacheIoStuckWrite",
            "expr": f"time() - ({both('oldest_write_timestamp_seconds', labels='')} > 0) > {STUCK_S}",
            "for": "1m",
            "labels": {"severity": "critical"},
            "annotations": {
                "summary": f"{where}: a write to host memory does not get done",
                "description": "It began {{ $value | humanizeDuration }} ago. Its pages cannot be evicted. "
                "Look at the server's log and at the GPU (nvidia-smi, dmesg); restart the server.",
            },
        },
        {
            "alert": "HiCacheIoBacklog",
            "expr": f"{waiting} > {both('staging_total_bytes', labels='')}",
            "for": "5m",
            "labels": {"severity": "warning"},
            "annotations": {
                "summary": f"{where}: more rows wait for write-back than the staging ring holds",
                "description": "{{ $value | humanize1024 }}B of rows wait that SGLang cannot evict. Forwards "
                "make more than the link takes: a larger staging_mb, write_through_selective, or less load.",
            },
        },
        {
            "alert": "HiCacheIoFallback",
            "expr": f"{both('fallback_writes_total', 'increase({}[10m])', labels='')} > 0",
            "labels": {"severity": "warning"},
            "annotations": {
                "summary": f"{where}: SGLang's own copy writes pool {{{{ $labels.pool }}}}",
                "description": "Fenced, and slower: {{ $labels.reason }}. If that is what this pool is "
                "(MXFP8, DeepSeek-V4, ...: docs/coverage.md), silence this alert for it.",
            },
        },
    )


def alerts() -> str:
    """The file's text."""
    rules = [
        {key: LiteralScalarString(f"{value}\n") if key == "expr" else value for key, value in rule.items()}
        for rule in _rules()
    ]
    yaml = YAML()
    yaml.width = 100
    yaml.indent(mapping=2, sequence=4, offset=2)
    text = StringIO()
    yaml.dump({"groups": [{"name": "sglang-hicache-io", "rules": rules}]}, text)
    return (
        "# Alerts for Prometheus, on the metrics of sglang-hicache-io. Both spellings of each metric:\n"
        "# Prometheus 2 is given sglang_... where others are given sglang:...\n" + text.getvalue()
    )


def main() -> None:
    ALERTS.parent.mkdir(parents=True, exist_ok=True)
    DASHBOARD.write_text(dashboard(), encoding="utf-8")
    ALERTS.write_text(alerts(), encoding="utf-8")


if __name__ == "__main__":
    main()
