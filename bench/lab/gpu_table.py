"""Markdown tables of a saved GPU run, for docs/.

    python -m sglang_hicache.bench.lab.gpu_table bench/results/DATE-GPU/bench.json
    python -m sglang_hicache.bench.lab.gpu_table bench/results/DATE-GPU/profile.json

Of a profile, how long small copies to the host wait beside one write; of a run of ``sustained`` alone,
whether write-back keeps pace.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...io_backends.registry import AUTO
from ..measure.cases import Case
from ..measure.results import Results, Row, load
from ..measure.tables import markdown_row

CONTENDERS = (
    "auto",
    "hybrid",
    "copy_engine",
    "fenced_kernel",
    "sglang_staged",
    "sglang_kernel",
    "sglang_kernel_tma",
    "sglang_direct",
)
FENCED = ("hybrid", "fenced_kernel", "sglang_staged", "sglang_kernel")
MODEL, TOKENS = "Qwen3-8B", 4096


def tables(run: Results) -> str:
    """What it ran on, GB/s of every cell at 4,096 tokens of Qwen3-8B, and the slow-down of forwards."""
    machine = run.environment
    rows = [row for row in run.of("bandwidth") if (row.case.model, row.case.tokens) == (MODEL, TOKENS)]
    names = _present(CONTENDERS, rows)
    lines = [
        f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, "
        f"Triton {machine['triton']}, {machine['date'][:10]}. One large pinned copy: "
        f"{run.ceilings['link'].median:.1f} GB/s. {MODEL} ({TOKENS:,} tokens, 604 MB), GB/s end to end, the "
        "scheduler thread's work included; *us* is that work.",
        "",
        markdown_row(["layout", "page", "slots", *map(_title, names)]),
        markdown_row(["---"] * (3 + len(names))),
    ]
    for case in dict.fromkeys(row.case for row in rows):
        shape = "fragmented" if case.fragmented else "contiguous"
        found = {row.contender: row for row in rows if row.case == case}
        cells = [_cell(found.get(name)) for name in names]
        lines.append(markdown_row([f"`{case.layout}`", str(case.page_size), shape, *cells]))
    beside = run.of("interference")
    for shape in dict.fromkeys(_shape(row.case) for row in beside):
        lines += [
            "",
            f"Slow-down of a forward stand-in beside back-to-back write-back ({shape}):",
            "",
            *_slow_down([row for row in beside if _shape(row.case) == shape]),
        ]
    return "\n".join(lines) + "\n"


def _shape(case: Case) -> str:
    slots = "fragmented" if case.fragmented else "contiguous"
    return f"{case.tokens:,} {slots} tokens, `{case.layout}`, page {case.page_size}"


_FENCE_TITLES = {"hybrid": "`hybrid, forwards wait`"}


def fence_table(run: Results) -> str:
    """How long one write holds back a forward that must not share the SMs with it."""
    rows = run.of("fence")
    names = _present(FENCED, rows)
    titles = [_FENCE_TITLES.get(name) or _title(name) for name in names]
    lines = [markdown_row(["one write", *titles]), markdown_row(["---"] * (1 + len(names)))]
    for case in dict.fromkeys(row.case for row in rows):
        found = {row.contender: row for row in rows if row.case == case}
        cells = [_stall(found.get(name)) for name in names]
        lines.append(markdown_row([f"{case.tokens:,} tokens, {case.nbytes / 1e6:,.1f} MB", *cells]))
    return "\n".join(lines) + "\n"


def sustained_table(run: Results) -> str:
    """What it ran on, and for each kind of forwards who keeps pace with them, and what that costs them."""
    machine, link = run.environment, run.ceilings["link"]
    rows = [row for row in run.of("sustained") if row.metrics]
    columns = ("GB/s kept of those asked for", "forwards take", "one waits ms", "done after ms", "held MB")
    lines = [
        f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, "
        f"SGLang {machine['sglang']}, {machine['date'][:10]}. One large pinned copy: {link.median:.1f} GB/s "
        f"({link.low:.1f} to {link.high:.1f}).",
        "",
        markdown_row(["forwards back to back", "page", "write-back", *columns]),
        markdown_row(["---"] * (3 + len(columns))),
    ]
    for row in rows:
        what = f"{row.case.model}, {row.forward}, {row.case.tokens:,} tokens"
        who = _title(row.contender) + ("" if row.safe else ", no fence")
        lines.append(markdown_row([what, str(row.case.page_size), who, *_pace(row)]))
    return "\n".join(lines) + "\n"


def _pace(row: Row) -> list[str]:
    found = {name: each.median for name, each in row.metrics.items()}
    kept, asked = found["kept_gb_per_s"], found["asked_gb_per_s"]
    return [
        f"{kept:.2f} of {asked:.2f} ({kept / asked:.0%})",
        f"{found['slow_down']:.3f}x",
        f"{found['fence_ms']:.2f}, at most {found['fence_max_ms']:.2f}" if row.safe else "",
        f"{found['after_forward_p50_ms']:.1f}, p99 {found['after_forward_p99_ms']:.1f}",
        f"{found['held_mb']:,.0f}",
    ]


def waits_table(profile: Mapping[str, Any]) -> str:
    """How long a copy of 1 KiB to the host waits beside one write, by who writes and by the bytes of a turn.

    Args:
        profile: what :mod:`~.profile` saved.
    """
    cells: dict[str, dict[str, str]] = {}
    for part in profile["parts"]:
        if part["part"] not in ("small_copy", "turns"):
            continue
        found = {metric: each["median"] for metric, each in part["metrics"].items()}
        if "slow_down" in found:
            continue
        *size, name, case = part["what"].split(", ", 2)
        # What the thread copies piece by piece is over when the first small copy can be asked for.
        if name != AUTO and found["thread_us"] < found["ms"] * 1e3 / 2:
            median, most = found["median_us"] / 1e3, part["metrics"]["most_us"]["high"] / 1e3
            cells.setdefault(", ".join([_title(name), *size]), {})[case] = (
                f"{median:.2f} ms, at most {most:.2f} ({found['gb_per_s']:.1f} GB/s)"
            )
    cases = list(dict.fromkeys(case for row in cells.values() for case in row))
    lines = [markdown_row(["small copies beside", *cases]), markdown_row(["---"] * (1 + len(cases)))]
    lines += [markdown_row([by, *(row.get(case, "") for case in cases)]) for by, row in cells.items()]
    return "\n".join(lines) + "\n"


READS = {
    "": "copied, pinned memory",
    "pageable_": "copied, pageable memory",
    "by_kernel_": "written by a kernel, pinned memory",
}
"""How a few bytes get to the host, by what the names of their times in :mod:`~.profile` begin with."""


def reads_table(profile: Mapping[str, Any]) -> str:
    """How long each of :data:`READS` takes beside one write, by who writes: the first, and those behind it.

    Args:
        profile: what :mod:`~.profile` saved.
    """
    lines = [markdown_row(["beside", *READS.values()]), markdown_row(["---"] * (1 + len(READS)))]
    for part in profile["parts"]:
        if part["part"] != "small_copy":
            continue
        found = part["metrics"]
        name, case = part["what"].split(", ", 1)
        # As in waits_table.
        if found["thread_us"]["median"] < found["ms"]["median"] * 1e3 / 2:
            cells = [
                f"{found[way + 'first_us']['median'] / 1e3:.2f}, "
                f"{found[way + 'median_us']['median'] / 1e3:.2f}, "
                f"at most {found[way + 'most_us']['high'] / 1e3:.2f} ms"
                for way in READS
            ]
            lines.append(markdown_row([f"{_title(name)}, {case}", *cells]))
    return "\n".join(lines) + "\n"


def steps_table(profile: Mapping[str, Any]) -> str:
    """How much decode steps, whose ids the host waits for, slow down by the bytes of a turn.

    Args:
        profile: what :mod:`~.profile` saved.
    """
    lines = [markdown_row(["decode steps beside", "slow-down", "GB/s"]), markdown_row(["---"] * 3)]
    for part in profile["parts"]:
        if part["part"] == "turns" and "slow_down" in part["metrics"]:
            size, name, case, _ = part["what"].split(", ")
            slow, rate = (part["metrics"][each]["median"] for each in ("slow_down", "gb_per_s"))
            lines.append(markdown_row([f"{_title(name)}, {size}, {case}", f"{slow:.2f}x", f"{rate:.1f}"]))
    return "\n".join(lines) + "\n"


def _slow_down(rows: Sequence[Row]) -> list[str]:
    measured = [row for row in rows if "slow_down" in row.metrics]
    names = list(dict.fromkeys(row.contender for row in measured))
    several = len({row.case.attention for row in measured}) > 1
    lines = [markdown_row(["beside", *map(_title, names)]), markdown_row(["---"] * (1 + len(names)))]
    for forward, attention in dict.fromkeys((row.forward or "", row.case.attention) for row in measured):
        slow = {
            row.contender: f"{row.metrics['slow_down'].median:.2f}x"
            for row in measured
            if (row.forward, row.case.attention) == (forward, attention)
        }
        name = f"{forward} ({attention})" if several else forward
        lines.append(markdown_row([name, *(slow.get(each, "") for each in names)]))
    return lines


def _present(names: Iterable[str], rows: Sequence[Row]) -> list[str]:
    measured = {row.contender for row in rows if row.metrics}
    return [name for name in names if name in measured]


def _title(name: str) -> str:
    return name.replace("sglang_", "SGLang ").replace("_", " ") if "sglang" in name else f"`{name}`"


def _cell(row: Row | None) -> str:
    if row is None or not row.metrics:
        return ""
    return f"{row.metrics['gb_per_s'].median:.1f} ({row.metrics['submit_us'].median:,.0f} us)"


def _stall(row: Row | None) -> str:
    if row is None or not row.metrics:
        return ""
    held, rate = row.metrics["held_ms"].median, row.metrics["gb_per_s"].median
    stall = f"{row.metrics['stall_ms'].median:.2f} ms, held " if "stall_ms" in row.metrics else ""
    return f"{stall}{held:.2f} ms ({rate:.1f} GB/s)"


def of_file(path: Path) -> str:
    """The tables of a saved run or profile.

    Raises:
        OSError, ValueError: it cannot be read, or is neither.
    """
    whole = json.loads(path.read_text(encoding="utf-8"))
    if "parts" in whole:
        return waits_table(whole) + "\n" + steps_table(whole)
    saved = load(path)
    if saved.of("bandwidth"):
        return tables(saved)
    return sustained_table(saved) if saved.of("sustained") else fence_table(saved)


def print_of_file(make: Callable[[Path], str], about: str | None) -> None:
    """The command line of what makes text of a saved file: print it, or say in a line why not (status 2)."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    try:
        print(make(args.file), end="")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    print_of_file(of_file, __doc__)
