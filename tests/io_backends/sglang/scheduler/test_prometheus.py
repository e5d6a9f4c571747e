"""What a real Prometheus has of the metrics, and what the dashboard and the alerts ask of it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from launching import Machine
from pools import make_pool
from scraping import NEEDED, Prometheus

from sglang_hicache.bench import serving, tiny_model, workload
from sglang_hicache.bench.lab.dashboard import ALERTS, DASHBOARD
from sglang_hicache.io_backends import Submission
from sglang_hicache.io_backends.sglang.metrics import SAMPLED, Metrics
from sglang_hicache.io_backends.sglang.scheduler.pool_registry import KnownPool
from sglang_hicache.io_backends.sglang.scheduler.writeback import NOT_WHOLE, TRANSLATED, WriteBack

prometheus_client = pytest.importorskip("prometheus_client")

BOARD: dict[str, Any] = json.loads(DASHBOARD.read_text())
UNTIMED = {"Transfer time", "How long they waited"}
"""Panels of what is measured on a GPU's clock: without one there are series, and no numbers in them."""
OF_WRITES = "Bytes a copy-engine entry"
"""A ratio, which is 0 by 0 before the first write."""


def filled_in(query: str) -> str:
    """A query as Grafana sends it, of a reader who chose nothing."""
    query = query.replace("$__rate_interval", "20s")
    return re.sub(r"\$\{?\w+\}?", ".*", query)


def queries() -> list[tuple[str, str]]:
    return [
        (panel["title"], filled_in(target["expr"]))
        for panel in BOARD["panels"]
        for target in panel["targets"]
    ]


def values_of(prometheus: Prometheus, variable: dict[str, Any]) -> list[str]:
    """What Grafana offers for a variable of the dashboard."""
    matched = re.fullmatch(r"label_values\((\{.*\}), (\w+)\)", variable["query"]["query"])
    assert matched is not None
    found: list[str] = prometheus.get(f"label/{matched[2]}/values", **{"match[]": filled_in(matched[1])})
    return found


def assert_everything_has_data(prometheus: Prometheus, *, without: Set[str] = frozenset()) -> None:
    """Every query has series, and but for panels of these titles they hold numbers."""
    for title, query in queries():
        found = prometheus.newest(query)
        assert found, f"{title}: {query}"
        if title not in without:
            assert any(value == value for value in found), f"{title} has only NaN: {query}"
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            assert values_of(prometheus, variable), variable["name"]
    loaded = prometheus.get("rules")["groups"][0]["rules"]
    prometheus.until(
        lambda: all(rule["health"] == "ok" for rule in prometheus.get("rules")["groups"][0]["rules"])
    )
    assert len(loaded) == 4


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Exporter:
    """The metrics of one rank, over HTTP, and a write after each scrape."""

    def __init__(self, *, openmetrics: bool) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        labels = {"model_name": "tiny", "tp_rank": "0", "dp_rank": "0", "pp_rank": "0"}
        self._metrics = Metrics(labels, SimpleNamespace(**{kind: self._made(kind) for kind in KINDS}))
        self._metrics.expect("kv", ["hybrid"], ["a reason"])
        self._metrics.runs(
            "hybrid", rule="a rule", fence_forward="extend", version="0.1.0", unsafe_fences="none"
        )
        self._app = prometheus_client.make_wsgi_app(self.registry)
        self._openmetrics = openmetrics

    def _made(self, kind: str) -> Any:
        return lambda **named: getattr(prometheus_client, kind)(**named, registry=self.registry)

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        self._metrics.wrote(
            SimpleNamespace(name="hybrid"), "kv", Submission(copies=2, nbytes=1000), short=True
        )
        self._metrics.on_its_way({"hybrid": (1, 2, 3)}, 1.0)
        self._metrics.transferred(["hybrid"], 0.1)
        self._metrics.fell_back("kv", "a reason")
        clock = SimpleNamespace(
            record_timed=lambda _: 0.0, query=lambda _: True, seconds_between=lambda *_: 0.01
        )
        for _ in range(SAMPLED):
            with self._metrics.fence(clock, "stream"):  # type: ignore[arg-type]
                pass
        if not self._openmetrics:
            environ["HTTP_ACCEPT"] = "text/plain"
        return self._app(environ, start)

    @contextmanager
    def served(self) -> Iterator[str]:
        """Its ``host:port``."""
        server = make_server("127.0.0.1", 0, self, handler_class=_Silent)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


KINDS = ("Counter", "Gauge", "Histogram")


