"""Tables of a result, each no wider than 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...io_backends.registry import AUTO
from ...io_backends.sglang.unsafe import NULL
from ..measure.results import Spread
from ..measure.tables import Table
from .account import ArmSummary
from .arms import DEFAULT, NONE
from .result import CellResult, ServeResult

WIDTH = 80
SPEED, AGAINST = "speed", "against"
"""How the titles of two of the tables end."""
FIRST = (SPEED, AGAINST, "outputs")
"""Of those that say whether an arm is fast and right; the others say why."""

_SPEED_NOTE = "Median of the rounds; ± half of greatest less least. ITL of answers of more than one token."
_CACHE_NOTE = (
    "host, device: prompt tokens found there; hit: tokens from the host, of those sent before and no longer "
    "on the device. write: from its first copy to its last, by SGLang's metrics (p99: the bucket's bound). "
    "locked: rows that writes in flight kept from eviction, on average (rows written a second, times the "
    "seconds of a write). -: this server has no such count."
)
_AGAINST_NOTE = "One arm by the other: req/s, the higher the better; times, the lower the better."


def tables(result: ServeResult) -> list[Table]:
    """Three for each workload of each cell: speed, cache, and against SGLang's default and the limit."""
    made = []
    for cell in result.cells:
        by_workload: dict[str, list[ArmSummary]] = {}
        for each in cell.sums():
            by_workload.setdefault(each.workload, []).append(each)
        for workload, found in by_workload.items():
            title = f"{about(cell)}: {workload}"
            made.append(_table(f"{title}, {SPEED}", "arm", _SPEED, found, _SPEED_NOTE))
            made.append(_table(f"{title}, cache", "arm", _CACHE, found, _CACHE_NOTE))
            against = _against(found)
            if against:
                columns = ("arm", "by", "req/s", "TTFT p50", "TTFT p99", "ITL p99")
                made.append(Table(f"{title}, {AGAINST}", columns, tuple(against), (_AGAINST_NOTE,)))
            if any(each.compared is not None for each in found):
                made.append(_table(f"{title}, outputs", "arm", _OUTPUTS, found, _OUTPUTS_NOTE))
        if cell.arms:
            made.append(_servers(cell))
    return made


def about(cell: CellResult) -> str:
    """A cell in a few words."""
    given = cell.cell
    words = [str(given["model"]["name"]), f"page {given['page_size']}"]
    words += [given["mem_layout"]] if given["mem_layout"] else []
    words += [f"TP {given['tp']}"] if given["tp"] > 1 else []
    return f"{cell.name} ({', '.join(words)})"


CellText = Callable[[ArmSummary], str]


def _ms(name: str, shape: str = "{:,.0f}") -> CellText:
    def cell(each: ArmSummary) -> str:
        spread: Spread | None = getattr(each, name)
        return "-" if spread is None else shape.format(spread.median * 1e3)

    return cell


def _rate(each: ArmSummary) -> str:
    spread = each.requests_per_s
    if spread is None:
        return "-"
    half = (spread.high - spread.low) / 2
    return f"{spread.median:.2f}" + (f" ±{half:.2f}" if spread.n > 1 else "")


def _count(value: float | None, shape: str = "{:,.0f}") -> str:
    return "-" if value is None else shape.format(value)


def _short(value: float | None) -> str:
    """A count in at most six characters."""
    if value is None:
        return "-"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= unit:
            scaled = value / (1e3 if name == "k" else unit)
            places = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
            return f"{scaled:.{places}f}{name}"
    return f"{value:,.0f}"


_SPEED: dict[str, CellText] = {
    "req/s": _rate,
    "TTFT p50": _ms("ttft_p50_s"),
    "p99 ms": _ms("ttft_p99_s"),
    "ITL p50": _ms("itl_p50_s", "{:,.1f}"),
    "p99": _ms("itl_p99_s", "{:,.1f}"),
    "max ms": _ms("itl_max_s"),
    "errors": lambda each: str(each.errors),
}
_CACHE: dict[str, CellText] = {
    "host": lambda each: _short(each.host_tokens),
    "device": lambda each: _short(each.device_tokens),
    "hit": lambda each: _count(each.hit_share, "{:.0%}"),
    "write ms": lambda each: _count(each.write_mean_s and each.write_mean_s * 1e3, "{:,.1f}"),
    "p99": lambda each: _count(each.write_p99_s and each.write_p99_s * 1e3),
    "locked": lambda each: _short(each.rows_locked),
    "GB": lambda each: _count(each.written_bytes and each.written_bytes / 1e9, "{:,.1f}"),
}


