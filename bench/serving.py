"""Start a real SGLang server, wait for it, and stop it for good.

Used by `hicache-io demo` and by the end-to-end tests. The servers listen on 127.0.0.1 only.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any

from .server_options import HiCache, base_args, cpu_engine_env

__all__ = [
    "LAUNCH",
    "HiCache",
    "ServerError",
    "ServerProcess",
    "StartProgress",
    "base_args",
    "cpu_engine_env",
    "free_port",
    "get_json",
    "log_tail",
    "open_url",
    "server_info",
]

LAUNCH = (sys.executable, "-m", "sglang.launch_server")
"""The command that starts a server."""

# Reports what a server is doing: a few words, and the seconds since its process was started.
StartProgress = Callable[[str, float], None]

# What SGLang logs at the end of each step of its start, and what it does from then on. 0.5.18 to 0.5.23.
_MILESTONES = (
    ("Init parallel begin", "starting the scheduler"),
    ("Init torch distributed begin", "starting the scheduler"),
    ("Load weight begin", "loading the weights"),
    ("Load weight end", "allocating the KV cache"),
    ("KV Cache is allocated", "building the caches"),
    ("Capture cuda graph begin", "capturing CUDA graphs"),
    ("Uvicorn running on", "waiting for the first answer"),
)

# No proxy of the environment may see, or answer, a request to a server on this machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """A server did not start, died, or did not answer.

    Attributes:
        step: what was being done, in a few words.
        reason: what went wrong.
        log_tail: the last lines of the server's log, oldest first.
    """

    def __init__(self, step: str, reason: str, log_tail: Sequence[str] = ()) -> None:
        self.step = step
        self.reason = reason
        self.log_tail = list(log_tail)
        text = f"{step}: {reason}"
        if self.log_tail:
            text += "\nthe server's last lines:\n" + "\n".join(f"  {line}" for line in self.log_tail)
        super().__init__(text)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on at this moment.

    A server binds its port many seconds later. So it is below the range from which systems draw ports of
    their own (32768 and up on Linux), where somebody's connection could have got it by then, and above those
    of which other servers that start meanwhile take one for torch.distributed (22000 to 29999:
    ``get_free_port_below_ephemeral`` of SGLang 0.5.22 and 0.5.23).
    """
    while True:
        port = random.randrange(30_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def open_url(url: str, *, method: str = "GET", body: object | None = None, timeout_s: float = 60) -> Any:
    """Send a request, with `body` as JSON if there is one, and return the open answer, past any proxy.

    Raises:
        OSError: nothing answered within `timeout_s` seconds, or the answer was an HTTP error.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {} if body is None else {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    return _opener.open(request, timeout=timeout_s)


def get_json(url: str, body: object | None = None, *, timeout_s: float = 60) -> Any:
    """GET `url`, or POST `body` to it as JSON, and return the answer.

    Raises:
        OSError: nothing answered within `timeout_s` seconds, or the answer was an HTTP error.
        http.client.HTTPException: the answer was cut off.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with _opener.open(request, timeout=timeout_s) as answer:
        return json.loads(answer.read())


def server_info(url: str) -> dict[str, Any]:
    """What the server at `url` says of itself; `internal_states` has one entry for each scheduler.

    Raises:
        OSError, http.client.HTTPException: see `get_json`.
    """
    info: dict[str, Any] = get_json(f"{url}/server_info")
    return info


class ServerProcess:
    """A running SGLang server, as a context manager.

    Entering starts the process and returns when it answers; leaving kills its whole process group.

    Args:
        args: options of `sglang serve`; `--host` and `--port` are added.
        log: file for everything the server prints, overwritten.
        env: variables on top of this process's own.
        start_timeout_s: how long the start may take, in seconds.
        progress: called about four times a second during the start.
        launch: the command that starts a server; None for `LAUNCH`.

    Attributes:
        url: `http://127.0.0.1:PORT`.
        start_s: seconds from the start of the process to its first good answer.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 300,
        progress: StartProgress | None = None,
        launch: Sequence[str] | None = None,
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.start_s = 0.0
        self._began = 0.0
        self._command = [*(launch or LAUNCH), *args, "--host", "127.0.0.1", "--port", str(port)]
        self._env = {
            **os.environ,
            # Healthy then means "up": the health check sends no request of its own, which would take a
            # second and would be counted among the workload's.
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **(env or {}),
        }
        self._start_timeout_s = start_timeout_s
        self._progress = progress or (lambda what, seconds: None)
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: str | None = None
        self._closing = threading.Lock()

    def __enter__(self) -> ServerProcess:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        atexit.register(self.close)
        try:
            # SGLang leaves sockets and files in the temporary folder, so it gets its own, with a name short
            # enough for a socket.
            self._scratch = tempfile.mkdtemp(prefix="hicache-")
            with self.log.open("wb") as log:
                # A group of its own: SGLang's schedulers outlive a killed parent, the group does not.
                self._process = subprocess.Popen(
                    self._command,
                    env={**self._env, "TMPDIR": self._scratch},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._wait_until_healthy()
        except BaseException:
            self.close()
            raise
        self.start_s = self.elapsed_s()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the server and everything it started. Harmless when it is gone already."""
        with self._closing:
            atexit.unregister(self.close)
            if self._process is not None:
                # Killed, not asked: SGLang takes five seconds to end and has nothing to save. The group is
                # there as long as one member is, even after its leader has ended.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                # The others end a moment later; the next server may need their memory.
                deadline = time.monotonic() + 3
                with contextlib.suppress(ProcessLookupError):
                    while time.monotonic() < deadline:
                        os.killpg(self._process.pid, 0)
                        time.sleep(0.02)
                self._process = None
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
                self._scratch = None

    def pause(self) -> None:
        """Stop all of its processes until :meth:`resume`.

        An idle scheduler of SGLang polls, and so takes a CPU. While stopped, of all signals SIGKILL alone
        ends them.
        """
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them run again, if they were stopped."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def post(self, path: str, body: object, *, timeout_s: float = 120) -> Any:
        """POST `body` as JSON and return the answer.

        Raises:
            ServerError: no answer within `timeout_s` seconds, or an HTTP error.
        """
        try:
            return get_json(self.url + path, body, timeout_s=timeout_s)
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")[:500]
            raise self.error(f"POST {path}", f"HTTP {error.code}: {detail}") from error
        except (OSError, HTTPException) as error:
            raise self.error(f"POST {path}", self._exit_status() or str(error)) from error

    def info(self) -> dict[str, Any]:
        """`server_info` of this server.

        Raises:
            ServerError: no answer, or an HTTP error.
        """
        try:
            return server_info(self.url)
        except (OSError, HTTPException) as error:
            raise self.error("GET /server_info", self._exit_status() or str(error)) from error

    def elapsed_s(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self._began

    def error(self, step: str, reason: str) -> ServerError:
        """An error that carries the last lines of this server's log."""
        return ServerError(step, reason, log_tail(self.log))

    def _exit_status(self) -> str | None:
        status = None if self._process is None else self._process.poll()
        return None if status is None else f"the server's process ended with status {status}"

    def _wait_until_healthy(self) -> None:
        while True:
            seconds = self.elapsed_s()
            what = _milestone(self.log)
            self._progress(what, seconds)
            if ended := self._exit_status():
                raise self.error(f"starting the server, while {what}", ended)
            if seconds > self._start_timeout_s:
                raise self.error(
                    f"starting the server, while {what}", f"not up after {self._start_timeout_s:.0f} s"
                )
            with contextlib.suppress(OSError, HTTPException), _opener.open(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.25)


def log_tail(log: Path, lines: int = 25) -> list[str]:
    """The last lines of a server's log, long ones cut; what SGLang always prints is left out."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 200_000))
        text = file.read().decode(errors="replace")
    noise = re.compile(
        r'"(GET|POST) /|server_args=|(Prefill|Decode) batch|Ignore import error|UserWarning|warnings\.warn'
    )
    kept = [line for line in text.splitlines() if line.strip() and not noise.search(line)]
    return [line if len(line) <= 300 else line[:300] + " …" for line in kept[-lines:]]


def _milestone(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    reached = [doing for sign, doing in _MILESTONES if sign in text]
    return reached[-1] if reached else "importing SGLang"