@NEEDED
def test_both_spellings_in_one_prometheus(tmp_path: Path) -> None:
    """A server that gives OpenMetrics, and one that gives the old text and goes over to the new one."""
    plain, new = Exporter(openmetrics=False), Exporter(openmetrics=True)
    with plain.served() as one, new.served() as two, Prometheus(tmp_path, [one, two], [ALERTS]) as prometheus:
        writes = "writes_total"
        asked = dict(queries())
        prometheus.until(lambda: len(prometheus.newest(asked["Forwards that waited"])) == 2)
        spelled = {each["__name__"] for each in prometheus.get("series", **{"match[]": '{job="sglang"}'})}
        assert {f"sglang:hicache_io_{writes}", f"sglang_hicache_io_{writes}"} <= spelled
        assert_everything_has_data(prometheus)
        # Both servers are in the sum, and in what a reader chooses from.
        each = prometheus.newest(asked["Forwards that waited"])
        instances = next(every for every in BOARD["templating"]["list"] if every["name"] == "instance")
        assert values_of(prometheus, instances) == sorted([one, two])
        total = prometheus.newest(asked["Writes"])
        assert total == pytest.approx([sum(each) / SAMPLED], rel=0.3)
        plain._openmetrics = True
        name = f"sglang_hicache_io_{writes}"
        prometheus.until(lambda: len(prometheus.newest(f"rate({name}[10s])")) == 2)
        assert_everything_has_data(prometheus)
        prometheus.until(lambda: {*firing(prometheus)} == {"HiCacheIoUnsafeFences", "HiCacheIoFallback"})


def firing(prometheus: Prometheus) -> list[str]:
    return [
        each["labels"]["alertname"]
        for each in prometheus.get("alerts")["alerts"]
        if each["state"] == "firing"
    ]


@NEEDED
@pytest.mark.server
def test_every_query_of_the_dashboard_has_data_of_a_real_server(machine: Machine, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\nrules: []\ndefault:\n  because: a test\n"
        "  use: {backend: hybrid, fence_forward: [extend, decode], options: {staging_mb: 1}}\n"
    )
    options = serving.base_args(machine.model, cpu_engine=True, hicache=serving.HiCache("auto"))
    env = {**machine.env(), "SGLANG_HICACHE_IO_POLICY": str(policy)}
    asked = workload.EvictingWorkload(tiny_model.VOCAB_SIZE, conversations=4, turns=1, output_tokens=4)
    server = serving.ServerProcess(
        [*options, "--enable-metrics"], log=tmp_path / "server.log", env=env, launch=machine.launcher
    )
    target = server.url.removeprefix("http://")
    with server, Prometheus(tmp_path / "prometheus", [target], [ALERTS]) as prometheus:
        # Before anything was written: the counters are there, so that the first write is an increase.
        assert_everything_has_data(prometheus_after_scrapes(prometheus), without={*UNTIMED, OF_WRITES})
        assert set(prometheus.newest(dict(queries())["Writes"])) == {0.0}
        workload.run(server, asked, lambda done: None)
        prometheus.until(lambda: max(prometheus.newest(dict(queries())["Writes"])) > 0)
        assert_everything_has_data(prometheus, without=UNTIMED)
        info = prometheus.get("query", query='{__name__=~"sglang[:_]hicache_io_info"}')["result"]
        written = prometheus.get("query", query='{__name__=~"sglang[:_]hicache_io_writes_total"}')["result"]
        counted = server.info()["internal_states"][0]["hicache_io"]["counters"]
        assert firing(prometheus) == []
    (what,) = (each["metric"] for each in info)
    assert what["backend"] == "hybrid"
    assert what["rule"] == "default"
    assert what["fence_forward"] == "extend+decode"
    assert "unsafe_fences" not in what, "an empty label is none"
    assert {what["tp_rank"], what["pp_rank"], what["dp_rank"]} == {"0"}
    assert what["model_name"] == str(machine.model)
    assert sum(float(each["value"][1]) for each in written) == counted["writes"] > 0


def prometheus_after_scrapes(prometheus: Prometheus) -> Prometheus:
    """Once there are two scrapes, which a rate needs."""
    prometheus.until(lambda: prometheus.newest(dict(queries())["Writes"]) != [])
    return prometheus


class _Counted:
    """Stands for the metrics; keeps what is expected of each pool."""

    def __init__(self) -> None:
        self.expected: dict[str, tuple[list[str], list[str]]] = {}

    def expect(self, pool: str, backends: list[str], reasons: list[str]) -> None:
        self.expected[pool] = backends, reasons


def test_each_pool_starts_with_what_may_be_counted_of_it() -> None:
    """A pool that no backend serves has its fallbacks from the start, and no bytes of ours."""
    hybrid, other, again = (SimpleNamespace(name=name) for name in ("hybrid", "copy_engine", "hybrid"))
    pools = [SimpleNamespace(pool_label=name) for name in ("kv", "swa", "mamba")]
    geometry = partial(replace, make_pool("page_first", layers=1, page_size=1, row_bytes=(16,)).geometry)
    known = {
        "kv": KnownPool((), geometry(label="kv"), ()),
        "swa": KnownPool((), geometry(label="swa"), ("too small",), {id(other): "too small"}),
        "mamba": KnownPool((), None, ("not a kind that is known",)),
    }
    counted = _Counted()
    # What backends write is counted under the geometry's name.
    pools[1].pool_label = "as SGLang calls it"
    known["as SGLang calls it"] = known["swa"]

    class Pools:
        def __getitem__(self, pool: Any) -> KnownPool:
            return known[pool.pool_label]

    writeback: Any = SimpleNamespace(pools=Pools(), _backends=(hybrid, other, again), metrics=counted)
    for pool in pools:
        WriteBack.expect(writeback, pool)
    assert counted.expected == {
        "kv": (["hybrid", "copy_engine"], [NOT_WHOLE, TRANSLATED]),
        "swa": (["hybrid"], [NOT_WHOLE, "too small"]),
        "mamba": ([], ["not a kind that is known"]),
    }
