"""Real SGLang servers that must refuse to start, and faults injected into their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from sglang_hicache.bench import server_options, serving, tiny_model

LAUNCHER, CHILDREN = "launcher", "children"
"""Where a fault goes: the process that was started, or those that it spawned."""


@dataclass(frozen=True)
class Ended:
    """A process that ended by itself."""

    status: int
    output: str

    def lines_of_ours(self) -> list[str]:
        return [line for line in self.output.splitlines() if "sglang-hicache-io:" in line]


@dataclass(frozen=True)
class Machine:
    """A folder with the tiny model and the stand-in driver."""

    cache: Path

    @property
    def model(self) -> Path:
        return tiny_model.write(self.cache / "model")

    def env(self) -> dict[str, str]:
        return server_options.cpu_engine_env(self.cache)

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
            [sys.executable, *command, *args, "--host", "127.0.0.1", "--port", port],
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


def inject(folder: Path, where: str, module: str, code: str) -> dict[str, str]:
    """Run ``code`` right after ``module`` was imported, in the launcher or in the processes it spawns.

    Returns the environment that does it, through a ``sitecustomize`` of its own in ``folder``.
    """
    text = f"""
        import sys
        child = any("multiprocessing.spawn" in word for word in getattr(sys, "orig_argv", []))
        if child == {where == CHILDREN!r}:
            import importlib.abc, importlib.util

            class Finder(importlib.abc.MetaPathFinder):
                def find_spec(self, name, path, target=None):
                    if name != {module!r}:
                        return None
                    sys.meta_path.remove(self)
                    spec = importlib.util.find_spec(name)
                    run = spec.loader.exec_module

                    def exec_module(module):
                        run(module)
                        exec({code!r}, vars(module))

                    spec.loader.exec_module = exec_module
                    return spec

            sys.meta_path.insert(0, Finder())
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(textwrap.dedent(text))
    inherited = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": f"{folder}:{inherited}" if inherited else str(folder)}
