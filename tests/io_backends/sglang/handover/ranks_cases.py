"""Ranks of one server as processes that share a gloo group, each with a small stand-in for its scheduler.

Run by test_ranks.py as ``python ranks_cases.py RANK WORLD STORE CASE...``; prints ``started`` or the refusal,
a line a case. In each case rank 1 is the odd one.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from sglang_hicache.io_backends.policy_files import default_policy, load_policy_text
from sglang_hicache.io_backends.sglang import versions
from sglang_hicache.io_backends.sglang.errors import RefusedError
from sglang_hicache.io_backends.sglang.handover import ranks
from sglang_hicache.policy.decide import Decision, decide
from sglang_hicache.policy.facts import Facts

PATIENCE_S = 2.0
SERVER: dict[str, Any] = {
    "attention_backend": "fa3",
    "gpu_arch": "sm90",
    "page_size": 64,
    "mem_layout": "page_first",
    "sgl_kernel": "0.4.10",
    "batch_copy": True,
    "device": "cuda",
    "speculative": "none",
    "driver": "580.159.04",
}
OTHER_POLICY = """\
version: 1
rules: []
default: {use: {backend: hybrid, fence_forward: []}, because: a test}
"""


def server(**other: Any) -> Facts:
    return Facts.given(**{**SERVER, **other})


def decision_on(rank: int, case: str) -> Decision:
    if case == "another policy" and rank == 1:
        return decide(load_policy_text(OTHER_POLICY, "node-b.yaml"), server())
    if case == "another launcher's facts" and rank == 1:
        return decide(default_policy(), server(page_size=32))
    return decide(default_policy(), server())


def seen_by(rank: int, case: str) -> Facts:
    others: dict[str, dict[str, Any]] = {
        "another GPU": {"gpu_arch": "sm100"},
        "an older driver": {"batch_copy": False},
        "other kernels": {"sgl_kernel": "0.4.9"},
        "another attention backend": {"attention_backend": "flashinfer"},
        "another launcher's facts": {"page_size": 32},
    }
    return server(**(others.get(case, {}) if rank == 1 else {}))


def outcome(case: str, rank: int, world: int) -> str:
    """What this rank says in `case`, its host's name taken out."""
    scheduler = SimpleNamespace(
        server_args=SimpleNamespace(tp_size=world, pp_size=1),
        world_group=SimpleNamespace(cpu_group=dist.group.WORLD, rank=rank),
    )
    ranks.running_facts = lambda scheduler: seen_by(rank, case)
    if rank == 1 and case == "a rank cannot read its facts":
        ranks.running_facts = lambda scheduler: scheduler.no_such_thing
    refusal = RefusedError("no hook here") if rank == 1 and case == "a rank refuses" else None
    try:
        ranks.agree(scheduler, decision_on(rank, case), refusal, patience_s=PATIENCE_S)
    except RefusedError as error:
        return str(error).replace(socket.gethostname(), "HOST")
    return "started"


def main(rank: int, world: int, store: str, *cases: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    versions.view = lambda server_args: server_args
    for case in cases:
        if rank == 1 and case == "a rank dies":
            os._exit(9)
        if rank == 1 and case == "a rank hangs":
            time.sleep(3 * PATIENCE_S)
            os._exit(9)
        print(outcome(case, rank, world), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    # No clean-up: gloo's threads would keep a process whose peer is gone.
    os._exit(0)
