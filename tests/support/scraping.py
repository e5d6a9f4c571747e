"""A real Prometheus, for tests, where one is installed."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

import pytest

from sglang_hicache.bench import serving

NEEDED = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no `prometheus` on PATH (Debian: apt-get install prometheus)"
)


class Prometheus:
    """Scrapes targets every second, as a context manager.

    Args:
        folder: for its configuration, its log and what it stores.
        targets: ``host:port``, each with ``/metrics``.
        rules: files of rules to load.
    """

    def __init__(self, folder: Path, targets: Sequence[str], rules: Sequence[Path] = ()) -> None:
        self._folder = folder
        self._port = serving.free_port()
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
            f"rule_files: {[str(path) for path in rules]}\n"
            f"scrape_configs: [{{job_name: sglang, static_configs: [{{targets: {list(targets)}}}]}}]\n"
        )

    def __enter__(self) -> Prometheus:
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={self._folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.until(lambda: self._ready())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _ready(self) -> bool:
        with contextlib.suppress(OSError), serving.open_url(f"http://127.0.0.1:{self._port}/-/ready"):
            return True
        return False

    def until(self, holds: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something holds; fails after so many seconds."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, (self._folder / "log").read_text()[-2000:]
            time.sleep(0.2)

    def get(self, path: str, **asked: Any) -> Any:
        """``data`` of an answer of its API."""
        answer = serving.get_json(
            f"http://127.0.0.1:{self._port}/api/v1/{path}?{urlencode(asked, doseq=True)}"
        )
        assert answer["status"] == "success", answer
        return answer["data"]

    def newest(self, query: str) -> list[float]:
        """The newest value of each series of a query over the last minute, as Grafana asks it."""
        now = time.time()
        found = self.get("query_range", query=query, start=now - 60, end=now, step=1)
        return [float(series["values"][-1][1]) for series in found["result"]]
