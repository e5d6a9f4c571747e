"""Whether a server with HiCache answers as the same server without it.

A wrong byte in the host tier is silent: the request that reads it back gets a fluent, different answer. So
outputs are compared, and the check proves itself: a run whose write-back is damaged on purpose must differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import damaged, serving, workload
from ..workload import Answer, EvictingWorkload

# Told what a run is doing: a few words, answers so far, and seconds since the server was started.
Status = Callable[[str, int, float], None]


@dataclass(frozen=True)
class DemoSetup:
    """What all runs of one check have in common.

    Attributes:
        model: folder or name of the model.
        cpu_engine: on SGLang's CPU engine; otherwise on this machine's GPU.
        page_size: tokens a KV cache page.
        mem_layout: `--hicache-mem-layout`; None leaves SGLang's default.
        env: variables of every server.
        logs: folder for the servers' logs.
        workload: what each server is asked.
        device_pool_tokens: capacity of the device pool, smaller than the workload.
        reference_pool_tokens: the same for the server without HiCache. Where it is smaller than the workload,
            that server computes evicted prefixes again, which rounds otherwise than the first time.
        launch: the command that starts a server; None for that of `serving.ServerProcess`.
    """

    model: str
    cpu_engine: bool
    page_size: int
    mem_layout: str | None
    env: Mapping[str, str]
    logs: Path
    workload: EvictingWorkload
    device_pool_tokens: int = 4096
    reference_pool_tokens: int = 4096
    launch: Sequence[str] | None = None


@dataclass(frozen=True)
class DemoRun:
    """One server's answers, and what the plug-in counted there.

    Attributes:
        name: of the run, and of its log file.
        backend: `--hicache-io-backend`; None for the reference, which has no HiCache.
        answers: in the order of the workload.
        plugin: the plug-in's own account from `/server_info`; None where it did not run.
        version: of SGLang in the server.
        start_s: seconds until the server was up.
        log: what the server printed.
    """

    name: str
    backend: str | None
    answers: Sequence[Answer]
    plugin: Mapping[str, Any] | None
    version: str
    start_s: float
    log: Path

    @property
    def damaged(self) -> bool:
        """Whether the write-back was wrong on purpose."""
        return self.backend == damaged.NAME

    @property
    def host_tokens(self) -> int:
        """Tokens of all prompts together that came back from the host tier."""
        return sum(answer.host_tokens for answer in self.answers)

    def count(self, counter: str) -> int:
        """One of the plug-in's counters, 0 where the plug-in did not run."""
        return int(self.plugin["counters"][counter]) if self.plugin else 0

    def identical(self, reference: DemoRun) -> int:
        """How many answers are the reference's."""
        return workload.identical(self.answers, reference.answers)

    def problem(self, reference: DemoRun) -> str | None:
        """What is wrong with this run, in a sentence; None when it is as it must be."""
        if self.plugin is None:
            return "the plug-in did not run in the server (hicache_io is missing from /server_info)"
        if self.host_tokens == 0:
            return "no token came back from the host tier, so the outputs say nothing about the write-back"
        same, all_of_them = self.identical(reference), len(reference.answers)
        if self.damaged and same == all_of_them:
            return "a damaged write-back went unnoticed: the check cannot see what it is there to see"
        if not self.damaged and same != all_of_them:
            return f"{all_of_them - same} of {all_of_them} outputs differ from the reference"
        return None


def plugin_state(info: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plug-in's account in a `/server_info` answer, counters summed over schedulers; None without one."""
    states = [state["hicache_io"] for state in info["internal_states"] if "hicache_io" in state]
    if not states:
        return None
    counters = {key: sum(state["counters"][key] for state in states) for key in states[0]["counters"]}
    return {**states[0], "counters": counters}


def run(setup: DemoSetup, name: str, backend: str | None, *, status: Status) -> DemoRun:
    """Start a server, send it the workload, and stop it.

    Args:
        setup: what all runs have in common.
        name: of the run; its log is `NAME.log`.
        backend: `--hicache-io-backend`, or None for a server without HiCache.
        status: told what happens, from several threads.

    Raises:
        ServerError: the server did not start, died, or did not answer.
    """
    options = serving.base_args(
        setup.model,
        cpu_engine=setup.cpu_engine,
        page_size=setup.page_size,
        max_total_tokens=setup.reference_pool_tokens if backend is None else setup.device_pool_tokens,
        hicache=None if backend is None else serving.HiCache(backend, setup.mem_layout),
    )
    server = serving.ServerProcess(
        options,
        log=setup.logs / f"{name}.log",
        env=setup.env,
        launch=setup.launch,
        progress=lambda what, seconds: status(f"starting: {what}", 0, seconds),
    )
    with server:
        answers = workload.run(
            server, setup.workload, lambda done: status("sending requests", done, server.elapsed_s())
        )
        info = server.info()
    status("done", len(answers), server.elapsed_s())
    return DemoRun(name, backend, answers, plugin_state(info), info["version"], server.start_s, server.log)
