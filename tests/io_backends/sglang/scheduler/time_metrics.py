"""What metrics cost a write: run by hand, prints it for this machine's CPU.

As in a server: SGLang's multi-process mode, where every count is a write to a mapped file.
"""

from __future__ import annotations

import os
import tempfile
import timeit

NUMBER = 20_000


class Ring:
    name = "hybrid"
    staging_bytes = (1, 2)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # prometheus_client reads it when it is imported.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        import prometheus_client

        from sglang_hicache.io_backends import Submission
        from sglang_hicache.io_backends.sglang.metrics import Metrics

        metrics = Metrics({"cache_type": "UnifiedRadixCache", "tp_rank": "0"}, prometheus_client)
        submission, backend = Submission(copies=4, nbytes=1000), Ring()

        def write() -> None:
            metrics.wrote(backend, "kv", submission, short=True)
            metrics.transferred(["hybrid"], 0.01)

        best = min(timeit.repeat(write, number=NUMBER, repeat=5)) / NUMBER
        print(f"{best * 1e6:.1f} us a write: counted when submitted, timed when done (best of 5, CPU)")


if __name__ == "__main__":
    main()
