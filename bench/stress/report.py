"""What a stress test shows: a live line for each server, a table, and everything as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ...policy.terminal import styled, tell
from ..demo.output import console
from .loaded_server import LoadedServer
from .run import Limits, Outcome
from .server import ServerFacts

CPU_NOTE = (
    "on SGLang's CPU engine: it shows that the right bytes go out and come back. Its times say nothing about "
    "a GPU, nor does it show the order of work on one"
)

KIND = "hicache-io stress"

GOOD, BAD, CANNOT_TELL = "good", "bad", "cannot tell"


class LiveLines:
    """One line for each server: live on a terminal, otherwise a new line after each wave."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._said: dict[str, int] = {}

    def __enter__(self) -> LiveLines:
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, sides: Sequence[LoadedServer]) -> None:
        """Called four times a second."""
        if console.is_terminal:
            self._live.update(Group(*(self._line(side) for side in sides)))
            return
        for side in sides:
            if len(side.waves) > self._said.get(side.client.url, 0):
                self._said[side.client.url] = len(side.waves)
                tell(console, self._line(side))

    def _line(self, side: LoadedServer) -> str:
        tally = side.tally
        until = "" if self._limits.duration_s is None else f" of {self._limits.duration_s:.0f}"
        waves = "" if self._limits.waves is None else f" of {self._limits.waves}"
        median = tally.request_s.percentile(50)
        parts = [
            f"{side.client.url}: {side.loaded_s():.0f}{until} s",
            f"{len(side.waves)}{waves} waves",
            f"{tally.ok:,} OK, {tally.wrong} wrong, {tally.errors} errors",
            f"{tally.host_tokens:,} tokens from host",
            "" if median is None else f"p50 {_seconds(median)}",
            f"silent for {side.silent_for_s():.0f} s" if side.silent_for_s() > 2 else "",
        ]
        return ", ".join(part for part in parts if part)


def judgement(outcome: Outcome) -> str:
    """`GOOD` where every server answered everything, rightly, to the end; `CANNOT_TELL` where all that is
    wrong is that differences could not be judged; else `BAD`.
    """
    tallies = [side.tally for side in outcome.sides]
    if any(each.first_problem is not None or not each.ok + each.undecided for each in tallies):
        return BAD
    return CANNOT_TELL if any(each.undecided for each in tallies) else GOOD


def as_json(outcome: Outcome, limits: Limits, about: dict[str, Any]) -> dict[str, Any]:
    """Everything, in plain JSON types; durations in seconds.

    Args:
        outcome: what came out.
        limits: what was asked for.
        about: where this ran and how it was called.
    """
    sides = [_side(side, end) for side, end in zip(outcome.sides, outcome.ends, strict=True)]
    result = {
        "kind": KIND,
        **about,
        "ok": judgement(outcome) == GOOD,
        "judgement": judgement(outcome),
        "engine": "cpu" if any(side.facts.on_cpu for side in outcome.sides) else "gpu",
        "limits": asdict(limits),
        "load": asdict(outcome.load),
        "finished": outcome.finished,
        "interrupted": outcome.interrupted,
        "reference": outcome.reference.to_dict() if outcome.reference else None,
        "reference_problem": outcome.reference_problem,
        "notes": notes(outcome),
        "servers": sides,
    }
    if len(sides) == 2:
        result["difference"] = differences(*sides)
    found: dict[str, Any] = _finite(result)
    return found


