"""``bench compare`` as a gate, ``bench list`` and ``show``, on saved runs and on made ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repository import ROOT
from typer.testing import CliRunner, Result

from sglang_hicache.bench.cli import app
from sglang_hicache.bench.measure import compare, gate, judge, plots, report, results, tables
from sglang_hicache.bench.measure.cases import Case
from sglang_hicache.bench.measure.contenders import names
from sglang_hicache.bench.measure.results import Results, Row, Spread
from sglang_hicache.bench.serve import result as serve_result

RESULTS = ROOT / "bench" / "results"
ONE_COMMIT = (RESULTS / "2026-11-26-h100-slow-host/bench.json", RESULTS / "2026-11-26-h100/bench.json")
ONE_COMMIT_H200 = (
    RESULTS / "2026-11-28-h200/bandwidth-again.json",
    RESULTS / "2026-11-28-h200/bandwidth.json",
)
CASES = [
    Case("Qwen3-8B", "page_first", page, 4096, fragmented) for page in (1, 16, 64) for fragmented in (0, 1)
]

Times = Mapping[str, float | tuple[float, ...]]


def hicache_io(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})


def run(times: Times, *, link: float = 50.0, measurement: str = "bandwidth") -> Results:
    """Each contender takes that many ms in every case, or as many in each."""
    rows = []
    for name, given_times in times.items():
        each = given_times if isinstance(given_times, tuple) else (given_times,) * len(CASES)
        for case, ms in zip(CASES, each, strict=True):
            spread = Spread(ms, 0.99 * ms, 1.01 * ms, 5)
            figure = gate.FIGURES[measurement][0]
            rows.append(Row(measurement, case, name, metrics={figure: spread}, checked=True))
    return Results({"ran_on": "GPU", "gpu": "H"}, rows, {"link": Spread(link, link, link, 5)})


def verdicts(first: Results, second: Results, fail_over: float = 0.05) -> dict[str, str]:
    return {line.contender: line.verdict for line in gate.gate(first, second, fail_over)}


@pytest.mark.parametrize("pair", [ONE_COMMIT, ONE_COMMIT_H200], ids=["h100", "h200"])
def test_one_commit_on_two_hosts_is_unchanged_either_way(pair: tuple[Path, Path]) -> None:
    """Saved: one host's CPU was slower, so that figures by themselves say slower in hundreds of rows."""
    first, second = map(results.load, pair)
    assert first.environment["git"] == second.environment["git"]
    alone = [each.verdict for each in compare.compare(second, first)]
    assert alone.count("slower") > 100
    for both in ((first, second), (second, first)):
        lines = gate.gate(*both)
        compared = [line for line in lines if line.verdict not in ("gone", "new")]
        assert {line.contender for line in compared} == {row.contender for row in first.rows if row.metrics}
        assert {line.verdict for line in compared} == {"same"}
    for paths in (pair, pair[::-1]):
        assert hicache_io("bench", "compare", *paths).exit_code == 0


def test_what_is_printed_is_explained_and_nothing_else() -> None:
    more_cases = hicache_io("bench", "compare", *ONE_COMMIT_H200).stdout
    assert "new: these cases are not in the first run" in " ".join(more_cases.split())
    fewer_cases = hicache_io("bench", "compare", *ONE_COMMIT_H200[::-1]).stdout
    assert "gone: these cases are not in the second run" in " ".join(fewer_cases.split())
    for other in ("untold:", "noise:"):
        assert other not in more_cases + fewer_cases


def test_a_slower_hybrid_in_the_same_two_runs_is_found() -> None:
    """The gate above can fail: 30 % on top of what the other host does."""
    first, second = map(results.load, ONE_COMMIT)
    for row in second.rows:
        if row.contender == "hybrid":
            row.metrics = {name: _times(each, 1.3) for name, each in row.metrics.items()}
    (found,) = (line for line in gate.gate(first, second) if line.verdict != "same")
    assert (found.verdict, found.measurement, found.contender) == ("slower", "bandwidth", "hybrid")


