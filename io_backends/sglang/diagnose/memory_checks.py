"""What ``hicache-io doctor`` says of this machine's memory: what it has, and what limits it."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

from . import host_memory
from .checks import OK, WARNING, Finding
from .host_memory import MachineMemory

ROOT = Path("/")
"""Where ``proc`` and the cgroups are."""

HUGE_PAGES = "SGLANG_HUGEPAGE_SIZE"
"""The variable with which SGLang takes host pools from huge pages."""

_IPC_LOCK = 1 << 14
"""CAP_IPC_LOCK, as ``CapEff`` in /proc/self/status counts: lifts the limit on locked memory (mlock(2))."""


def machine(root: Path = ROOT) -> Iterator[Finding]:
    """Host memory, what limits it, and what pinning meets here."""
    yield _locked_memory(root)
    found = host_memory.memory(root)
    if found is None:
        yield Finding("host memory", WARNING, "unknown: there is no /proc/meminfo that can be read here")
    else:
        yield Finding(
            "host memory", OK, f"{gib(found.available)} available of {gib(found.total)}: host pools count"
        )
        yield _container(found)
        if found.huge:
            yield _huge_pages(found)
    yield from _wsl(root)


def _locked_memory(root: Path) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("locked memory", OK, "no limit (ulimit -l)")
    limit = f"ulimit -l is {soft // 1024:,} KiB"
    if _capabilities(root) & _IPC_LOCK:
        return Finding("locked memory", OK, f"{limit}, which CAP_IPC_LOCK lifts")
    return Finding(
        "locked memory",
        WARNING,
        f"{limit}: RDMA (Mooncake, NIXL, NCCL) fails to register more (ibv_reg_mr: ENOMEM, "
        "NVIDIA/nvidia-container-toolkit#2037); no report says so of host pools, which CUDA pins",
        "where RDMA is used: docker run --ulimit memlock=-1, LimitMEMLOCK=infinity in the systemd unit (of "
        "containerd too), or in Kubernetes IPC_LOCK, for root alone. Slow host pools in containers (#21880) "
        "are not cured by it",
    )


def _capabilities(root: Path) -> int:
    try:
        status = (root / "proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    found = re.search(r"^CapEff:\s*([0-9a-fA-F]+)$", status, re.M)
    return int(found[1], 16) if found else 0


def _container(found: MachineMemory) -> Finding:
    limit = found.tightest
    if found.unread:
        return Finding(
            "container memory",
            WARNING,
            f"limits of cgroups cannot be read: {found.unread}",
            "give --hicache-size, with room for all ranks in what the container may have: SGLang itself then "
            "looks at the whole machine, or does not start",
        )
    if limit is None:
        return Finding("container memory", OK, "no limit seen (cgroup)")
    return Finding(
        "container memory",
        OK,
        f"{gib(limit.free)} left of {gib(limit.bytes)} ({limit.path}): host pools count",
    )


def _huge_pages(found: MachineMemory) -> Finding:
    unused = f"{gib(found.huge_free)} of them unused"
    return Finding(
        "huge pages",
        WARNING if found.huge_free else OK,
        f"{gib(found.huge)} are set aside (vm.nr_hugepages), {unused}; host pools use them only with "
        f"{HUGE_PAGES}",
        f"{HUGE_PAGES}=2MB or 1GB for the server, or fewer huge pages" if found.huge_free else "",
    )


def _wsl(root: Path) -> Iterator[Finding]:
    try:
        version = (root / "proc/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    if "microsoft" not in version.lower():
        return
    yield Finding(
        "WSL2",
        WARNING,
        "pinned memory is limited (NVIDIA's CUDA on WSL guide; 0.5 GB in microsoft/WSL#14078), and the GPU "
        "sees registered memory under other addresses than the host: there SGLang's own batch copies fault "
        "(#40232). Our backends translate them; tried with a stand-in for the driver, not on WSL2",
        "start with a small --hicache-size and --hicache-io-backend auto",
    )


def gib(nbytes: float) -> str:
    """As people read it."""
    return f"{nbytes / 2**30:,.1f} GiB"
