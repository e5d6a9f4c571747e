"""Which share of what a model's server writes goes through this project's backends, and what is left.

    python -m sglang_hicache.bench.lab.coverage SERVERS OUT

SERVERS is a JSON list of objects with ``model`` (a folder beside it, with the ``config.json`` of the model)
and ``options`` of its server, which may name another such folder; OUT gets the host pools of each, as
SGLang's own code builds them small on the CPU, for a GPU of :data:`ARCH`. `make tables` makes the table of
docs/coverage.md from it, and a test holds OUT to what this command writes. Needs no GPU; the numbers are of
bytes, not of speed.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...io_backends.sglang.pools.host_pools import HostPool, share_of

ARCH = "sm90"

_MODULE = "sglang_hicache.bench.lab.coverage"  # as a child it is __main__


def servers(listed: Path) -> list[dict[str, Any]]:
    """The host pools of each server of ``listed``, with the SGLang that said so; in a process of its own."""
    from ...io_backends.sglang.no_gpu import fake_libcuda

    with tempfile.TemporaryDirectory(prefix="hicache-io-") as scratch:
        out = Path(scratch, "out.json")
        subprocess.run(
            [sys.executable, "-m", _MODULE, "--here", str(listed.resolve()), str(out)],
            env={
                **os.environ,
                **fake_libcuda.environment(Path(scratch, "libcuda")),
                **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            },
            check=True,
        )
        found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return found


def table(saved: Path) -> str:
    """The Markdown table of what :func:`servers` found."""
    lines = [
        "| model and options | host pools: share of the bytes | through our backends | left, and why |",
        "| --- | --- | --- | --- |",
    ]
    for each in json.loads(saved.read_text(encoding="utf-8")):
        pools = [HostPool.from_dict(pool) for pool in each["pools"]]
        options = f" `{each['options']}`" if each["options"] else ""
        shares = ", ".join(f"{pool.name} {pool.share:.0%}" for pool in pools) or "not known"
        left = "; ".join(f"{pool.name}: {pool.why}" for pool in pools if pool.why) or each["unknown"] or ""
        backends = " or ".join(dict.fromkeys(name for pool in pools if pool.ours for name in pool.writer))
        ours = f"{share_of(pools):.0%} {backends}".strip() if pools else ""
        lines.append(f"| {each['model']}{options} | {shares} | {ours} | {left} |")
    least, together = overall(saved)
    lines += [
        "",
        f"Of the bytes of one prompt for each of these servers, {percent(together)} go through our backends; "
        f"for no server fewer than {percent(least)}.",
    ]
    return "\n".join(lines) + "\n"


def overall(saved: Path) -> tuple[float, float]:
    """The share of the bytes that go through our backends: the least of any server, and of all prompts
    together, 0 to 1. A server whose pools are not known counts as none.
    """
    ours, written, shares = 0.0, 0, []
    for each in json.loads(saved.read_text(encoding="utf-8")):
        pools = [HostPool.from_dict(pool) for pool in each["pools"]]
        shares.append(share_of(pools))
        total = sum(pool.written() for pool in pools)
        ours, written = ours + shares[-1] * total, written + total
    return min(shares), ours / written


def percent(share: float) -> str:
    """Rounded down, so that what is left out is never rounded away."""
    return f"{math.floor(share * 1000) / 10:.1f} %"


def _here(listed: Path, out: Path) -> None:
    """In the process that has SGLang: resolve each server, and build its pools."""
    from ...io_backends.policy_files import default_policy
    from ...io_backends.sglang.diagnose import dry_run_child
    from ...io_backends.sglang.no_gpu.stand_in_gpu import stand_in_gpu
    from ...io_backends.sglang.pools.host_pools import assigned
    from ...policy.decide import decide
    from ...policy.facts import Facts

    stand_in_gpu(ARCH)
    found = []
    for each in json.loads(listed.read_text(encoding="utf-8")):
        answer = dry_run_child.resolve(arguments(listed.parent, each), ARCH)
        decision = decide(default_policy(), Facts.from_dict(answer["facts"]), backend="auto")
        pools = assigned([HostPool.from_dict(pool) for pool in answer.get("pools", ())], decision)
        found.append(
            {
                **each,
                "pools": [pool.to_dict() for pool in pools],
                "unknown": answer.get("pools_unknown"),
            }
        )
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def arguments(folder: Path, server: Mapping[str, str]) -> list[str]:
    """SGLang's arguments of one entry of SERVERS, which lies in ``folder``."""
    model = str(folder / server["model"])
    hicache = ["--enable-hierarchical-cache", "--hicache-io-backend", "auto"]
    options = [str(folder / word) if (folder / word).is_dir() else word for word in server["options"].split()]
    return ["--model-path", model, "--skip-tokenizer-init", *hicache, *options]


def main(words: Sequence[str]) -> None:
    """See the module."""
    if words[0] == "--here":
        _here(*map(Path, words[1:3]))
        return
    listed, out = map(Path, words)
    out.write_text(json.dumps(servers(listed), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
