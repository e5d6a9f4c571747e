"""The ``hicache-io`` command: mounts the subcommands and holds none of their work.

Exit status: 0 good, 1 the thing checked is bad, 2 the user's input is wrong.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..policy.text import answer
from .explain.command import explain
from .explain.policy_command import policy_app

# Subcommands that need torch or are slow to import: name -> "module:function" (or a typer.Typer of several),
# imported when they are asked for (and by `hicache-io --help`, which prints the first line of their help).
LAZY: dict[str, str] = {
    "bench": "sglang_hicache.bench.measure.command:bench",
    "calibrate": "sglang_hicache.bench.calibrate.command:calibrate",
    "demo": "sglang_hicache.bench.demo.command:demo",
    "doctor": "sglang_hicache.io_backends.sglang.diagnose.doctor:doctor",
    "race": "sglang_hicache.bench.race.command:race",
    "stress": "sglang_hicache.bench.stress.command:stress",
}


class _Group(TyperGroup):
    """A group whose `LAZY` subcommands are imported only when needed."""

    # typer brings its own click or uses the installed one, by version, so that its types have no fixed name.
    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *LAZY]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in LAZY:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = LAZY[cmd_name].partition(":")
        found = getattr(import_module(module), attribute)
        if isinstance(found, typer.Typer):
            command = typer.main.get_command(found)
            command.name = cmd_name
            return command
        single = typer.Typer(add_completion=False)
        single.command(cmd_name)(found)
        return typer.main.get_command(single)


app = typer.Typer(
    cls=_Group,
    help="Safe and fast GPU-to-host KV cache write-back for SGLang's HiCache.",
    no_args_is_help=True,
    add_completion=False,
    # An unexpected error prints Python's own traceback, which bug reports can quote.
    pretty_exceptions_enable=False,
)
app.command("explain")(explain)
app.add_typer(policy_app, name="policy")


def _print_version(wanted: bool) -> None:
    if wanted:
        answer(f"sglang-hicache-io {version('sglang-hicache-io')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point of the console script."""
    app()
