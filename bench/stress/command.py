"""`hicache-io stress`: does a running server survive, and answer rightly, under eviction pressure?"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import urlsplit

import typer

from ...policy.terminal import styled, tell
from ...policy.text import answer, say
from ..json_option import Json
from ..measure import environment
from ..outputs import check_file, refuse, result_console
from ..saved import write_whole

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def stress(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server, such as http://127.0.0.1:30000.")],
    compare: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A second server: the same load, the two take turns by waves."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A server of the same model whose answers are right; else a prompt's first answer is.",
        ),
    ] = None,
    duration: Annotated[
        str | None, typer.Option(metavar="TIME", help="Load on each server: 90, 90s, 10m, 2h.")
    ] = None,
    waves: Annotated[int | None, typer.Option(min=1, help="How many waves; 4 without --duration.")] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Requests at once; up to 64, by pool.")] = None,
    conversations: Annotated[
        int | None, typer.Option(min=1, help="New conversations a wave; by pool without it.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Requests a conversation.")] = 3,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=4, help="Mean length of a first prompt; up to 1,024, by pool.")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each answer; up to 256, by pool.")
    ] = None,
    silent: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Hung: so long without any token.")
    ] = 60,
    tie: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="NATS",
            help="What rounding may make of two tokens, at least; more is measured on the server. "
            "0: every output must be the reference's, as where the server is deterministic (float32 on the "
            "CPU engine, --enable-deterministic-inference); else 0.25.",
        ),
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=2, help="Prompts hold token ids below this.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Save everything as JSON here.")] = None,
    json_: Json = False,
) -> None:
    """Put a running SGLang server under load that forces eviction and write-back, and check every output.

    Any SGLang server, with or without the plug-in. Waves of greedy multi-turn requests overflow its KV cache;
    the same prompt must get the same tokens again, also when its prefix came back from host memory. Where the
    server rounds differently from batch to batch, an answer that differs is judged by the server's own
    recomputation without the cache.

    Exit status 0: all answers came and were right. 1: an error, a wrong output, a server that hung or died.
    2: wrong input, no usable server to begin with, or outputs that differ and cannot be judged.
    """
    if find_spec("aiohttp") is None:
        _refuse("aiohttp is not installed; pip install aiohttp (SGLang brings it too)")
    from . import report, run

    urls = [_url(url), *([_url(compare)] if compare else [])]
    if len(set(urls)) < len(urls):
        _refuse("--compare names the same server")
    check_file("--out", out)
    seconds = None if duration is None else _seconds(duration)
    limits = run.Limits(seconds, 4 if waves is None and seconds is None else waves, silent, tie)
    sizes = {
        "vocab_size": vocab_size,
        "seed": seed,
        "turns": turns,
        "conversations": conversations,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "clients": clients,
    }
    began = datetime.now(UTC)
    about = _about(began)

    def keep(outcome: run.Outcome) -> None:
        if out is not None and _is_plain(out):
            _save(out, _text(report.as_json(outcome, limits, about)))  # whether that works is said at the end

    try:
        with report.LiveLines(limits) as lines:
            outcome = asyncio.run(
                run.stress(urls, _url(reference) if reference else None, limits, sizes, lines.show, keep)
            )
    except run.UnusableError as error:
        _refuse(str(error))
    result = report.as_json(outcome, limits, about)
    text = _text(result)
    # Before anything is printed: hours of load must not be lost to a terminal.
    saved = None if out is None else _save(out, text)
    shown = result_console(json_)
    shown.print(report.table(result))
    for note in result["notes"]:
        tell(shown, styled(("Note:", "yellow"), f" {note}"))
    for line in report.verdict(result):
        tell(shown, line)
    if saved is not None:
        say(saved)
    if json_:
        answer(text)
    if outcome.reference_problem is not None:
        _refuse(outcome.reference_problem)
    if result["judgement"] == report.CANNOT_TELL:
        _refuse("cannot tell whether outputs are wrong; the note above says why")
    if result["judgement"] == report.BAD:
        raise typer.Exit(1)


def _text(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1, allow_nan=False)


def _is_plain(out: Path) -> bool:
    """Whether it may be replaced, and again: no link, no pipe, nothing that stands for a descriptor."""
    if out.is_symlink() or out.resolve().is_relative_to("/dev") or out.resolve().is_relative_to("/proc"):
        return False
    return out.is_file() or not out.exists()


def _save(out: Path, text: str) -> str:
    """What became of it, in a sentence."""
    try:
        if not _is_plain(out):
            out.write_text(text + "\n", encoding="utf-8")
            return f"Saved as {out}."
        try:
            write_whole(out, text + "\n")
        except OSError:  # a folder that takes no other file, or no longer name; a file mounted by itself
            out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        return f"NOT saved as {out}: {error.strerror}; --json prints the same."
    return f"Saved as {out}."


def _refuse(why: str) -> NoReturn:
    refuse(f"hicache-io stress: {why}")


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:  # an address in brackets that is none, a port that is too large
        good = False
    if not good:
        _refuse(f"{text!r} is no URL of a server; give one such as http://127.0.0.1:30000")
    return text.rstrip("/")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    value = float(found[1]) * _UNITS[found[2] or "s"] if found else 0.0
    if value <= 0:
        _refuse(f"--duration {text!r}: give seconds, or a number with s, m or h, such as 10m")
    return value


def _about(began: datetime) -> dict[str, Any]:
    return {
        "began": began.isoformat(timespec="seconds"),
        "command": environment.command_line(),
        "client": {
            "cpu": environment.cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "git": environment.git_state(),
        },
    }