def _times(each: Spread, by: float) -> Spread:
    return Spread(each.median * by, each.low * by, each.high * by, each.n)


def test_a_whole_host_that_is_slower_is_no_contenders_fault() -> None:
    before = run({"hybrid": 10, "copy_engine": 20, "sglang_kernel": 10, "memcpy_loop": 30})
    after = run({"hybrid": 15, "copy_engine": 30, "sglang_kernel": 15, "memcpy_loop": 45})
    assert set(verdicts(before, after).values()) == {"same"}


def test_who_is_slower_than_all_that_did_not_change_is_slower() -> None:
    before = run({"hybrid": 10, "sglang_kernel": 10, "memcpy_loop": 30})
    after = run({"hybrid": 15, "sglang_kernel": 10, "memcpy_loop": 33})
    (line,) = (each for each in gate.gate(before, after) if each.contender == "hybrid")
    assert (line.verdict, line.by, line.cases, line.beyond) == ("slower", "memcpy_loop", 6, 6)
    assert line.change == pytest.approx(1.5 / 1.1 - 1)
    assert line.raw == pytest.approx(1.5)
    assert verdicts(before, after, 0.4)["hybrid"] == "same"
    assert verdicts(after, before)["hybrid"] == "faster"


def test_between_two_unchanged_ones_nothing_is_told() -> None:
    before = run({"hybrid": 10, "sglang_kernel": 10, "sglang_direct": 10})
    after = run({"hybrid": 15, "sglang_kernel": 10, "sglang_direct": 20})
    (line,) = (each for each in gate.gate(before, after) if each.contender == "hybrid")
    assert (line.verdict, line.change) == ("untold", None)
    # It is told where it moved like one of them, or not at all.
    for ms in (20.5, 19.5, 9.8, 10.3):
        after = run({"hybrid": ms, "sglang_kernel": 9.5, "sglang_direct": 20})
        (line,) = (each for each in gate.gate(before, after) if each.contender == "hybrid")
        assert (line.verdict, line.change) == ("same", pytest.approx(0, abs=0.05)), ms


@pytest.mark.parametrize(("given_share", "slower"), [("5", 1), ("5%", 1), ("0.05", 1), ("60", 0), ("0.6", 0)])
def test_a_percentage_is_one_without_its_sign(tmp_path: Path, given_share: str, slower: int) -> None:
    """A gate that was told 5 and understood 500 % never fails."""
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, ms in zip(paths, (10, 15), strict=True):
        path.write_text(json.dumps(run({"hybrid": ms, "sglang_kernel": 10}).to_dict()))
    assert hicache_io("bench", "compare", *paths, "--fail-over", given_share).exit_code == slower


def test_what_a_saved_name_holds_ends_nothing(tmp_path: Path) -> None:
    """Of a model that is not known here, with a terminal's commands and a line of its own."""
    found = run({"hybrid": 10, "sglang_kernel": 10}, measurement="fence")
    evil = "G\x1b[31m\nanother line <b>"
    found.environment["gpu"] = evil
    for row in found.rows:
        row.case = replace(row.case, model="Mine\x1b[31m")
        row.contender += "\x1b[31m" if row.contender == "hybrid" else ""
    path = tmp_path / "evil.json"
    path.write_text(json.dumps(found.to_dict()))
    made = hicache_io("bench", "report", path, "--out", tmp_path / "out")
    assert made.exit_code == 0, made.output
    written = list((tmp_path / "out").iterdir())
    assert {each.suffix for each in written} >= {".json", ".csv", ".md", ".html", ".svg"}
    for each in written:
        if each.suffix not in (".png", ".json"):
            assert "\x1b" not in each.read_text(), each
    listed = hicache_io("bench", "list", tmp_path / "out").output.splitlines()
    assert len(listed) == 2
    told = hicache_io("bench", "compare", path, tmp_path / "out" / "bench.json")
    assert (told.exit_code, "\x1b" in told.output) == (0, False)


def test_an_unchanged_contender_that_moves_alone_is_noise() -> None:
    before = run({"sglang_kernel": 10, "memcpy_loop": 10})
    assert verdicts(before, run({"sglang_kernel": 20, "memcpy_loop": 10})) == {
        "sglang_kernel": "noise",
        "memcpy_loop": "same",
    }


