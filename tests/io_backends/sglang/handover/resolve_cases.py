"""Command lines resolved by one SGLang release, as for a server on a stand-in GPU.

Run by test_server_facts.py as ``python resolve_cases.py GPU_ARCH``, that release first on PYTHONPATH: reads
a JSON list of argument lists, prints ``ANSWERS`` and the list of decisions, null where none was made.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from sglang_hicache.io_backends.sglang import versions
from sglang_hicache.io_backends.sglang.launcher import resolution
from sglang_hicache.io_backends.sglang.no_gpu.stand_in_gpu import stand_in_gpu


def older_releases_import() -> None:
    """Releases before 0.5.20 register model types that the installed transformers has by now."""
    from transformers.models.auto import configuration_auto as auto

    register = auto._LazyConfigMapping.register
    auto._LazyConfigMapping.register = lambda self, key, value, exist_ok=False: register(
        self, key, value, exist_ok=True
    )


def decision(argv: list[str]) -> Any:
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(argv)
    if hasattr(server_args, "resolve_once"):
        server_args.resolve_once()
    carried = getattr(server_args, "_hicache_io", None)
    return None if carried is None else carried.decision


def main() -> None:
    stand_in_gpu(sys.argv[1])
    older_releases_import()
    # An older scheduler cannot be imported beside these kernels; its hook points are compared as source.
    resolution.versions.check_points = lambda points, version: None
    from sglang.srt.plugins import load_plugins

    load_plugins()
    decisions = [decision(argv) for argv in json.loads(sys.stdin.read())]
    print("ANSWERS", json.dumps([versions.installed(), decisions]), flush=True)


if __name__ == "__main__":
    main()
