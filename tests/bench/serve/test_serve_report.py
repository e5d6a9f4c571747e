"""What `bench serve` saves and prints."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_serve_account import turn
from typer.testing import CliRunner

from sglang_hicache.bench.cli import app
from sglang_hicache.bench.lab.serve_table import (
    arms_table,
    speed_table,
    summary_table,
    together,
    verified_table,
)
from sglang_hicache.bench.measure.plots import why_not
from sglang_hicache.bench.serve import arms, plots, report, result, tables
from sglang_hicache.bench.serve.account import Distribution
from sglang_hicache.bench.serve.arms import Cell
from sglang_hicache.bench.serve.models import ServedModel
from sglang_hicache.bench.serve.result import CPU_WATERMARK, ArmFacts, CellResult, ServeResult
from sglang_hicache.bench.serve.scrape import Written
from sglang_hicache.bench.serving import ServerError

MODEL = ServedModel("deepseek-v2-lite", "/somewhere/of/this/machine/deepseek-v2-lite", 512)


def a_result(ran_on: str = "GPU", **more: Any) -> ServeResult:
    cell = CellResult.of(Cell("a-cell-page64", MODEL, mem_layout="page_first_direct", tp=2, **more))
    wide = {
        "prompt_tokens": 123_456_789,
        "host_tokens": 87_654_321,
        "device_tokens": 12_345_678,
        "seconds": 0.01,
    }
    written = Written(90_000, 12.3456, 30.0, 9.9e12, 123_456_789, 1, 2, 3)
    for number in range(2):
        for arm in arms.ARMS:
            kept = Written() if arm == "none" else written
            cell.turns.append(turn(arm, number, written=kept, seen_tokens=123_000_000, errors=0, **wide))
    for arm in arms.ARMS:
        plugin = {"backend": arm, "counters": {"forward_fences": 123_456}}
        server = {
            "enable_hierarchical_cache": True,
            "hicache_mem_layout": "page_first_direct",
            "plugin": plugin,
        }
        cell.arms[arm] = ArmFacts(["--x"], 123.4, {**server, "pool_tokens": 65_536})
    return ServeResult({"ran_on": ran_on, "gpu": "NVIDIA H100 80GB HBM3", "date": "2026-11-26"}, [cell])


def test_no_line_of_a_table_is_longer_than_80_columns() -> None:
    for ran_on in ("GPU", "CPU"):
        found = a_result(ran_on)
        texts = [tables.as_text(each, found.watermark) for each in tables.tables(found)]
        assert len(texts) == 4
        assert max(len(line) for text in texts for line in text.splitlines()) <= tables.WIDTH


def test_a_table_says_what_was_measured() -> None:
    found = a_result()
    speed, cache, against, servers = (tables.as_text(each, None) for each in tables.tables(found))
    line = next(line for line in speed.splitlines() if line.startswith("auto"))
    assert line.split() == ["auto", "200.00", "±0.00", "500", "500", "100.0", "200.0", "200", "0"]
    line = next(line for line in cache.splitlines() if line.startswith("none"))
    # A server without HiCache writes nothing, and has no count of it.
    assert line.split()[-4:] == ["-", "-", "-", "-"]
    by = [line.split()[:3] for line in against.splitlines() if line.startswith("auto")]
    assert by == [["auto", "kernel", "1.00x"], ["auto", "null", "1.00x"], ["auto", "none", "1.00x"]]
    assert "123456" in servers


@given(st.floats(0, 9e11))
def test_a_count_is_short(value: float) -> None:
    text = tables._short(value)
    assert len(text) <= 6
    unit = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1], 1)
    shown = float(text.rstrip("kMG").replace(",", "")) * unit
    assert shown == pytest.approx(value, rel=0.006, abs=0.51)


def test_figures_of_a_cpu_are_marked_wherever_they_stand(tmp_path: Path) -> None:
    found = a_result("CPU")
    written = report.write_all(found, tmp_path)
    for path in written:
        if path.suffix in (".json", ".csv", ".md", ".html"):
            assert CPU_WATERMARK in html.unescape(path.read_text())
        if path.suffix == ".svg":
            assert "CPU, NOT GPU SPEED" in path.read_text() or "<use" in path.read_text()
    for each in tables.tables(found):
        assert CPU_WATERMARK in " ".join(tables.as_text(each, found.watermark).split())
    if why_not() is None:
        assert {path.suffix for path in written} == {".json", ".csv", ".md", ".html", ".png", ".svg"}
    assert CPU_WATERMARK not in (report.write_all(a_result(), tmp_path)[0]).read_text()


def test_a_result_is_read_as_it_was_saved(tmp_path: Path) -> None:
    found = a_result()
    path = result.save(found, tmp_path)
    assert json.dumps(result.load(path).to_dict()) == json.dumps(found.to_dict())
    assert list(tmp_path.iterdir()) == [path]
    assert "/somewhere" not in path.read_text()


def test_a_report_is_made_of_saved_results(tmp_path: Path) -> None:
    first, second = a_result(), a_result()
    second.cells[0].cell["name"] = "another"
    paths = [result.save(each, tmp_path, stem) for each, stem in ((first, "one"), (second, "two"))]
    done = CliRunner().invoke(app, ["bench", "report", *map(str, paths), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    whole = result.load(tmp_path / "out" / "serve.json")
    assert [cell.name for cell in whole.cells] == ["a-cell-page64", "another"]
    assert not result.is_one(tmp_path / "out" / "serve.csv")


def test_a_report_stays_in_its_folder_whatever_a_cell_is_called(tmp_path: Path) -> None:
    names = ["../out of it", "Qwen/Qwen3-8B", "<script>\n", ".", "a b", "a_b", "x" * 300]
    found = a_result()
    found.cells = [a_result().cells[0] for _ in names]
    for cell, name in zip(found.cells, names, strict=True):
        cell.cell["name"] = name
    out = tmp_path / "to" / "out"
    written = report.write_all(found, out)
    assert {path.parent for path in written} == {out}
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(written)
    if why_not() is None:
        assert sum(path.suffix == ".svg" for path in written) == len(names)


def test_a_saved_result_is_shown_in_short_or_one_workload_of_it(tmp_path: Path) -> None:
    path = result.save(a_result(), tmp_path)
    short, whole, one, none = (
        CliRunner().invoke(app, ["bench", "show", str(path), *more])
        for more in ([], ["--all"], ["--only", "chat"], ["--only", "nonsense"])
    )
    assert "cache" not in short.output.partition("--all")[0].replace("the caches", "")
    assert len(whole.output.splitlines()) > len(short.output.splitlines())
    assert one.exit_code == 0
    assert (none.exit_code, "there are chat" in none.output) == (2, True)
    compared = CliRunner().invoke(app, ["bench", "compare", str(path), str(path)])
    assert compared.exit_code == 2
    assert "a result of bench serve" in compared.output


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "hicache-io bench serve", "schema": 99}'])
def test_something_else_is_no_result(tmp_path: Path, text: str) -> None:
    path = tmp_path / "serve.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"serve\.json: not a saved result"):
        result.load(path)
    with pytest.raises(ValueError, match=r"none\.json: No such file"):
        result.load(tmp_path / "none.json")


def test_results_of_one_machine_become_one() -> None:
    first, second = a_result(), a_result()
    second.cells[0].turns = second.cells[0].turns[:1]
    whole = result.merged([first, second])
    assert [len(cell.turns) for cell in whole.cells] == [1]
    with pytest.raises(ValueError, match="ran_on"):
        result.merged([first, a_result("CPU")])


def test_problems_are_found() -> None:
    found = a_result()
    (cell,) = found.cells
    assert found.problems() == []
    cell.arms["hybrid"].problem = "it died\nat line 3"
    cell.turns.append(turn("kernel", 2, errors=1, first_error="HTTP 500"))
    cell.turns.append(turn("direct", 2, workload="prefill", cut=True))
    assert [text.removeprefix("a-cell-page64: ") for text in found.problems()] == [
        "hybrid: it died: at line 3",
        "kernel, chat: 1 requests failed, the first: HTTP 500",
        "direct, prefill: no round was finished",
    ]


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (
            [
                '  File "deepseek_v2.py", line 2791, in _is_layer_sparse',
                "AttributeError: 'DeepseekV2Config' object has no attribute 'moe_layer_freq'",
                "[2026-11-26 14:50:50] Received sigquit from a child process.",
                "[2026-11-26 14:50:50] kill_process_tree called: parent_pid=8524",
            ],
            "AttributeError: 'DeepseekV2Config' object has no attribute 'moe_layer_freq'",
        ),
        (
            ["torch.OutOfMemoryError: CUDA out of memory.", "[rank0] exits"],
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (
            ["[14:50] Scheduler hit an exception: ValueError: no room", "killed"],
            "[14:50] Scheduler hit an exception: ValueError: no room",
        ),
        (["loading", "Killed"], "Killed"),
    ],
)
def test_a_server_that_did_not_start_says_why_in_one_line(log: list[str], why: str) -> None:
    found = a_result()
    error = ServerError("starting the server", "the server's process ended with status -9", log)
    found.cells[0].arms["hybrid"].problem = str(error)
    assert found.problems() == [
        "a-cell-page64: hybrid: starting the server: the server's process ended with status -9: " + why
    ]


def test_outputs_must_be_right_and_a_damaged_one_must_differ() -> None:
    found = a_result()
    (cell,) = found.cells
    cell.turns = [
        turn("none", compared=2, same=2),
        turn("auto", compared=2, same=1),
        turn("hybrid", compared=2, same=2),
        turn("damaged", compared=2, same=2),
        turn("null", compared=2, same=0),
    ]
    assert [text.removeprefix("a-cell-page64: ") for text in found.problems()] == [
        "auto, chat: 1 of 2 outputs differ",
        "damaged, chat: a damaged write-back went unnoticed",
    ]
    assert any(each.title.endswith("outputs") for each in tables.tables(found))
    # Nothing came from the host: being right says nothing about the write-back.
    cell.turns = [turn("auto", compared=2, same=2, host_tokens=0)]
    assert ["no token came back from the host" in text for text in found.problems()] == [True]


@pytest.mark.parametrize(
    ("same", "as_default", "why"),
    [
        (1, 3, None),
        (3, 1, None),  # as without HiCache is right too
        (1, 2, "1 of 3 outputs differ from kernel's, which differ from none's too"),
        (1, None, "2 of 3 outputs differ"),
    ],
)
def test_where_sglangs_own_write_back_differs_too_it_is_the_right_one(
    same: int, as_default: int | None, why: str | None
) -> None:
    found = a_result()
    (cell,) = found.cells
    kernel = turn("kernel", compared=3, same=1, as_default=None)
    cell.turns = [kernel, turn("auto", compared=3, same=same, as_default=as_default)]
    assert found.problems() == ([] if why is None else [f"a-cell-page64: auto, chat: {why}"])
    # What was computed from another length of cached prefix is not compared; but something must be.
    cell.turns = [kernel, turn("auto", compared=3, same=1, as_default=1, default_compared=1)]
    assert found.problems() == []
    cell.turns = [kernel, turn("auto", compared=3, same=1, as_default=0, default_compared=0)]
    assert len(found.problems()) == 1
    # A damaged one must differ from it, too; and a kernel that is right is no excuse.
    cell.turns = [kernel, turn("damaged", compared=3, same=1, as_default=3)]
    assert [text.rpartition(": ")[2] for text in found.problems()] == ["a damaged write-back went unnoticed"]
    cell.turns = [
        turn("kernel", compared=3, same=3),
        turn("auto", compared=3, same=1, as_default=3),
        turn("damaged", compared=3, same=1, as_default=2),
    ]
    assert found.problems() == ["a-cell-page64: auto, chat: 2 of 3 outputs differ"]


def test_only_what_served_without_an_error_is_verified() -> None:
    found = a_result()
    found.environment |= {
        "gpu": "G",
        "sglang": "0.5.23",
        "date": "2026-11-26 14:00",
        "command": "python -m x first",
    }
    (cell,) = found.cells
    cell.arms["auto"] = ArmFacts(server={"attention_backend": "fa3", "plugin": {"backend": "hybrid"}})
    cell.turns = [turn("auto", compared=2, same=2)]
    row = verified_table([found]).splitlines()[2]
    assert "| fa3 | deepseek-v2-lite | `page_first_direct` | 64 | 2 | `hybrid` | 2 of 2 |" in row
    assert "`python -m x first --cell a-cell-page64`" in row
    cell.turns = [
        turn("kernel", compared=2, same=1),
        turn("auto", compared=2, same=1, as_default=2),
    ]
    assert "| 1 of 2; 2 of 2 as `kernel` |" in verified_table([found]).splitlines()[2]
    for bad in ({"errors": 1}, {"compared": 2, "same": 1}):
        cell.turns = [turn("auto", compared=2, same=2), turn("auto", 1, **bad)]
        assert len(verified_table([found]).splitlines()) == 2
    cell.turns = []
    assert len(verified_table([found]).splitlines()) == 2


def test_of_several_runs_the_last_that_served_a_cell_is_verified() -> None:
    machine = {"gpu": "G", "sglang": "0.5.23", "date": "2026-11-26 14:00", "command": "python -m x first"}
    good, bad, unserved = a_result(), a_result(), a_result()
    for run in (good, bad, unserved):
        run.environment |= machine
        server = {"attention_backend": "fa3", "plugin": {"backend": "hybrid"}}
        run.cells[0].arms["auto"] = ArmFacts(server=server)
    good.cells[0].turns = [turn("auto", compared=2, same=2)]
    bad.cells[0].turns = [turn("auto", compared=2, same=1)]
    unserved.cells[0].turns = []
    assert len(verified_table([good, bad]).splitlines()) == 2
    assert len(verified_table([bad, good]).splitlines()) == 3
    assert len(verified_table([good, unserved]).splitlines()) == 3


def a_page(page: int, auto: float, workload: str = "chat", **environment: str) -> ServeResult:
    """A cell in which ``auto`` serves that many requests a second."""
    found = a_result()
    found.environment |= {
        **{
            "gpu": "G",
            "driver": "1",
            "cuda": "13",
            "torch": "2",
            "sglang": "0.5.23",
            "date": "2026-11-26 14:00",
        },
        **environment,
    }
    (cell,) = found.cells
    cell.cell |= {"name": f"page{page}", "page_size": page, "more": ["--attention-backend", "fa3"]}
    cell.workloads = {workload: {"says": "what was asked", "requests": 7}}
    written = Written(2, 0.0087, 0.05, 1e9, 7, 0, 0, 0)
    cell.turns = [turn("auto", workload=workload, requests=7, seconds=7 / auto, written=written)]
    return found


def test_the_table_of_several_runs_has_each_page_size_once_and_the_last_of_it() -> None:
    text = speed_table(together([a_page(1, 10.0), a_page(64, 20.0), a_page(64, 30.0)]))
    (row,) = [line for line in text.splitlines() if line.startswith("| `auto`")]
    assert row.count("10.0 (10.0 to 10.0)") == row.count("30.0 (30.0 to 30.0)") == 1
    assert "20.0" not in row
    assert row.count(" 8.7 |") == 2
    assert "page 1: 1 rounds of 7 requests; page 64: 1 rounds of 7 requests." in text


def test_each_arm_has_its_copies_and_the_schedulers_thread() -> None:
    found = a_page(64, 15.0)
    (cell,) = found.cells
    counters = {"writes": 4, "copies": 1000, "submit_seconds": 0.01, "gap_seconds": 0.002}
    cell.arms["auto"] = ArmFacts(server={"plugin": {"backend": "hybrid", "counters": counters}})
    cell.arms["kernel"] = ArmFacts(server={"plugin": None})
    cell.turns.append(replace(cell.turns[0], arm="kernel"))
    kernel, auto = sorted(arms_table(found).splitlines()[4:], key=lambda line: "`auto`" in line)
    assert "| `auto` (`hybrid`) | 15.0 (15.0 to 15.0) |" in auto
    assert auto.endswith("| 250 | 3.00 |")
    assert kernel.endswith("|  |  |")
    # Only where cells differ in it, each row says which attention it had: by its server, or by its options.
    other = a_page(1, 10.0)
    other.cells[0].arms = {"auto": ArmFacts(args=["--attention-backend", "triton"])}
    server = {**(cell.arms["auto"].server or {}), "attention_backend": "fa3"}
    cell.arms = {"kernel": ArmFacts(), "auto": ArmFacts(server=server)}
    assert "attention" not in arms_table(found).splitlines()[2]
    both = arms_table(together([found, other])).splitlines()
    assert both[2].startswith("| attention | model |")
    assert [line.split(" | ")[0] for line in both[4:]] == ["| fa3", "| fa3", "| triton"]
    # A server of before these counters has none.
    del counters["submit_seconds"]
    assert arms_table(found).splitlines()[4:][0].endswith("|  |  |")
    with pytest.raises(ValueError, match="no cell has a turn"):
        arms_table(ServeResult(found.environment))


def test_what_no_arm_has_is_no_column() -> None:
    found = a_page(1, 10.0, "prefill")
    found.cells[0].turns = [
        replace(each, between_tokens_s=Distribution.of([])) for each in found.cells[0].turns
    ]
    header = speed_table(found, "prefill").splitlines()[2]
    assert "TTFT p50" in header
    assert "ITL" not in header
    with pytest.raises(ValueError, match="no cell has a workload chat"):
        speed_table(found)


@pytest.mark.parametrize("own", ["kernel", "direct"])
def test_the_summary_sets_auto_against_sglangs_own(own: str) -> None:
    found = a_page(64, 15.0)
    (cell,) = found.cells
    server = {"attention_backend": "fa3", "decode_attention_backend": "flashinfer"}
    cell.arms["auto"] = ArmFacts(server=server)
    with pytest.raises(ValueError, match="page64 has no chat of SGLang's own write-back"):
        summary_table(found)
    cell.turns.append(turn(own, requests=7, seconds=0.7))
    row = summary_table(found).splitlines()[4]
    assert row.startswith(f"| fa3, flashinfer | `page_first_direct` | 64 | chat | `{own}`: 10.0, ")
    assert "| 15.0, " in row
    assert row.endswith(" | 1.50x |  |  |")


def test_runs_on_different_machines_or_versions_have_no_common_table() -> None:
    with pytest.raises(ValueError, match="differ in driver, torch have no common table"):
        together([a_page(1, 10.0), a_page(64, 10.0, driver="2", torch="3")])
    with pytest.raises(ValueError, match="no runs"):
        together([])


def test_pictures_show_every_arm() -> None:
    if why_not() is not None:
        pytest.skip(str(why_not()))
    (figure,) = plots.figures(a_result()).values()
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == set(arms.ARMS)
    assert len(figure.axes) == 2


def test_a_csv_has_a_line_for_each_arm() -> None:
    lines = [line for line in result.to_csv(a_result()).splitlines() if not line.startswith("#")]
    assert len(lines) == 1 + len(arms.ARMS)
    assert lines[0].split(",")[:4] == ["ran_on", "cell", "model", "page_size"]
    assert json.dumps(a_result().to_dict())
