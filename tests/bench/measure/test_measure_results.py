"""Results as data, tables, pictures and a page: nothing is lost, and CPU figures say so everywhere."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repository import ROOT

from sglang_hicache.bench.measure import plots, report, results, tables
from sglang_hicache.bench.measure.cases import Case
from sglang_hicache.bench.measure.compare import compare, not_comparable
from sglang_hicache.bench.measure.judge import judge
from sglang_hicache.bench.measure.results import CSV_COLUMNS, METRICS, Results, Row, Spread, merged, to_csv
from sglang_hicache.policy.terminal import console

CASE = Case("Qwen3-8B", "page_first", 16, 4096, True, "fa3")


def spread(*values: float) -> Spread:
    return Spread.of(values)


def row(contender: str, *ms: float, measurement: str = "bandwidth", safe: bool = True, **more: object) -> Row:
    made = Row(measurement, CASE, contender, backend=contender, safe=safe, checked=True, entry_bytes=4096)
    made.metrics = {
        "ms": spread(*ms),
        "gb_per_s": spread(*(100 / each for each in ms)),
        "submit_us": spread(*ms),
        "ack_us": spread(*ms),
        "slow_down": spread(*ms),
        "stall_ms": spread(*ms),
        "held_ms": spread(*ms),
    }
    for name, value in more.items():
        setattr(made, name, value)
    return made


def a_run(ran_on: str = "CPU", **environment: object) -> Results:
    everything = [
        row(who, 1.0, 2.0, 3.0, measurement=name, forward="gemm" if name == "interference" else None)
        for name in ("bandwidth", "fence", "interference", "submit", "latency")
        for who in ("auto", "hybrid", "copy_engine")
    ]
    everything.append(Row("bandwidth", CASE, "sglang_staged", reason='a, "reason" | with <marks>\nand more'))
    about = {
        "ran_on": ran_on,
        "gpu": "NVIDIA H200" if ran_on == "GPU" else None,
        "cpu": "some CPU",
        **environment,
    }
    return Results(
        {**about, "git": "abc", "command": "hicache-io bench all", "date": "2026-11-23"},
        everything,
        {"link": spread(55.0)},
    )


def test_json_and_back() -> None:
    run = a_run()
    again = Results.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again == run
    data = run.to_dict()
    assert (data["ran_on"], data["schema"]) == ("CPU", results.SCHEMA)
    assert data["watermark"] == results.CPU_WATERMARK
    assert {"git", "command", "date"} <= data["environment"].keys()


def test_csv_has_every_row_under_the_documented_columns_and_says_where_it_comes_from() -> None:
    run = a_run()
    text = to_csv(run)
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert head[0] == f"# {results.CPU_WATERMARK}"
    assert any("command: hicache-io bench all" in line for line in head)
    body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    found = list(csv.DictReader(io.StringIO(body)))
    assert tuple(found[0]) == CSV_COLUMNS
    assert len(found) == len(run.rows)
    assert {line["ran_on"] for line in found} == {"CPU"}
    assert (found[0]["contender"], found[0]["ms"], found[0]["ms_low"], found[0]["ms_high"]) == (
        "auto",
        "2.0",
        "1.0",
        "3.0",
    )
    assert found[-1]["reason"].startswith('a, "reason"')
    assert found[-1]["ms"] == ""


def test_a_saved_run_that_is_something_else_is_refused_with_its_name(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"schema": 99}', '{"schema": 2, "rows": 3}', '{"bandwidth": 1}'):
        path = tmp_path / "x.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json: not a saved run"):
            results.load(path)
    with pytest.raises(ValueError, match="No such file"):
        results.load(tmp_path / "missing.json")


SAVED = sorted(
    path
    for path in (ROOT / "bench" / "results").glob("*/*.json")
    if "ceilings_gb_per_s" in json.loads(path.read_text(encoding="utf-8"))
)


@pytest.mark.parametrize("path", SAVED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_saved_run_of_this_repository_is_read_without_losing_a_figure(path: Path) -> None:
    saved = json.loads(path.read_text(encoding="utf-8"))
    again = results.load(path).to_dict()
    for name in ("ran_on", "environment", "ceilings_gb_per_s"):
        assert again[name] == saved[name]
    for row, known in zip(again["rows"], saved["rows"], strict=True):
        assert known.items() <= row.items()


def test_runs_of_one_machine_become_one_and_of_two_do_not() -> None:
    first, second = a_run("GPU", command="one"), a_run("GPU", command="two")
    second.rows = [row("auto", 7.0)]
    both = merged([first, second])
    assert len(both.rows) == len(first.rows)
    assert next(each for each in both.of("bandwidth") if each.contender == "auto").metrics["ms"].median == 7.0
    with pytest.raises(ValueError, match="gpu is NVIDIA H200 and NVIDIA B200"):
        merged([first, Results({**first.environment, "gpu": "NVIDIA B200"})])


# The watermark, in every form.


def test_every_table_of_cpu_figures_says_so_and_none_of_gpu_figures() -> None:
    text = tables.markdown(a_run())
    assert text.count(results.CPU_WATERMARK) == text.count("### ") == len(tables.tables(a_run())) == 6
    assert results.CPU_WATERMARK not in tables.markdown(a_run("GPU"))
    assert "NOT GPU SPEED" not in tables.markdown(a_run("GPU"))


def test_tables_on_a_terminal_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_each(tables.tables(a_run()), a_run().watermark, console(columns=200))
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count(results.CPU_WATERMARK) == 6
    assert 'a, "reason" | with <marks>' in shown


def test_a_table_line_is_a_case_and_a_column_a_contender() -> None:
    first = tables.tables(a_run())[0]
    assert first.columns == ("case", "auto", "copy_engine", "hybrid", "auto right?")
    assert len(first.lines) == 1
    assert first.lines[0][1].startswith("50.0")
    reasons = tables.tables(a_run())[-1]
    assert reasons.lines[0][:3] == ("bandwidth", "sglang_staged", "1")


@pytest.fixture
def matplotlib() -> None:
    reason = plots.why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("matplotlib")
def test_pictures_of_cpu_figures_say_so(tmp_path: Path) -> None:
    found = plots.figures(a_run())
    assert set(found) == {"bandwidth", "fence", "interference"}
    for figure in found.values():
        said = [text.get_text() for text in figure.texts]
        assert "CPU, NOT GPU SPEED" in said
        assert results.CPU_WATERMARK in said
    for figure in plots.figures(a_run("GPU")).values():
        assert not [text for text in figure.texts if "CPU" in text.get_text()]
    written = {path.name for path in plots.save(a_run(), tmp_path)}
    assert written == {f"{name}.{kind}" for name in found for kind in ("png", "svg")}
    assert (tmp_path / "fence.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_needs_nothing_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run, drawn in ((a_run(), plots.why_not() is None), (a_run("GPU"), False)):
        if not drawn:
            monkeypatch.setattr(plots, "why_not", lambda: "matplotlib is not installed")
        page = report.as_html(run)
        pictures = re.findall(r'src="data:image/png;base64,[A-Za-z0-9+/=]+"', page)
        without = re.sub(r'src="data:image/png;base64,[A-Za-z0-9+/=]+"', "", page)
        assert len(pictures) == (3 if drawn else 0)
        assert not re.search(r"https?:|//\w|<script|<link|@import|url\(|src=|href=(?!\"#)", without)
        assert (results.CPU_WATERMARK in page) == (run.watermark is not None)
        assert "&lt;marks&gt;" in page
        assert "<marks>" not in page
        assert drawn != ("No pictures: matplotlib is not installed" in page)
    names = {path.name for path in report.write_all(a_run(), tmp_path)}
    assert names == {"bench.json", "bench.csv", "tables.md", "report.html"}


def test_the_first_column_of_a_report_is_as_wide_as_its_words_on_a_phone() -> None:
    """Of a cell no style can say how wide it may be at most, so what is in it is an element."""
    page = report.as_html(a_run())
    tables_ = page.split('<div class="scroll"')[1:]
    assert tables_
    for each in tables_:
        rows = each.partition("</table>")[0].split("<tr>")[1:]
        assert all(re.match(r"<(t[dh])><span>[^<]*</span></\1>", row) for row in rows)
    style = page.partition("@media (max-width")[2].partition("</style>")[0]
    assert re.search(
        r"\.scroll span \{[^}]*width: max-content; max-width: \d+em; min-width: min-content", style
    )
    assert not re.search(r"min-width: \d", style)
    assert "ran_<wbr>on" in page


# Whether auto was right.


def judged(auto: Row, *others: Row) -> Row:
    judge([*others, auto])
    return auto


def test_auto_is_wrong_when_a_safe_contender_is_faster_beyond_the_spread() -> None:
    auto = judged(
        row("auto", 2.0, 2.1, 2.2, backend="hybrid"), row("copy_engine", 1.0, 1.0, 1.1), row("hybrid", 2, 2)
    )
    assert auto.fastest_safe == "copy_engine"
    assert auto.auto_right is False
    assert auto.missed_by == pytest.approx(1.1)
    assert "no: copy_engine, hybrid takes 110% longer" in tables.verdict(auto)


def test_auto_is_right_when_it_chose_the_fastest_whatever_the_noise() -> None:
    auto = judged(row("auto", 1.5, 1.6, backend="hybrid"), row("hybrid", 1.0, 1.1), row("copy_engine", 3.0))
    assert (auto.fastest_safe, auto.auto_right) == ("hybrid", True)


def test_auto_is_right_within_the_spread_and_when_it_is_faster_than_all() -> None:
    close = judged(row("auto", 1.0, 1.1, 1.2, backend="hybrid"), row("copy_engine", 0.9, 1.0, 1.05))
    assert close.auto_right
    assert close.missed_by == pytest.approx(0.1)
    faster = judged(row("auto", 1.0, backend="hybrid"), row("copy_engine", 2.0))
    assert (faster.auto_right, faster.missed_by) == (True, 0.0)


def test_what_is_unsafe_wrong_or_not_measured_is_no_better_choice() -> None:
    unsafe = row("sglang_kernel", 0.1, safe=False)
    wrong = row("memcpy_loop", 0.1, checked=False)
    failed = Row("bandwidth", CASE, "sglang_aot", safe=True, reason="no")
    auto = judged(row("auto", 1.0, backend="hybrid"), unsafe, wrong, failed, row("copy_engine", 1.5))
    assert (auto.fastest_safe, auto.auto_right) == ("copy_engine", True)
    alone = judged(row("auto", 1.0), unsafe)
    assert (alone.fastest_safe, alone.auto_right, alone.missed_by) == (None, None, None)
    assert tables.verdict(alone) == ""


@given(
    own=st.lists(st.floats(0.1, 100), min_size=1, max_size=6),
    others=st.lists(st.tuples(st.floats(0.1, 100), st.booleans()), max_size=5),
)
def test_auto_is_held_to_the_least_median_of_the_safe_ones(
    own: list[float], others: list[tuple[float, bool]]
) -> None:
    rows = [row(f"c{n}", ms, safe=safe) for n, (ms, safe) in enumerate(others)]
    auto = judged(row("auto", *own, backend="x"), *rows)
    safe = [ms for ms, is_safe in others if is_safe]
    if not safe:
        assert auto.auto_right is None
        return
    median = spread(*own).median
    assert auto.missed_by == pytest.approx(max(0.0, median / min(safe) - 1))
    assert auto.auto_right == (min(own) <= min(safe))


# Two runs.


def verdicts(before: Row, after: Row, **more: float) -> dict[str | None, str]:
    changes = compare(Results({"ran_on": "GPU"}, [before]), Results({"ran_on": "GPU"}, [after]), **more)
    return {each.metric: each.verdict for each in changes}


def test_slower_and_faster_mean_beyond_the_spread_in_the_direction_that_is_worse() -> None:
    slower = verdicts(row("hybrid", 1.0, 1.1, 1.2), row("hybrid", 2.0, 2.1, 2.2))
    assert set(slower.values()) == {"slower"}  # GB/s went down, everything else up
    faster = verdicts(row("hybrid", 2.0, 2.1, 2.2), row("hybrid", 1.0, 1.1, 1.2))
    assert set(faster.values()) == {"faster"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1.0, 1.1, 1.2), (1.15, 1.25, 1.4)),  # ranges overlap
        ((1.0, 1.0, 1.0), (1.01, 1.01, 1.01)),  # less than 2 %
        ((1.0,), (2.0,)),  # one repeat has no spread
        ((1.0, 1.0), (2.0,)),
    ],
)
def test_within_the_spread_is_the_same(before: tuple[float, ...], after: tuple[float, ...]) -> None:
    assert set(verdicts(row("hybrid", *before), row("hybrid", *after)).values()) == {"same"}


def test_a_stall_where_there_was_none_is_slower() -> None:
    before, after = row("hybrid", 1.0, 1.0), row("hybrid", 1.0, 1.0)
    before.metrics["stall_ms"], after.metrics["stall_ms"] = spread(0.0, 0.0), spread(0.5, 0.6)
    assert verdicts(before, after)["stall_ms"] == "slower"


def test_rows_that_lost_their_figures_are_worse_and_others_are_named() -> None:
    failed = Row("bandwidth", CASE, "hybrid", reason="WRONG BYTES: here")
    assert verdicts(row("hybrid", 1.0, 1.0), failed) == {None: "fails"}
    assert verdicts(failed, row("hybrid", 1.0)) == {None: "new"}
    found = compare(Results({}, [row("hybrid", 1.0)]), Results({}, [row("auto", 1.0)]))
    assert [(each.row.contender, each.verdict) for each in found] == [("auto", "new"), ("hybrid", "gone")]


@given(
    st.lists(st.floats(0.5, 2), min_size=2, max_size=6), st.lists(st.floats(0.5, 2), min_size=2, max_size=6)
)
def test_comparing_backwards_gives_the_opposite(first: list[float], second: list[float]) -> None:
    opposite = {"slower": "faster", "faster": "slower", "same": "same"}
    # By how much is relative to the first; the least change plays no part here.
    there = verdicts(row("hybrid", *first), row("hybrid", *second), least=0)
    back = verdicts(row("hybrid", *second), row("hybrid", *first), least=0)
    assert back == {metric: opposite[verdict] for metric, verdict in there.items()}
    assert set(verdicts(row("hybrid", *first), row("hybrid", *first)).values()) == {"same"}


def test_a_cpu_is_not_compared_with_a_gpu() -> None:
    assert "cannot be compared" in str(not_comparable(a_run("CPU"), a_run("GPU")))
    assert not_comparable(a_run(), a_run()) is None


def test_every_metric_says_its_unit_and_what_it_is() -> None:
    assert all(metric.says for metric in METRICS.values())
