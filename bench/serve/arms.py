"""The ways of write-back that are compared: what each server is started with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ...io_backends.registry import AUTO, OWN_NAMES
from ...io_backends.sglang import unsafe
from ...io_backends.sglang.unsafe import CONFIRM, NULL
from ...policy.names import check_name
from .. import damaged
from ..serving import HiCache, base_args
from . import null_backend
from .models import ServedModel

DEFAULT = "kernel"
"""SGLang's own choice, which others are compared with."""
NONE = "none"
"""A server without HiCache."""

FENCED_KERNEL = "fenced_kernel"

SGLANGS = ("kernel", "direct")
EXPERIMENTS = {f"unsafe-{fences}": fences for fences in unsafe.CHOICES}
"""``fenced_kernel`` with that many of its fences: experiments A, B and C, see its option's module."""

OTHER_CODE = "@"
"""``auto@NAME``: ``auto`` as another checkout of this project, called NAME, has it."""

ARMS = (NONE, *SGLANGS, *OWN_NAMES, AUTO, NULL, damaged.NAME, *EXPERIMENTS)
"""``null`` copies nothing, ``damaged`` loses a layer: a limit for times, and a proof for outputs."""


CPU_POOL_TOKENS = 4096
CPU_PAGE = 16
"""Of servers on the CPU engine: small enough to overflow in seconds."""


@dataclass(frozen=True)
class Cell:
    """What all servers of a comparison have in common.

    Attributes:
        name: of the cell.
        model: what is served.
        page_size: tokens a page.
        mem_layout: ``--hicache-mem-layout``; None leaves SGLang's default.
        pool_tokens: capacity of the device pool.
        ratio: tokens in the host pool for each in the device pool.
        tp: tensor parallel size.
        deterministic: ``--enable-deterministic-inference``; outputs are compared then.
        tokenizer: whether servers have a tokenizer, which SGLang's own benchmark needs.
        cpu_engine: on SGLang's CPU engine.
        more: further options of every server, ``--attention-backend`` and the like.
    """

    name: str
    model: ServedModel
    page_size: int = 64
    mem_layout: str | None = None
    pool_tokens: int = 65_536
    ratio: float = 3.0
    tp: int = 1
    deterministic: bool = False
    tokenizer: bool = False
    cpu_engine: bool = False
    more: tuple[str, ...] = ()

    def exact(self) -> bool:
        """Whether the same prompt must get the same answer from every arm."""
        return self.model.real_weights and (self.deterministic or self.cpu_engine)


def check_arms(names: Sequence[str]) -> None:
    """Raises NameProblem for an arm that there is none of."""
    for name in names:
        check_name("arm", plain(name), ARMS)


def plain(arm: str) -> str:
    """An arm without the name of the code that serves it."""
    return arm.partition(OTHER_CODE)[0]


def unserved(arm: str, *, cpu: bool) -> str | None:
    """Why an arm cannot be served here, or None."""
    if cpu and plain(arm) in SGLANGS:
        return f"arm {arm}: SGLang's own write-back needs CUDA, and this is its CPU engine"
    return None


def server_args(cell: Cell, arm: str) -> list[str]:
    """Options of the arm's server."""
    arm = plain(arm)
    hicache = None
    if arm != NONE:
        backend = FENCED_KERNEL if arm in EXPERIMENTS else arm
        hicache = HiCache(backend, cell.mem_layout, cell.ratio)
    options = base_args(
        cell.model.path,
        cpu_engine=cell.cpu_engine,
        page_size=cell.page_size,
        max_total_tokens=cell.pool_tokens,
        hicache=hicache,
    )
    if cell.tokenizer:
        options.remove("--skip-tokenizer-init")
    # Without incremental output each token repeats all before it, and the client parses for most of its time.
    options += ["--enable-metrics", "--incremental-streaming-output", *cell.model.args]
    if cell.tp > 1:
        options += ["--tp", str(cell.tp)]
    if cell.deterministic and not cell.cpu_engine:
        options.append("--enable-deterministic-inference")
    if arm == NULL:
        options.append(CONFIRM)
    if arm in EXPERIMENTS:
        options += [unsafe.OPTION, EXPERIMENTS[arm], CONFIRM]
    return [*options, *cell.more]


def server_env(arm: str, folder: Path, code: Mapping[str, Path] = MappingProxyType({})) -> dict[str, str]:
    """Variables that make an arm known to its server which is in no installation; written into ``folder``.

    Args:
        arm: its name.
        folder: for what must lie somewhere.
        code: where other checkouts are importable, by name; they come before what is importable already,
            and in place of a checkout that is so by ``PYTHONPATH``.
    """
    if plain(arm) == NULL:
        env = null_backend.environment(folder.resolve())
    elif plain(arm) == damaged.NAME:
        env = damaged.environment(folder.resolve())
    else:
        env = {}
    name = arm.partition(OTHER_CODE)[2]
    if name:
        paths = env.get("PYTHONPATH", os.environ.get("PYTHONPATH", "")).split(os.pathsep)
        kept = [path for path in paths if path and not (Path(path) / "sglang_hicache").exists()]
        env["PYTHONPATH"] = os.pathsep.join([str(code[name]), *kept])
    return env
