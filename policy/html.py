"""Text in HTML: shown, whoever wrote it."""

from __future__ import annotations

import html

from .text import LINES, escaped


def escape(text: str) -> str:
    r"""`text` as HTML that shows it: no markup, and what nobody would see (control characters, changes of
    direction) as escapes such as ``\x1b``.
    """
    return html.escape(escaped(text, allowed=LINES))
