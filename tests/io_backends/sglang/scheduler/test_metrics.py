"""What write-back counts for Prometheus."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launching import Machine
from repository import ROOT

from sglang_hicache.bench import serving, tiny_model, workload
from sglang_hicache.io_backends import Submission
from sglang_hicache.io_backends.sglang import versions
from sglang_hicache.io_backends.sglang.metrics import SAMPLED, Metrics, metrics_of

prometheus_client = pytest.importorskip("prometheus_client")

DASHBOARD = ROOT / "bench" / "grafana_dashboard.json"


@pytest.fixture
def registry() -> Any:
    return prometheus_client.CollectorRegistry()


@pytest.fixture
def metrics(registry: Any) -> Metrics:
    def made(kind: Any) -> Any:
        return lambda **named: kind(**named, registry=registry)

    kinds = SimpleNamespace(
        Counter=made(prometheus_client.Counter),
        Gauge=made(prometheus_client.Gauge),
        Histogram=made(prometheus_client.Histogram),
    )
    return Metrics({"cache_type": "UnifiedRadixCache", "tp_rank": "1"}, kinds)


def samples(registry: Any) -> dict[str, float]:
    """Name and own labels -> value, of samples that are not zero."""
    found = {}
    for family in registry.collect():
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("cache_type", "tp_rank", "le")}
            if sample.value and not sample.name.endswith(("_created", "_bucket")):
                assert sample.labels["tp_rank"] == "1"
                name = sample.name.removeprefix("sglang:hicache_io_")
                found[" ".join([name, *labels.values()])] = sample.value
    return found


class Backend:
    name = "hybrid"


class TimedDevice:
    """Events are the times at which they are recorded."""

    def __init__(self) -> None:
        self.clock = 0.0

    def record_timed(self, stream: Any) -> float:
        return self.clock

    def seconds_between(self, start: float, end: float) -> float:
        return end - start

    def query(self, event: float) -> bool:
        return True


def test_a_write_is_counted_by_backend_and_pool(metrics: Metrics, registry: Any) -> None:
    metrics.wrote(Backend(), "kv", Submission(copies=4, nbytes=1000), short=True)
    metrics.wrote(Backend(), "kv", Submission(copies=1, nbytes=500), short=False)
    metrics.wrote(Backend(), "swa", Submission(copies=1, nbytes=7), short=False)
    assert samples(registry) == {
        "bytes_total hybrid kv": 1500,
        "bytes_total hybrid swa": 7,
        "writes_total hybrid kv": 2,
        "writes_total hybrid swa": 1,
        "copy_entries_total hybrid kv": 5,
        "copy_entries_total hybrid swa": 1,
        "short_entry_writes_total hybrid kv": 1,
    }


def test_what_is_on_its_way_is_set_by_backend(metrics: Metrics, registry: Any) -> None:
    metrics.on_its_way({"hybrid": (3, 8, 5), "copy_engine": (0, 0, 0)}, 1.5)
    assert samples(registry) == {
        "staging_used_bytes hybrid": 3,
        "staging_total_bytes hybrid": 8,
        "waiting_bytes hybrid": 5,
        "oldest_write_timestamp_seconds": 1.5,
    }
    metrics.on_its_way({"hybrid": (0, 8, 0)}, 0.0)
    assert samples(registry) == {"staging_total_bytes hybrid": 8}


def test_whatever_changes_of_what_is_on_its_way_is_set(metrics: Metrics, registry: Any) -> None:
    """Also where it is the only one that does, and the others are what was told before."""
    staged = {"hybrid": (3, 8, 5)}
    metrics.on_its_way(staged, 1.5)
    for changed, oldest in (((3, 8, 5), 2.5), ((4, 8, 5), 2.5), ((4, 9, 5), 2.5), ((4, 9, 6), 2.5)):
        staged["hybrid"] = changed
        metrics.on_its_way(staged, oldest)
        assert samples(registry) == {
            "staging_used_bytes hybrid": changed[0],
            "staging_total_bytes hybrid": changed[1],
            "waiting_bytes hybrid": changed[2],
            "oldest_write_timestamp_seconds": oldest,
        }


def test_what_could_not_be_set_is_set_again(metrics: Metrics, registry: Any, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prometheus_client.Gauge, "set", full)
        with pytest.raises(OSError, match="No space"):
            metrics.on_its_way({"hybrid": (3, 8, 5)}, 1.5)
    metrics.on_its_way({"hybrid": (3, 8, 5)}, 1.5)
    assert samples(registry)["oldest_write_timestamp_seconds"] == 1.5


def test_a_label_of_the_operators_with_a_name_of_ours_gives_way(registry: Any) -> None:
    """`--extra-metric-labels '{"pool": "a"}'`: not a scheduler that dies at its first write."""

    def made(kind: Any) -> Any:
        return lambda **named: kind(**named, registry=registry)

    kinds = SimpleNamespace(
        Counter=made(prometheus_client.Counter),
        Gauge=made(prometheus_client.Gauge),
        Histogram=made(prometheus_client.Histogram),
    )
    labelled = Metrics({"tp_rank": "1", "pool": "theirs", "backend": "theirs", "reason": "theirs"}, kinds)
    labelled.wrote(Backend(), "kv", Submission(copies=4, nbytes=1000), short=True)
    labelled.fell_back("mamba", "because")
    assert samples(registry)["bytes_total hybrid kv"] == 1000


def test_a_fallback_says_why(metrics: Metrics, registry: Any) -> None:
    metrics.fell_back("mamba", "not a kind that is known")
    assert samples(registry) == {"fallback_writes_total mamba not a kind that is known": 1}


def test_transfers_are_timed_by_who_copied(metrics: Metrics, registry: Any) -> None:
    metrics.transferred(["upstream", "hybrid", "hybrid"], 0.25)
    assert samples(registry) == {
        "transfer_seconds_count hybrid+upstream": 1,
        "transfer_seconds_sum hybrid+upstream": 0.25,
    }


def test_one_fence_in_some_is_timed(metrics: Metrics, registry: Any) -> None:
    device: Any = TimedDevice()
    for _ in range(SAMPLED + 1):
        with metrics.fence(device, "stream"):
            device.clock += 0.5
    assert samples(registry) == {
        "forward_fences_total": SAMPLED + 1,
        "forward_fence_seconds_count": 2,
        "forward_fence_seconds_sum": 1.0,
    }


def test_a_device_without_a_clock_is_not_timed(metrics: Metrics, registry: Any) -> None:
    with metrics.fence(SimpleNamespace(), "stream"):  # type: ignore[arg-type]
        pass
    assert samples(registry) == {"forward_fences_total": 1}


@pytest.fixture
def no_global_metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(prometheus_client, "Counter", lambda **_: None)
    monkeypatch.setattr(prometheus_client, "Gauge", lambda **_: None)
    monkeypatch.setattr(prometheus_client, "Histogram", lambda **_: None)
    monkeypatch.setattr(versions, "view", lambda server_args: server_args)
    return


def scheduler_of(tree_cache: Any, *, dp_rank: int | None = None, **more: Any) -> Any:
    """Of SGLang up to 0.5.20: the second rank, in the fourth attention-DP group or in a replica."""
    ranks = SimpleNamespace(tp_rank=1, pp_rank=2, dp_rank=dp_rank, attn_dp_rank=3)
    arguments = SimpleNamespace(served_model_name="a model")
    return SimpleNamespace(tree_cache=tree_cache, server_args=arguments, ps=ranks, **more)


@pytest.mark.usefixtures("no_global_metrics")
def test_each_rank_and_replica_has_series_of_its_own() -> None:
    """SGLang's cache metrics name no rank before 0.5.21, and dp_rank 0 for every replica after."""
    for labels in ({"cache_type": "radix"}, {"cache_type": "radix", "dp_rank": 0, "tp_rank": 0}):
        cache = SimpleNamespace(metrics_collector=SimpleNamespace(labels=labels))
        for dp_rank, shown in ((None, 3), (5, 5)):
            found = metrics_of(scheduler_of(cache, dp_rank=dp_rank))
            assert found is not None
            ranks = {"tp_rank": 1, "pp_rank": 2, "dp_rank": shown}
            assert found._labels == {"model_name": "a model", "cache_type": "radix", **ranks}