def _finite(value: Any) -> Any:
    """``value`` with null for what JSON has no number for: servers say what they like."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _side(side: LoadedServer, end: ServerFacts | None) -> dict[str, Any]:
    tally, loaded = side.tally, side.loaded_s()
    survived = tally.first_problem.at_s if tally.first_problem else loaded
    before = side.facts.plugin["counters"] if side.facts.plugin else {}
    after = end.plugin["counters"] if end and end.plugin else {}
    return {
        "url": side.client.url,
        "server": side.facts.to_dict(),
        "unsafe_fences": side.facts.unsafe_fences,
        "tie_nats": side.tie_nats,
        "rounding": None if side.judge is None else side.judge.to_dict(),
        "ended": side.end.kind if side.end else "alive",
        "loaded_s": round(loaded, 3),
        "survived_s": round(survived, 3),
        **tally.to_dict(),
        "requests_per_minute": round(60 * tally.requests / loaded, 1) if loaded else 0.0,
        "output_tokens_per_s": round(tally.output_tokens / loaded, 1) if loaded else 0.0,
        "plugin_counters": {name: after[name] - before.get(name, 0) for name in after},
        "waves": [asdict(wave) for wave in side.waves],
    }


def notes(outcome: Outcome) -> list[str]:
    """What a reader must know to judge the result, a sentence each."""
    found = []
    if any(side.facts.on_cpu for side in outcome.sides):
        found.append(f"This ran {CPU_NOTE}.")
    for side in outcome.sides:
        where = side.client.url
        if side.facts.unsafe_fences:
            found.append(
                f"{where} runs with --hicache-io-unsafe-fences {side.facts.unsafe_fences}: an experiment, in "
                "which wrong outputs and crashes are expected."
            )
        if side.facts.hicache and not side.tally.host_tokens:
            found.append(
                f"No token came back from the host tier of {where}, so its outputs say nothing about the "
                "write-back (is the host pool smaller than a wave, or the test too short?)."
            )
        if not side.facts.hicache:
            found.append(f"{where} runs without HiCache.")
        if side.tally.near_ties:
            found.append(
                f"{side.tally.near_ties} answers of {where} part from their reference by no more than it "
                "rounds without the host; counted as OK. --enable-deterministic-inference on the server "
                "makes the comparison exact."
            )
        if side.tally.undecided:
            found.append(
                f"{side.tally.undecided} answers of {where} part from their reference, and whether they are "
                f"wrong cannot be told: {side.tally.cannot_tell}. Start it with "
                "--enable-deterministic-inference, which makes the comparison exact."
            )
        if side.tally.unfinished:
            found.append(f"{side.tally.unfinished} requests to {where} were given up when the time was over.")
    return found


def differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """For every number that both have: the second less the first, and that as a share of the first."""
    found = {}
    for heading, key, kind in _ROWS:
        a, b = _value(first, key), _value(second, key)
        if kind is not _words and a is not None and b is not None:
            found[heading] = {"absolute": round(b - a, 6), "relative": round((b - a) / a, 4) if a else None}
    return found


def table(result: dict[str, Any]) -> Table:
    """One column a server, and with two of them their difference."""
    servers = result["servers"]
    shown = Table(title=f"{KIND}: {result['load']['clients']} requests at once", box=SIMPLE_HEAD)
    shown.add_column("")
    for server in servers:
        shown.add_column(server["url"], justify="right", overflow="fold")
    if len(servers) == 2:
        shown.add_column("difference", justify="right")
    for heading, key, in_words in _ROWS:
        values = [_value(server, key) for server in servers]
        cells = ["-" if value is None else in_words(value) for value in values]
        if len(servers) == 2:
            change = result["difference"].get(heading)
            relative = change and change["relative"]
            cells.append("" if relative is None else f"{relative:+.1%}")
        shown.add_row(heading, *cells)
    return shown


def verdict(result: dict[str, Any]) -> list[Text]:
    """The last lines: for each server how long it lasted and what went wrong first."""
    lines = []
    for server in result["servers"]:
        problem = server["first_problem"]
        lasted = f"{server['url']}: {server['survived_s']:.1f} s without a problem"
        if problem is not None:
            end = "" if server["ended"] == "alive" else f" In the end it was {server['ended']}."
            lines.append(styled((f"{lasted}. First: {problem['kind']}: ", "red")))
            lines.append(styled(f"  {problem['what']}{end}"))
        elif server["undecided"]:
            lines.append(
                styled(
                    (f"{server['url']}: cannot tell: {server['undecided']:,} outputs not judged.", "yellow")
                )
            )
        elif not server["ok"]:
            lines.append(styled((f"{server['url']}: nothing was answered.", "red")))
        else:
            text = (
                f"{lasted}, {server['ok']:,} answers, {server['checked']:,} of them compared "
                f"({server['checked_from_host']:,} with tokens from the host)."
            )
            lines.append(styled((text, "green")))
    return lines


def _value(server: dict[str, Any], key: str) -> Any:
    value: Any = server
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _words(value: Any) -> str:
    return str(value)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{value * 1000:,.1f} ms"


_ROWS = (
    ("SGLang", "server.sglang", _words),
    ("HiCache backend", "server.hicache_io_backend", _words),
    ("plug-in", "server.plugin.backend", _words),
    ("plug-in: unsafe fences", "unsafe_fences", _words),
    ("survived, s", "survived_s", _count),
    ("in the end", "ended", _words),
    ("requests", "requests", _count),
    ("OK", "ok", _count),
    ("errors", "errors", _count),
    ("wrong outputs", "wrong", _count),
    ("near ties", "near_ties", _count),
    ("cannot tell", "undecided", _count),
    ("compared", "checked", _count),
    ("compared, from host", "checked_from_host", _count),
    ("requests a minute", "requests_per_minute", _count),
    ("output tokens a second", "output_tokens_per_s", _count),
    ("tokens from device", "device_tokens", _count),
    ("tokens from host", "host_tokens", _count),
    ("first token, p50", "first_token_s.p50", _seconds),
    ("first token, p99", "first_token_s.p99", _seconds),
    ("request, p50", "request_s.p50", _seconds),
    ("request, p90", "request_s.p90", _seconds),
    ("request, p99", "request_s.p99", _seconds),
    ("between tokens, p50", "between_tokens_s.p50", _seconds),
    ("between tokens, p99", "between_tokens_s.p99", _seconds),
    ("between tokens, max", "between_tokens_s.max", _seconds),
    ("written back, bytes", "plugin_counters.bytes", _count),
    ("writes", "plugin_counters.writes", _count),
    ("D2H waited for a forward", "plugin_counters.producer_fences", _count),
    ("forwards that waited for D2H", "plugin_counters.forward_fences", _count),
)
"""Heading, where the value is, and how it reads."""
