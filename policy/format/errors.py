"""What a person is told about a policy file: an error that ends, or a warning."""

from __future__ import annotations

from typing import Any

from ..names import with_hint
from ..text import escaped


class PolicyError(ValueError):
    """A policy file that cannot be used. ``line`` and ``column`` start at 1, and are None when the file
    itself is the trouble; ``hint`` is the nearest valid name or None. ``str()`` is the one line a user sees.
    What a file says is quoted in it: control characters are shown as escapes in every part.
    """

    def __init__(
        self,
        filename: str,
        message: str,
        *,
        line: int | None = None,
        column: int | None = None,
        hint: str | None = None,
    ) -> None:
        filename, message = escaped(filename), escaped(message)
        hint = None if hint is None else escaped(hint)
        place = filename if line is None else f"{filename}:{line}:{column}"
        super().__init__(f"{place}: {with_hint(message, hint)}")
        self.filename = filename
        self.line = line
        self.column = column
        self.message = message
        self.hint = hint

    def to_dict(self) -> dict[str, Any]:
        """The parts and the whole, as plain JSON types."""
        names = ("filename", "line", "column", "message", "hint")
        return {**{name: getattr(self, name) for name in names}, "text": str(self)}
