"""A saved run against the targets: the arithmetic, on rows that are made up."""

from __future__ import annotations

from sglang_hicache.bench.lab import targets
from sglang_hicache.bench.measure.cases import Case
from sglang_hicache.bench.measure.results import Results, Row, Spread


def row(measurement: str, case: Case, who: str, forward: str | None = None, **metrics: float) -> Row:
    spreads = {name: Spread(value, value, value, 3) for name, value in metrics.items()}
    return Row(measurement, case, who, forward=forward, metrics=spreads, checked=True)


def line(run: Results, *words: str) -> list[str]:
    """Cells, reached, least, median and greatest of the one line that has all words."""
    (found,) = [each for each in targets.table(run).splitlines() if all(word in each for word in words)]
    return [cell.strip() for cell in found.split("|")[3:-1]]


LONG = Case("Qwen3-8B", "page_first", 16, 4096, True)
SHORT = Case("Qwen3-8B", "page_first", 16, 512, True)
ONES = Case("Qwen3-8B", "page_first", 1, 4096, True)


def test_rates_are_held_to_the_link_to_sglangs_best_and_to_its_default() -> None:
    rows = []
    for case, ours, share in ((LONG, 52.0, 0.96), (SHORT, 40.0, 0.7), (ONES, 44.0, 0.8)):
        rows.append(row("bandwidth", case, "auto", gb_per_s=ours, link_share=share, submit_us=10.0))
        rows.append(row("bandwidth", case, "sglang_staged", gb_per_s=40.0, submit_us=80.0))
        rows.append(row("bandwidth", case, "sglang_kernel", gb_per_s=50.0))
    run = Results({"ran_on": "GPU"}, rows)
    # A write of less than 4,096 tokens is not held to the link.
    assert line(run, "95% of the link", "page 16 and 64") == ["1", "1", "96%", "96%", "96%"]
    assert line(run, "95% of the link", "page 1 |") == ["1", "0", "80%", "80%", "80%"]
    assert line(run, "best path", "4,096 tokens") == ["2", "1", "0.88", "0.96", "1.04"]
    assert line(run, "best path", "512 tokens") == ["1", "0", "0.80", "0.80", "0.80"]
    assert line(run, "SGLang's default", "page 16: geometric mean 1.14") == ["2", "1", "1.00", "1.15", "1.30"]


def test_threads_are_compared_with_what_was_left_for_later_and_as_the_bandwidth_table_has_them() -> None:
    rows = [
        row("bandwidth", ONES, "auto", gb_per_s=1, link_share=1, submit_us=10.0),
        row("bandwidth", ONES, "sglang_staged", gb_per_s=1, submit_us=80.0),
        row("submit", ONES, "auto", submit_us=1.0),
        row("submit", ONES, "sglang_staged", submit_us=1.0),
    ]
    assert line(Results({}, rows), "thread's time", "fragmented") == ["1", "1", "8.0", "8.0", "8.0"]
    rows[0].metrics["later_us"] = Spread(30.0, 30.0, 30.0, 3)
    assert line(Results({}, rows), "thread's time", "fragmented") == ["1", "0", "2.0", "2.0", "2.0"]


def test_forwards_and_stalls() -> None:
    rows = [
        row("interference", LONG, "hybrid", "gemm", slow_down=1.034),
        row("interference", LONG, "hybrid", "memory", slow_down=1.05),
        row("interference", LONG, "hybrid", "gemm, half", slow_down=1.2),
        row("interference", LONG, "hybrid", "decode steps", slow_down=40.0),
        row("fence", LONG, "hybrid", stall_ms=0.1),
        row("fence", LONG, "fenced_kernel", stall_ms=2.0),
    ]
    run = Results({}, rows)
    assert line(run, "`hybrid`, `page_first`, all SMs") == ["2", "1", "1.03x", "1.04x", "1.05x"]
    assert line(run, "`hybrid`, `page_first`, half") == ["1", "0", "1.20x", "1.20x", "1.20x"]
    assert line(run, "`hybrid`, `page_first`, decode steps") == ["1", "0", "40.00x", "40.00x", "40.00x"]
    assert line(run, "`copy_engine`")[:2] == ["0", "not measured"]
    assert line(run, "stall 10%") == ["1", "1", "5.0%", "5.0%", "5.0%"]
    # The forward's stream itself came late to its fence.
    for each, held in zip(rows[-2:], (1.5, 2.1), strict=True):
        each.metrics |= {"held_ms": Spread(held, held, held, 3), "submit_us": Spread(500.0, 500.0, 500.0, 3)}
    assert line(run, "stall 10%") == ["1", "0", "50.0%", "50.0%", "50.0%"]


def sustained(case: Case, who: str, **changed: float) -> Row:
    metrics = {
        **{"kept_gb_per_s": 3.0, "asked_gb_per_s": 3.0, "slow_down": 1.0, "waiting_mb": 0.0},
        **{"fence_ms": 0.1, "fence_max_ms": 0.2, "done_p50_ms": 10.0, "done_p99_ms": 20.0},
        **{"after_forward_p50_ms": 1.0, "after_forward_p99_ms": 2.0},
    }
    return row("sustained", case, who, "prefill", **{**metrics, **changed})


def test_pace_is_held_against_what_was_asked_and_against_sglangs_kernel() -> None:
    full = {"asked_gb_per_s": 48.0, "kept_gb_per_s": 43.0}
    rows = [
        sustained(LONG, "auto", done_p99_ms=25.0, after_forward_p99_ms=2.6, fence_ms=0.29, fence_max_ms=0.4),
        sustained(LONG, "sglang_kernel"),
        sustained(ONES, "auto", **full, slow_down=1.06, waiting_mb=2 * ONES.nbytes / 1e6, fence_ms=9.0),
        # Without figures of SGLang's kernel there is nothing to divide by.
        sustained(ONES, "sglang_staged", **full),
    ]
    run = Results({"ran_on": "GPU"}, rows, ceilings={"link": Spread(50.0, 50.0, 50.0, 3)})
    half, nearly_all = "up to half", "page 1, 96% of the link"
    assert line(run, "pace 90%", half) == ["1", "1", "100%", "100%", "100%"]
    assert line(run, "pace 90%", nearly_all) == ["1", "0", "90%", "90%", "90%"]
    assert line(run, "not enqueued", half) == ["1", "1", "0.00", "0.00", "0.00"]
    assert line(run, "not enqueued", nearly_all) == ["1", "0", "2.00", "2.00", "2.00"]
    assert line(run, "from the submission, p99", half) == ["1", "1", "1.25", "1.25", "1.25"]
    assert line(run, "from the forward, p99", half) == ["1", "0", "1.30", "1.30", "1.30"]
    assert line(run, "from the forward, p50", nearly_all) == ["0", "not measured", "", "", ""]
    assert line(run, "slowed 1.05x", nearly_all) == ["1", "0", "1.06x", "1.06x", "1.06x"]
    assert line(run, "waits 0.3 ms on average") == ["1", "1", "0.29 ms", "0.29 ms", "0.29 ms"]
    assert line(run, "waits 0.3 ms at most") == ["1", "0", "0.40 ms", "0.40 ms", "0.40 ms"]
