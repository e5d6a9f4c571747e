"""The help of a group of commands, in which no command's summary is cut."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

_ANY_LENGTH = 200


class WholeHelpGroup(TyperGroup):
    """As the base class, but a summary that is longer than a line goes on in the next."""

    # typer brings its own click or uses the installed one, by version, so that its types have no fixed name.
    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Print each command with its summary."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.summary(ctx, name)) for name in self.list_commands(ctx)])

    def summary(self, ctx: Any, name: str) -> str:
        """What one command does, in one line."""
        return str(self.get_command(ctx, name).get_short_help_str(_ANY_LENGTH))  # type: ignore[union-attr]
