"""Host pools of command lines, predicted by one SGLang release, and the memory that its own pools hold.

Run by test_prediction.py as ``python prediction_cases.py GPU_ARCH``, that release and the folder of
resolve_cases.py first on PYTHONPATH: reads a JSON list of argument lists, prints ``ANSWERS`` and the release
with an answer for each.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

from resolve_cases import older_releases_import

from sglang_hicache.io_backends.sglang import versions
from sglang_hicache.io_backends.sglang.diagnose import dry_run_child
from sglang_hicache.io_backends.sglang.no_gpu.stand_in_gpu import stand_in_gpu
from sglang_hicache.io_backends.sglang.pools import prediction
from sglang_hicache.io_backends.sglang.pools.geometry import WITHOUT_BYTES


def held(pool: Any) -> float:
    """Bytes of a pool's host memory for each record that it holds, counted on the tensors themselves."""
    import torch

    pool = vars(pool).get("host_pool", pool)  # behind the slots of sharded rows
    storages: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, torch.Tensor):  # views of one buffer lie inside it
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            for each in value:
                count(each)

    for name, value in vars(pool).items():
        ours = "buffer" in name or "scale_host" in name
        if ours and "device" not in name and "staging" not in name:
            count(value)
    # An index pool has a page more than its size says.
    paged = hasattr(pool, "item_bytes") or hasattr(pool, "state_page_bytes")
    pages = pool.size // pool.page_size if paged else pool.size
    return sum(storages.values()) / int(getattr(pool, "indexer_page_num", pages))


def answer(argv: list[str]) -> dict[str, Any]:
    built: list[tuple[str, Any, Any]] = []
    build = prediction._built

    def noted(server_args: Any) -> Any:
        entries, window, cache = build(server_args)
        built.extend(entries)
        return entries, window, cache

    prediction._built = noted
    try:
        found = dry_run_child.resolve(argv, sys.argv[1])
    except (Exception, SystemExit) as error:
        return {"refused": f"{type(error).__name__}: {error}", "where": traceback.format_exc()[-1500:]}
    finally:
        prediction._built = build
    memory = {name: held(pool) for name, pool, _ in built if type(pool).__name__ not in WITHOUT_BYTES}
    return {"pools": found.get("pools"), "unknown": found.get("pools_unknown"), "held": memory}


def main() -> None:
    stand_in_gpu(sys.argv[1])
    older_releases_import()
    # An older scheduler cannot be imported beside these kernels; its hook points are compared as source.
    setattr(versions, "check_points", lambda points, version: None)  # noqa: B010
    answers = [answer(argv) for argv in json.loads(sys.stdin.read())]
    print("ANSWERS", json.dumps([versions.installed(), answers]), flush=True)


if __name__ == "__main__":
    main()