def test_alone_it_is_compared_by_the_link() -> None:
    before = run({"hybrid": 10}, link=50)
    assert verdicts(before, run({"hybrid": 20}, link=25)) == {"hybrid": "same"}
    assert verdicts(before, run({"hybrid": 20}, link=50)) == {"hybrid": "slower"}
    # The scheduler's thread does not wait for the link.
    before, after = (
        run({"hybrid": ms}, link=link, measurement="submit") for ms, link in ((10, 50), (20, 25))
    )
    assert verdicts(before, after) == {"hybrid": "slower"}


def test_less_than_half_of_the_cases_is_no_change() -> None:
    before = run({"hybrid": 10, "sglang_kernel": 10})
    assert (
        verdicts(before, run({"hybrid": (20, 20, 10, 10, 10, 10), "sglang_kernel": 10}))["hybrid"] == "same"
    )
    assert (
        verdicts(before, run({"hybrid": (20, 20, 20, 20, 10, 10), "sglang_kernel": 10}))["hybrid"] == "slower"
    )


def test_repeats_that_overlap_are_no_change() -> None:
    before, after = run({"hybrid": 10, "sglang_kernel": 10}), run({"hybrid": 20, "sglang_kernel": 10})
    for row in after.rows:
        row.metrics = {name: replace(each, low=1.0) for name, each in row.metrics.items()}
    assert set(verdicts(before, after).values()) == {"same"}


def test_a_wait_where_there_was_none_is_slower() -> None:
    case = CASES[0]
    before, after = (
        Results({}, [Row("fence", case, "copy_engine", metrics={"stall_ms": spread})])
        for spread in (Spread(0, 0, 0, 5), Spread(0.5, 0.4, 0.6, 5))
    )
    (line,) = gate.gate(before, after)
    assert (line.figure, line.verdict, line.raw, line.change) == ("stall_ms", "slower", None, None)
    json.dumps(line.to_dict(), allow_nan=False)


def test_rows_without_figures() -> None:
    before, after = run({"hybrid": 10}), run({"auto": 10})
    assert verdicts(before, after) == {"hybrid": "gone", "auto": "new"}
    broken = Results({}, [Row("bandwidth", case, "hybrid", reason="WRONG BYTES: here") for case in CASES])
    (line,) = gate.gate(before, broken)
    assert (line.verdict, line.cases, line.reason) == ("fails", 6, "WRONG BYTES: here")
    # Another measurement is no comparison.
    assert gate.gate(before, run({"hybrid": 10}, measurement="latency")) == []


@given(st.lists(st.floats(1, 100), min_size=1, max_size=4), st.floats(0.1, 10))
def test_a_scaled_run_is_unchanged_whatever_was_measured_beside(ms: list[float], by: float) -> None:
    times = dict(zip(("hybrid", "sglang_kernel", "memcpy_loop", "auto"), ms, strict=False))
    found = verdicts(run(times), run({name: each * by for name, each in times.items()}, link=50 / by))
    assert set(found.values()) == {"same"}


@given(
    st.lists(st.floats(1, 100), min_size=3, max_size=3), st.lists(st.floats(1, 100), min_size=3, max_size=3)
)
def test_slower_one_way_is_faster_the_other(first: list[float], second: list[float]) -> None:
    who = ("hybrid", "sglang_kernel", "memcpy_loop")
    there = verdicts(run(dict(zip(who, first, strict=True))), run(dict(zip(who, second, strict=True))))
    back = verdicts(run(dict(zip(who, second, strict=True))), run(dict(zip(who, first, strict=True))))
    opposite = {"slower": "faster", "faster": "slower"}
    assert back == {name: opposite.get(verdict, verdict) for name, verdict in there.items()}


def saved(folder: Path, found: Results) -> Path:
    results.save(found, folder)
    return folder / "bench.json"