def _of(part: int | None, whole: int | None) -> str:
    return "-" if part is None else f"{part} of {_count(whole)}"


_OUTPUTS: dict[str, CellText] = {
    "compared": lambda each: _count(each.compared),
    "as without HiCache": lambda each: _count(each.same),
    f"as {DEFAULT}": lambda each: _of(each.as_default, each.default_compared),
    "tokens from host": lambda each: _count(each.host_tokens),
}
_OUTPUTS_NOTE = (
    "Answers of the same prompts; a damaged write-back and one that copies nothing must differ. Where "
    f"SGLang's own write-back ({DEFAULT}) does not answer as a server without HiCache either, what SGLang "
    "computes behind a cached prefix of that model is not what it computes from nothing. Then its own is "
    "the one to agree with, in answers for which both found as much of the prompt in a cache."
)
_SERVERS_NOTE = (
    "fences: forwards that waited; entries: copies of a write; thread: ms of the scheduler's thread for a "
    "write, SGLang's part of the submission included. Counted by this project's backends alone."
)


def _table(
    title: str, first: str, columns: dict[str, CellText], found: Sequence[ArmSummary], note: str
) -> Table:
    lines = tuple((each.arm, *(cell(each) for cell in columns.values())) for each in found)
    return Table(title, (first, *columns), lines, (note,))


def _against(found: Sequence[ArmSummary]) -> list[tuple[str, ...]]:
    by_arm = {each.arm: each for each in found}
    lines = []
    for other in (DEFAULT, NULL, NONE):
        base = by_arm.get(other)
        for each in sorted(found, key=lambda each: each.arm != AUTO):  # what is asked first
            if base is None or each is base or (each.arm in (NULL, NONE) and other != DEFAULT):
                continue
            names = ("requests_per_s", "ttft_p50_s", "ttft_p99_s", "itl_p99_s")
            lines.append(
                (each.arm, other, *(_by(getattr(each, name), getattr(base, name)) for name in names))
            )
    return lines


def _by(value: Spread | None, base: Spread | None) -> str:
    return "-" if value is None or base is None or not base.median else f"{value.median / base.median:.2f}x"


def _servers(cell: CellResult) -> Table:
    lines = []
    for name, arm in cell.arms.items():
        server = arm.server or {}
        plugin = server.get("plugin") or {}
        counters = plugin.get("counters", {})
        chosen = plugin.get("backend") or server.get("hicache_io_backend") or "-"
        fences = str(counters.get("forward_fences", "-"))
        writes = counters.get("writes")
        entries = _short(counters["copies"] / writes) if writes else "-"
        own = counters.get("submit_seconds", 0.0) + counters.get("gap_seconds", 0.0)
        thread = f"{own / writes * 1e3:.2f}" if writes and own else "-"
        if not server.get("enable_hierarchical_cache") and server:
            chosen = "-"
        started = "-" if arm.start_s is None else f"{arm.start_s:.0f}"
        lines.append(
            (name, started, str(chosen), str(server.get("pool_tokens", "-")), fences, entries, thread)
        )
    columns = ("arm", "start s", "D2H by", "pool", "fences", "entries", "thread")
    return Table(f"{about(cell)}: servers", columns, tuple(lines), (_SERVERS_NOTE,))


def as_text(table: Table, watermark: str | None) -> str:
    """A table for a terminal, the watermark in its title; no line is longer than `WIDTH`."""
    import textwrap

    rows = [table.columns, *table.lines]
    widths = [max(len(row[place]) for row in rows) for place in range(len(table.columns))]
    out = textwrap.wrap(table.title, WIDTH)
    out += textwrap.wrap(f"!! {watermark} !!", WIDTH) if watermark else []
    for number, row in enumerate(rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        out.append("  ".join(cells).rstrip())
        if number == 0:
            out.append("-" * min(WIDTH, sum(widths) + 2 * (len(widths) - 1)))
    for note in table.notes:
        out += textwrap.wrap(note, WIDTH)
    return "\n".join(out) + "\n"
