"""What ``hicache-io doctor`` says of one server's memory: its host pools, and how device pools are mapped.

``bad`` is what this machine can never hold, or what does not start; what only others hold now is a warning,
since the server that is asked about may be one that runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ....policy.gpu_names import memory_gib
from . import host_memory, pool_sizes
from .checks import BAD, OK, WARNING, Finding
from .dry_run import Server
from .host_memory import MachineMemory, Room
from .memory_checks import HUGE_PAGES, ROOT, gib
from .pool_sizes import RESERVE, Need, Sizing

_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def memory(asked: Server, machine_arch: object = None, root: Path = ROOT) -> Iterator[Finding]:
    """Of a server with HiCache: its host pools, and device memory that is mapped piece by piece.

    Args:
        asked: the server.
        machine_arch: this machine's GPU architecture; None: unknown, or there is none.
        root: the folder below which this machine's files are.
    """
    if not asked.hicache or asked.sizing is None:
        return
    found = host_memory.memory(root)
    arch = asked.facts.value("gpu_arch")
    if _in_container(asked) or (arch != "cpu" and arch != machine_arch):
        found = None
    yield _host_pools(asked, asked.sizing, found)
    if arch != "cpu":
        yield from _mapped_memory(asked)


def _in_container(asked: Server) -> bool:
    """Whether its memory has limits that this process does not: those of a container in the text."""
    return asked.command is not None and not asked.command.inherits


def _host_pools(asked: Server, sizing: Sizing, found: MachineMemory | None) -> Finding:
    need = pool_sizes.by_size(sizing, asked.pools)
    if need is not None:
        return _sized(asked, sizing, need, found)
    if sizing.fraction is not None:
        return _fitted(sizing, sizing.fraction, found)
    return _by_ratio(asked, sizing, found)


def _sized(asked: Server, sizing: Sizing, need: Need, found: MachineMemory | None) -> Finding:
    total = need.bytes * sizing.here
    text = f"{gib(total)} a machine: {_ranks(sizing)} x {gib(need.bytes)} (--hicache-size is for each rank)"
    if found is None:
        return Finding("host pools", OK, f"{text}; not compared: {_ELSEWHERE}", _ROOM)
    ever, now = found.ever(), found.now()
    huge_pages = bool(_variable(asked, HUGE_PAGES))
    # Stages of a pipeline have as many tokens each, and not as many bytes: known is the largest alone.
    too_much = total > ever.within and sizing.stages == 1
    if (too_much or pool_sizes.refused(sizing, need, ever)) and not huge_pages:
        means = f"it can never start here, with {gib(ever.within)}{_by(ever)} less SGLang's reserve"
        return Finding("host pools", BAD, f"{text}; {means}, 10 GiB", f"{_fits(sizing, need, ever)} here")
    if total + RESERVE <= now.within:
        return Finding("host pools", OK, f"{text}; {gib(now.within)} are free here")
    if pool_sizes.refused(sizing, need, now):
        means = "SGLang would not start now: it leaves 10 GiB of that free"
    else:
        means = f"SGLang {_blind(sizing)} would start, and leave less than 10 GiB"
    return Finding(
        "host pools",
        WARNING,
        f"{text}; {gib(now.within)}{_by(now)} are free here, and {means}",
        f"stop what holds memory here, unless that is this server; now {_fits(sizing, need, now)}",
    )


def _blind(sizing: Sizing) -> str:
    if not sizing.in_cgroups:
        return "does not look at cgroups,"
    return "compares each replica alone," if sizing.replicas > 1 else "compares each pool alone,"


def _fits(sizing: Sizing, need: Need, room: Room) -> str:
    size = pool_sizes.fitting(sizing, need, room)
    return f"--hicache-size {size} fits at most" if size else "no --hicache-size fits"


def _fitted(sizing: Sizing, fraction: float, found: MachineMemory | None) -> Finding:
    text = (
        f"SGLang lowers the ratio ({sizing.ratio or 'its own'}) until they fit in {fraction:.0%} of "
        "what is free, less 10 GiB"
    )
    if found is None:
        return Finding("host pools", OK, f"{text}; not compared: {_ELSEWHERE}", _ROOM)
    ever, now = (int((room.within - RESERVE) * fraction) for room in (found.ever(), found.now()))
    if found.unread:
        return Finding(
            "host pools", BAD, f"{text}: it does not start where limits of cgroups cannot be read", _EXPLICIT
        )
    if ever <= 0:
        return Finding("host pools", BAD, f"{text}: nothing is left of this machine's memory", _EXPLICIT)
    if now <= 0:
        return Finding(
            "host pools",
            WARNING,
            f"{text}: nothing is left now, {gib(found.now().within)} are free",
            "stop what holds it, unless that is this server",
        )
    if sizing.replicas > 1:
        return Finding(
            "host pools",
            WARNING,
            f"{text}; each of {sizing.replicas} replicas does so alone, and may count on what another takes",
            _EXPLICIT,
        )
    return Finding("host pools", OK, f"{text}: here at most {gib(now)} for {_ranks(sizing)}")


def _by_ratio(asked: Server, sizing: Sizing, found: MachineMemory | None) -> Finding:
    gpu = _gpu_bytes(asked)
    most = pool_sizes.by_ratio(sizing, asked.pools, gpu)
    if sizing.ratio is None:
        text = "SGLang decides the ratio when this server starts: how much they take is not known before"
    elif most is None:
        text = f"{sizing.ratio:g} times the device pool: not known without the GPU's memory"
    else:
        text = (
            f"at most {gib(most * sizing.here)} a machine: {_ranks(sizing)} x {sizing.ratio:g} times the "
            "device pool, less what the weights leave it"
        )
    do = "" if most is not None else "give --gpu-memory, or the server --hicache-size"
    if found is None:
        return Finding("host pools", OK, f"{text}; not compared: {_ELSEWHERE}", do)
    now = found.now().within
    fits = most is not None and most * sizing.here + RESERVE <= now
    text = f"{text}; {gib(now)} are free here"
    return Finding("host pools", OK if fits else WARNING, text, "" if fits else do or _EXPLICIT)


_ELSEWHERE = "the memory of its machine is not known here"
_ROOM = "room for that and 10 GiB more on its machine, and in its container's limit"
_EXPLICIT = "give --hicache-size (GB for each rank), so that it is known"


def _gpu_bytes(asked: Server) -> int | None:
    name = asked.facts.value("gpu_name")
    size = asked.gpu_gib or (memory_gib(str(name)) if name else None)
    return size * 2**30 if size else None


def _ranks(sizing: Sizing) -> str:
    return f"{sizing.here} rank{'' if sizing.here == 1 else 's'}"


def _by(room: Room) -> str:
    return f" ({room.limit})" if room.limit else ""


def _mapped_memory(asked: Server) -> Iterator[Finding]:
    """Device memory of the driver's virtual memory calls (cuMemMap), which may be of several pieces."""
    by = [name for name in _ALLOCATOR if _expandable(_variable(asked, name))]
    # The very words that it looks for (_sanity_checks in its entrypoint.py), and the one variable.
    if by and asked.memory_saver and "expandable_segments:True" in _variable(asked, _ALLOCATOR[0]):
        yield Finding(
            "GPU memory",
            BAD,
            f"would not start: torch_memory_saver refuses expandable_segments:True in {by[0]}",
            f"unset {by[0]}, or leave out --enable-memory-saver",
        )
        return
    if by:
        yield Finding(
            "GPU memory",
            OK,
            f"{by[0]} has expandable_segments:True: pools lie in pieces that are mapped side by side. Batch "
            "copies (cuMemcpyBatchAsync) across these were right on an H200, and so were all answers of a "
            "server with them (driver 580.159, bench/results/2026-11-27-h200-models)",
        )
    if asked.memory_saver:
        yield Finding(
            "memory saver",
            WARNING,
            "--enable-memory-saver maps device pools with cuMemMap. Batch copies from them were right in a "
            "server on an H200 (bench/results/2026-11-27-h200-models). Not tried there: "
            "/release_memory_occupation, which unmaps them without waiting for copies; before, SGLang "
            "asserts that no write-back is unfinished",
            "release only when the server is idle",
        )


def _variable(asked: Server, name: str) -> str:
    """As the server has it: from its text, else from the process around it."""
    command = asked.command
    if command is not None and name in command.variables:
        return command.variables[name] or ""
    return "" if _in_container(asked) else os.environ.get(name, "")


def _expandable(text: str) -> bool:
    """As torch reads ``name:value,name:value``."""
    pairs = (field.partition(":") for field in text.split(","))
    return any(
        name.strip() == "expandable_segments" and value.strip().lower() == "true" for name, _, value in pairs
    )
