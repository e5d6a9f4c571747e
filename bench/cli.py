"""The ``hicache-io`` command: mounts the subcommands and holds none of their work.

Exit status: 0 good, 1 the thing checked is bad, 2 the user's input is wrong.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer

from ..policy.text import answer, say
from .examples import epilog
from .explain.command import explain
from .explain.policy_command import policy_app
from .whole_help import WholeHelpGroup

# Subcommands that need torch or are slow to import: name -> "module:function" (or a typer.Typer of several),
# imported when they are asked for, and the first line of their help.
LAZY: dict[str, tuple[str, str]] = {
    "bench": (
        "sglang_hicache.bench.measure.command:bench",
        "Measure write-back on this machine, compare runs, and make reports of saved ones.",
    ),
    "calibrate": (
        "sglang_hicache.bench.calibrate.command:calibrate",
        "Measure which backend and options are fastest on this GPU, and write rules that `explain` cites.",
    ),
    "demo": (
        "sglang_hicache.bench.demo.command:demo",
        "Serve a model with each backend and compare every output with a server without HiCache.",
    ),
    "doctor": (
        "sglang_hicache.io_backends.sglang.diagnose.doctor:doctor",
        "Check this machine, this SGLang, the policy and a server, and say what to do.",
    ),
    "race": (
        "sglang_hicache.bench.race.command:race",
        "Look for missing fences, without a GPU: SGLang's own cache and pools on a virtual device.",
    ),
    "stress": (
        "sglang_hicache.bench.stress.command:stress",
        "Put a running SGLang server under load that forces eviction and write-back, and check every output.",
    ),
}


class _Group(WholeHelpGroup):
    """A group whose `LAZY` subcommands are imported only when needed, and whose refusals are one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *LAZY]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in LAZY:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = LAZY[cmd_name][0].partition(":")
        found = getattr(import_module(module), attribute)
        if isinstance(found, typer.Typer):
            command = typer.main.get_command(found)
            command.name = cmd_name
            return command
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name, epilog=epilog(cmd_name))(found)
        return typer.main.get_command(single)

    def summary(self, ctx: Any, name: str) -> str:
        return LAZY[name][1] if name in LAZY else super().summary(ctx, name)

    def main(self, args: Any = None, prog_name: Any = None, **more: Any) -> Any:  # type: ignore[override]
        """As the base class, but what was typed wrong is quoted as text, in one line without usage."""
        if not more.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **more)
        try:
            status = super().main(args, prog_name, standalone_mode=False, **more)
        except typer.Abort:
            say("Aborted.")
            sys.exit(1)
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            context = getattr(error, "ctx", None)
            said = str(error.format_message())
            if "\n" not in said:  # not a help text
                path = "hicache-io" if context is None else context.command_path
                said = f"{path}: {said.rstrip('.')} (see {path} --help)"
            say(said)
            sys.exit(getattr(error, "exit_code", 2))
        sys.exit(status if isinstance(status, int) else 0)


app = typer.Typer(
    cls=_Group,
    help="Safe and fast GPU-to-host KV cache write-back for SGLang's HiCache.",
    epilog=epilog(""),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # An unexpected error prints Python's own traceback, which bug reports can quote.
    pretty_exceptions_enable=False,
    # Rich's tables cut the names of long options at 80 columns.
    rich_markup_mode=None,
)
app.command("explain", epilog=epilog("explain"))(explain)
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
    app(prog_name="hicache-io")
