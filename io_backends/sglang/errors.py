"""One exception for everything this plug-in refuses."""

from __future__ import annotations

import multiprocessing
import os
import signal

from ...policy.text import LINES, escaped, say

PREFIX = "sglang-hicache-io"


class RefusedError(ValueError):
    """The server must not start; the message says why and what to do, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(escaped(f"{PREFIX}: {message}", allowed=LINES))


def exit_with(error: Exception, status: int) -> SystemExit:
    """``error`` as the end of the process: one line on standard error, and ``status``."""
    say(str(error), whole=True)
    return SystemExit(status)


def end_scheduler(error: Exception) -> SystemExit:
    """``error`` as the end of a scheduler's process, with status 1, and of the process that launched it.

    A scheduler tells its parent of an exception by SIGQUIT (``run_scheduler_process``), upon which SGLang's
    launcher kills all that it started, and itself. A SystemExit passes that by: the launching program would
    get an exception that speaks of memory, or none once the server is up, and live on without a scheduler.
    """
    end = exit_with(error, 1)
    if multiprocessing.parent_process() is not None:
        os.kill(os.getppid(), signal.SIGQUIT)
    return end