def test_the_command(tmp_path: Path) -> None:
    before = saved(tmp_path / "a", run({"hybrid": 10, "auto": 10, "sglang_kernel": 10}))
    after = saved(tmp_path / "b", run({"hybrid": 15, "auto": 10, "sglang_kernel": 10}))
    done = hicache_io("bench", "compare", before, after)
    assert done.exit_code == 1
    assert "slower   bandwidth     hybrid" in done.stdout
    assert "+50.0%" in done.stdout
    assert "1 slower, 0 faster, 2 same" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    for words in (["--fail-over", "60%"], ["--fail-over", "0.6"], ["--only", "auto"]):
        assert hicache_io("bench", "compare", before, after, *words).exit_code == 0, words
    assert hicache_io("bench", "compare", before, after, "--only", "bandwidth").exit_code == 1
    lines = json.loads(hicache_io("bench", "compare", before, after, "--sort", "contender", "--json").stdout)[
        "lines"
    ]
    assert [line["contender"] for line in lines] == ["auto", "hybrid", "sglang_kernel"]
    shown = json.loads(hicache_io("bench", "compare", before, after, "--all", "--json").stdout)["changes"]
    assert {(each["contender"], each["metric"]) for each in shown} == {("hybrid", "ms")}
    for words in (["--fail-over", "much"], ["--fail-over", "-1%"], ["--only", "hybird"]):
        refused = hicache_io("bench", "compare", before, after, *words)
        assert refused.exit_code == 2, words
        assert words[1] in refused.stderr


def test_list_finds_runs_of_both_kinds_and_nothing_else(tmp_path: Path) -> None:
    done = json.loads(hicache_io("bench", "list", RESULTS, "--json").stdout)["runs"]
    by_file = {Path(each["file"]).relative_to(RESULTS).as_posix(): each["measured"] for each in done}
    assert by_file["2026-11-26-h100/bench.json"]["bandwidth"] == 1080
    assert by_file["2026-11-26-h100-servers/first.json"] == {"servers": 2}
    assert "2026-11-26-h100/calibration.json" not in by_file
    assert hicache_io("bench", "list", tmp_path).exit_code == 2


def test_list_names_the_cells_of_servers_in_80_columns(tmp_path: Path) -> None:
    listed = hicache_io("bench", "list", RESULTS)
    lines = [line for line in listed.stdout.splitlines() if line.startswith("    ")]
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith(("bandwidth", "latency", "servers"))]
    assert "servers 2: kvheavy-triton-page1, kvheavy-fa3-flashinfer-page64" in " ".join(listed.stdout.split())
    cells = {
        each["file"].rpartition("/")[2]: each["cells"]
        for each in _listed(RESULTS / "2026-11-26-h100-servers")
    }
    assert cells["first.json"] == ["kvheavy-page1", "kvheavy-page64"]
    found = serve_result.load(RESULTS / "2026-11-26-h100-servers" / "first.json")
    found.cells = [
        replace(found.cells[0], cell={**found.cells[0].cell, "name": f"cell-{at}"}) for at in range(9)
    ]
    serve_result.save(found, tmp_path)
    shown = " ".join(hicache_io("bench", "list", tmp_path).stdout.split())
    assert shown.endswith(
        "servers 9: cell-0 of kvheavy, cell-1 of kvheavy, cell-2 of kvheavy, "
        "cell-3 of kvheavy, cell-4 of kvheavy, cell-5 of kvheavy, 3 more"
    )
    assert len(_listed(tmp_path)[0]["cells"]) == 9


def _listed(folder: Path) -> list[dict[str, Any]]:
    return json.loads(hicache_io("bench", "list", folder, "--json").stdout)["runs"]  # type: ignore[no-any-return]


