"""Real SGLang servers that must refuse to start, and faults injected into their processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from faults import injected
from faults.injected import CHILDREN, LAUNCHER

from sglang_hicache.bench import server_options, serving, tiny_model

__all__ = ["CHILDREN", "LAUNCHER", "Ended", "Machine", "inject"]

FAULTS = Path(__file__).parent / "faults"


@dataclass(frozen=True)
class Ended:
    """A process that ended by itself."""

    status: int
    output: str

    def lines_of_ours(self) -> list[str]:
        return [line for line in self.output.splitlines() if "sglang-hicache-io:" in line]


@dataclass(frozen=True)
class Machine:
    """A folder with the tiny model and the stand-in driver.

    Attributes:
        cache: the folder.
        python: the command that runs Python, with or without SGLang imported already.
    """

    cache: Path
    python: tuple[str, ...] = (sys.executable,)

    def with_python_of_its_own(self) -> Machine:
        """For what must be different before SGLang is imported, or as it is started by users."""
        return replace(self, python=(sys.executable,))

    @property
    def launcher(self) -> tuple[str, ...]:
        """The command that starts a server."""
        return (*self.python, "-m", "sglang.launch_server")

    @property
    def model(self) -> Path:
        return tiny_model.write(self.cache / "model")

    def env(self) -> dict[str, str]:
        own = server_options.cpu_engine_env(self.cache)
        # As users start it, SGLang imports all of its models.
        return own if self.python == (sys.executable,) else {**own, **tiny_model.environment()}

    def hicache_args(self, backend: str = "auto", *more: str) -> list[str]:
        hicache = server_options.HiCache(backend)
        return [*server_options.base_args(self.model, cpu_engine=True, hicache=hicache), *more]

    def launch(
        self,
        args: list[str],
        *,
        env: dict[str, str] | None = None,
        command: tuple[str, ...] = ("-m", "sglang.launch_server"),
        timeout_s: float = 120,
    ) -> Ended:
        """Run a server that is expected to refuse; a server that comes up is killed and is a failure."""
        port = str(serving.free_port())
        process = subprocess.Popen(
            [*self.python, *command, *args, "--host", "127.0.0.1", "--port", port],
            env={**os.environ, **self.env(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"the server did not refuse to start:\n{output[-3000:]}") from None
        return Ended(process.returncode, output)


def inject(where: str, module: str, code: str) -> dict[str, str]:
    """Variables that run ``code`` right after ``module`` was imported, in ``LAUNCHER`` or ``CHILDREN``."""
    inherited = os.environ.get("PYTHONPATH", "")
    fault = json.dumps({"where": where, "module": module, "code": code})
    return {"PYTHONPATH": f"{FAULTS}:{inherited}" if inherited else str(FAULTS), injected.FAULT: fault}
