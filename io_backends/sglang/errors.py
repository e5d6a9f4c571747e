"""One exception for everything this plug-in refuses."""

from __future__ import annotations

from ...policy.text import LINES, escaped, say

PREFIX = "sglang-hicache-io"


class RefusedError(ValueError):
    """The server must not start; the message says why and what to do, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(escaped(f"{PREFIX}: {message}", allowed=LINES))


def exit_with(error: Exception, status: int) -> SystemExit:
    """``error`` as the end of the process: one line on standard error, and ``status``."""
    say(str(error))
    return SystemExit(status)
