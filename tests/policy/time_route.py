"""What routing one write costs, for the docstring of `Decision.route`: python tests/policy/time_route.py"""

from __future__ import annotations

import platform
import timeit
from dataclasses import replace

from sglang_hicache.io_backends.policy_files import default_policy
from sglang_hicache.policy.decide import decide
from sglang_hicache.policy.facts import Facts
from sglang_hicache.policy.routes import WriteFacts

WRITE = WriteFacts(tokens=4096, entries=72, nbytes=604_000_000, runs=1)
REPEATS = 200_000


def main() -> None:
    """Three routes of two conditions each, of which none but the last holds."""
    shipped = decide(default_policy(), Facts.given(gpu_arch="sm80"))
    last = shipped.routes[-1]
    two = replace(last, when={"write_entry_bytes": ("<=131072",), "write_contiguous": (True,)})
    other = replace(last, when={"write_tokens": (">=16",), "write_entries": (">100000",)})
    decision = replace(shipped, routes=(two, other, last))
    assert decision.route(WRITE) == 2
    best = min(timeit.repeat(lambda: decision.route(WRITE), number=REPEATS, repeat=3)) / REPEATS
    print(f"{best * 1e6:.1f} us a write, CPython {platform.python_version()}")


if __name__ == "__main__":
    main()