def test_show_prints_a_short_table_for_each_layout_and_all_with_all() -> None:
    done = hicache_io("bench", "show", ONE_COMMIT[1])
    assert done.exit_code == 0
    heads = [line for line in done.stdout.splitlines() if line.rstrip().endswith(": GB/s of one write")]
    titles = ("auto beside SGLang's default", "page_first", "layer_first", "page_first_direct")
    assert [head.partition(":")[0] for head in map(str.strip, heads)] == list(titles)
    assert len(done.stdout.splitlines()) < 160
    missing = sum(not row.metrics for row in results.load(ONE_COMMIT[1]).rows)
    assert f"why {missing} have no figures: --all" in done.stdout
    alone = hicache_io("bench", "show", ONE_COMMIT[1], "--only", "latency")
    assert "Latency: us from before" in alone.stdout
    every = hicache_io("bench", "show", ONE_COMMIT[1], "--all", "--only", "latency")
    assert "Latency: us from before" in every.stdout
    assert "Bandwidth" not in every.stdout
    servers = hicache_io("bench", "show", RESULTS / "2026-11-26-h100-servers/first.json")
    assert (servers.exit_code, "auto" in servers.stdout) == (0, True)
    assert hicache_io("bench", "show", "no.json").exit_code == 2


def test_the_short_tables_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    from sglang_hicache.policy.terminal import console

    found = results.load(ONE_COMMIT[1])
    tables.print_each(tables.summary(found), found.watermark, console(columns=80))
    cells = {cell for table in tables.summary(found) for line in table.lines for cell in line}
    printed = capsys.readouterr().out
    assert {cell for cell in cells if cell not in printed} == set(), "broken in two"


def test_the_defaults_are_sglangs() -> None:
    found = results.load(ONE_COMMIT[1])
    overview, *layouts, others = tables.summary(found)
    assert [line[:2] for line in overview.lines] == [
        ("page_first", "36"),
        ("layer_first", "36"),
        ("page_first_direct", "32"),
    ]
    told = [table.notes[0].partition(".")[0] for table in layouts]
    assert told[0].endswith("sglang_staged")
    assert "sglang_kernel_tma" in told[1]
    assert told[2].endswith("sglang_direct")
    assert any(line[0] == "submit submit_us" for line in others.lines)


@pytest.mark.parametrize(
    ("auto_ms", "other_ms", "says"),
    [
        ((1.0, 1.1), (2.0, 2.1), "yes (hybrid)"),
        ((1.0, 1.2), (0.9, 1.1), "not told apart: hybrid, copy_engine"),
        ((2.0, 2.1), (1.0, 1.1), "no: copy_engine, hybrid takes 95% longer"),
    ],
)
def test_whether_auto_was_right(auto_ms: tuple[float, ...], other_ms: tuple[float, ...], says: str) -> None:
    rows = [
        Row("bandwidth", CASES[0], name, metrics={"ms": Spread.of(ms)}, backend=by, safe=True, checked=True)
        for name, by, ms in (("auto", "hybrid", auto_ms), ("copy_engine", "copy_engine", other_ms))
    ]
    judge.judge(rows)
    assert tables.verdict(rows[0]) == says


def test_contenders_are_told_apart_in_pictures() -> None:
    styles = [plots.style(name) for name in names()]
    assert len({style["marker"] for style in styles}) == len(styles)
    assert len({style["color"] for style in styles}) == len(styles)
    for style in styles:
        red, green, blue = (int(style["color"][at : at + 2], 16) / 255 for at in (1, 3, 5))
        # Yellow on white: the luminance of sRGB (ITU-R BT.709) leaves no contrast.
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.75, style


def test_a_report_begins_with_a_summary_and_contents_that_lead_somewhere() -> None:
    page = report.as_html(results.load(ONE_COMMIT[1]))
    places = (
        "auto beside SGLang&#x27;s default: GB/s of one write</h2>",
        "<nav>",
        'id="pictures"',
        'id="page_first',
    )
    found = [page.index(each) for each in (*places, 'id="where"')]
    assert found == sorted(found)
    targets = re.findall(r'href="#([^"]+)"', page)
    assert len(targets) == len(set(targets)) > 8
    assert set(targets) <= set(re.findall(r'id="([^"]+)"', page))
    assert 'name="viewport" content="width=device-width' in page
    tables_in_boxes = page.count('<div class="scroll" tabindex="0"><table>')
    assert page.count("<table") == tables_in_boxes + page.count('<table class="about">')