def test_what_may_be_counted_starts_at_0(metrics: Metrics, registry: Any) -> None:
    """A series that appears with its first event is no increase to Prometheus."""
    metrics.expect("kv", ["hybrid", "copy_engine"], ["one reason", "another"])
    metrics.expect("mamba", [], ["not a kind that is known"])
    there = {
        (
            sample.name.removeprefix("sglang:hicache_io_"),
            sample.labels.get("backend") or sample.labels.get("reason"),
        )
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket", "_sum"))
    }
    by_backend = ("bytes_total", "writes_total", "copy_entries_total", "short_entry_writes_total")
    names = (*by_backend, "transfer_seconds_count")
    reasons = ("one reason", "another", "not a kind that is known")
    assert there == {
        *((name, backend) for name in names for backend in ("hybrid", "copy_engine")),
        *(("fallback_writes_total", reason) for reason in reasons),
        ("forward_fences_total", None),
        ("forward_fence_seconds_count", None),
    }
    assert samples(registry) == {}


def test_what_runs_is_an_info_metric(metrics: Metrics, registry: Any) -> None:
    metrics.runs("hybrid", rule='a "rule"\n', fence_forward="extend", version="1.0", unsafe_fences="none")
    assert samples(registry) == {'info hybrid a "rule"\n extend 1.0 none': 1}
    assert 'rule="a \\"rule\\"\\n"' in prometheus_client.generate_latest(registry).decode()


