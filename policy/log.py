"""Loggers whose messages are text, whoever wrote what they quote."""

from __future__ import annotations

import logging
import traceback

from .text import LINES, escaped


class _AsText(logging.Filter):
    """A message with what a terminal obeys or hides as escapes: logs are read on terminals."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = escaped(record.getMessage(), allowed=LINES), None
        if record.exc_info and record.exc_info[0] is not None:
            trace = "".join(traceback.format_exception(*record.exc_info))
            record.exc_text = escaped(trace.rstrip(), allowed=LINES)  # what formatters print
        return True


_as_text = _AsText()


def logger_of(name: str) -> logging.Logger:
    """`logging.getLogger`, for the modules of this project."""
    logger = logging.getLogger(name)
    logger.addFilter(_as_text)  # the same one is added once
    return logger
