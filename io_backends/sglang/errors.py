"""One exception for everything this plug-in refuses."""

from __future__ import annotations

PREFIX = "sglang-hicache-io"


class RefusedError(ValueError):
    """The server must not start; the message says why and what to do, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{PREFIX}: {message}")


def exit_with(error: Exception, status: int) -> SystemExit:
    """``error`` as the end of the process: one line on standard error, and ``status``."""
    import sys

    print(str(error), file=sys.stderr, flush=True)
    return SystemExit(status)