@pytest.mark.usefixtures("no_global_metrics")
def test_only_a_scheduler_with_metrics_has_these() -> None:
    collector = SimpleNamespace(labels={"tp_rank": "0"})
    off = SimpleNamespace(metrics_collector=None)
    assert metrics_of(SimpleNamespace(tree_cache=off, metrics_collector=None)) is None
    assert metrics_of(SimpleNamespace(tree_cache=off)) is None
    assert metrics_of(scheduler_of(SimpleNamespace(metrics_collector=collector))) is not None
    assert metrics_of(scheduler_of(off, metrics_collector=collector)) is not None


class TestDashboard:
    """``bench/grafana_dashboard.json``: what Grafana's import asks for, and no metric that does not exist."""

    @pytest.fixture(scope="class")
    def dashboard(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(DASHBOARD.read_text())
        return found

    def test_it_can_be_imported(self, dashboard: dict[str, Any]) -> None:
        # What grafana's dashboard schema requires of an import: a title, a version of the schema, and panels
        # with a place each that do not lie on one another.
        assert dashboard["title"]
        assert dashboard["schemaVersion"] >= 36
        assert "id" not in dashboard, "an id would overwrite somebody's dashboard"
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
        cells = [
            (x, y)
            for panel in dashboard["panels"]
            for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        ]
        assert len(set(cells)) == len(cells)
        assert max(x for x, _ in cells) < 24
        names = {variable["name"] for variable in dashboard["templating"]["list"]}
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) - {"__rate_interval", "__all"}
        assert used == names

    def test_it_asks_for_every_metric_and_no_other(
        self, dashboard: dict[str, Any], metrics: Metrics, registry: Any
    ) -> None:
        there = set()
        for family in registry.collect():
            kind = {"counter": "_total", "histogram": "_bucket", "gauge": ""}[family.type]
            there.add(family.name + kind)
        asked = {
            name
            for panel in dashboard["panels"]
            for target in panel["targets"]
            for name in re.findall(r"sglang:\w+", target["expr"])
        }
        assert asked == there


@pytest.mark.server
def test_a_server_publishes_what_it_counts(machine: Machine, tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\nrules: []\ndefault:\n  because: a test\n"
        "  use: {backend: hybrid, fence_forward: [extend, decode], options: {staging_mb: 1}}\n"
    )
    hicache = serving.HiCache("auto", None)
    options = serving.base_args(
        str(machine.model), cpu_engine=True, page_size=16, max_total_tokens=4096, hicache=hicache
    )
    env = {**machine.env(), "SGLANG_HICACHE_IO_POLICY": str(policy)}
    server = serving.ServerProcess(
        [*options, "--enable-metrics"], log=tmp_path / "server.log", env=env, launch=machine.launcher
    )
    asked = workload.EvictingWorkload(tiny_model.VOCAB_SIZE, conversations=8, turns=1, output_tokens=4)
    with server:
        workload.run(server, asked, lambda done: None)
        counted = server.info()["internal_states"][0]["hicache_io"]["counters"]
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            own = [sample.labels[label] for label in ("backend", "pool") if label in sample.labels]
            name = sample.name.removeprefix("sglang:hicache_io_")
            if name != sample.name and not name.endswith("_bucket"):
                found[" ".join([name, *own])] = sample.value
    assert counted["writes"] > 0
    assert found["writes_total hybrid kv"] == counted["writes"]
    assert found["bytes_total hybrid kv"] == counted["bytes"]
    assert found["copy_entries_total hybrid kv"] == counted["copies"]
    assert found["short_entry_writes_total hybrid kv"] == counted["short_entry_writes"]
    assert found["forward_fences_total"] == counted["forward_fences"] > 0
    assert found["staging_total_bytes hybrid"] == 2**20
