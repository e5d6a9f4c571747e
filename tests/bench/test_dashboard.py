"""The dashboard and the alerts: what holds without a server, by ``promtool`` where it is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from sglang_hicache.bench.lab import dashboard

PROMTOOL = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no `promtool` on PATH (Debian: apt-get install prometheus)"
)
RULES = YAML(typ="safe").load(dashboard.ALERTS)["groups"][0]["rules"]
PANELS = json.loads(dashboard.DASHBOARD.read_text())["panels"]


def expressions() -> dict[str, str]:
    """Of every panel and alert."""
    shown = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in PANELS
        for target in panel["targets"]
    }
    return {**shown, **{rule["alert"]: rule["expr"] for rule in RULES}}


def test_the_files_are_what_the_command_writes() -> None:
    assert dashboard.DASHBOARD.read_text() == dashboard.dashboard(), (
        "run python -m sglang_hicache.bench.lab.dashboard"
    )
    assert dashboard.ALERTS.read_text() == dashboard.alerts(), (
        "run python -m sglang_hicache.bench.lab.dashboard"
    )


@pytest.mark.parametrize("name", expressions())
def test_each_metric_is_asked_for_by_both_spellings(name: str) -> None:
    asked = re.findall(r"sglang([:_])(hicache_io_\w+)(\{[^}]*\})?", expressions()[name])
    assert asked
    for colon, metric, labels in asked:
        other = "_" if colon == ":" else ":"
        assert asked.count((colon, metric, labels)) == asked.count((other, metric, labels)), metric


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_each_panel_is_filtered_by_server_model_and_ranks(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        for labels in re.findall(r"hicache_io_\w+\{([^}]*)\}", target["expr"]):
            assert dict(re.findall(r'(\w+)=~"\$(\w+)"', labels)).keys() == dashboard.VARIABLES.keys()


RANK = 'instance="a:1", model_name="m", dp_rank="0", tp_rank="1"'
CASES = {
    # alert: (series, its values a minute apart, minute at which it fires, minute before at which it does not)
    "HiCacheIoUnsafeFences": (
        {f'info{{{RANK}, unsafe_fences="none"}}': "1x20", f'info{{{RANK}, backend="other"}}': "1x20"},
        0,
        None,
    ),
    # Began at 1 s, so that its age is the time; the other rank has none.
    "HiCacheIoStuckWrite": (
        {
            f"oldest_write_timestamp_seconds{{{RANK}}}": "1x20",
            'oldest_write_timestamp_seconds{instance="b"}': "0x20",
        },
        3,
        1,
    ),
    "HiCacheIoBacklog": (
        {
            f'waiting_bytes{{{RANK}, backend="hybrid"}}': "200x20",
            f'staging_total_bytes{{{RANK}, backend="hybrid"}}': "100x20",
            f'waiting_bytes{{{RANK}, backend="other"}}': "100x20",
            f'staging_total_bytes{{{RANK}, backend="other"}}': "100x20",
        },
        5,
        4,
    ),
    "HiCacheIoFallback": (
        {
            f'fallback_writes_total{{{RANK}, pool="mamba", reason="r"}}': "0 0 0 1x20",
            f'fallback_writes_total{{{RANK}, pool="kv", reason="r"}}': "0x20",
        },
        4,
        2,
    ),
}


def test_every_alert_has_a_case() -> None:
    assert [rule["alert"] for rule in RULES] == list(CASES)


def promtool(*words: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@PROMTOOL
def test_the_alert_rules_are_valid() -> None:
    promtool("check", "rules", dashboard.ALERTS)


@PROMTOOL
@pytest.mark.parametrize("spelling", ["sglang:", "sglang_"])
@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_for_that_rank_and_no_other(alert: str, spelling: str, tmp_path: Path) -> None:
    given, fires, quiet = CASES[alert]
    rule = next(rule for rule in RULES if rule["alert"] == alert)
    series = [{"series": f"{spelling}hicache_io_{name}", "values": values} for name, values in given.items()]
    own = dict(re.findall(r'(\w+)="([^"]*)"', next(iter(given))))
    expected = {"exp_labels": {**own, **rule["labels"]}}
    at = [{"eval_time": f"{fires}m", "alertname": alert, "exp_alerts": [expected]}]
    if quiet is not None:
        at.append({"eval_time": f"{quiet}m", "alertname": alert, "exp_alerts": []})
    for each in at[0]["exp_alerts"]:
        each["exp_annotations"] = {key: filled(text, own) for key, text in rule["annotations"].items()}
        each["exp_annotations"]["description"] = DESCRIBED[alert]
    case = tmp_path / "case.yml"
    test = {"interval": "1m", "input_series": series, "alert_rule_test": at}
    with case.open("w") as file:
        YAML(typ="safe").dump(
            {"rule_files": [str(dashboard.ALERTS)], "evaluation_interval": "1m", "tests": [test]}, file
        )
    promtool("test", "rules", case)


DESCRIBED = {
    "HiCacheIoUnsafeFences": "--hicache-io-unsafe-fences none is an experiment: outputs may be wrong and the "
    "GPU may fault. Restart without it.",
    "HiCacheIoStuckWrite": "It began 2m 59s ago. Its pages cannot be evicted. Look at the server's log and "
    "at the GPU (nvidia-smi, dmesg); restart the server.",
    "HiCacheIoBacklog": "200B of rows wait that SGLang cannot evict. Forwards make more than the link takes: "
    "a larger staging_mb, write_through_selective, or less load.",
    "HiCacheIoFallback": "Fenced, and slower: r. If that is what this pool is (MXFP8, DeepSeek-V4, "
    "...: docs/coverage.md), silence this alert for it.",
}


def filled(text: str, labels: dict[str, str]) -> str:
    """A template with the labels in it."""
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], text)
