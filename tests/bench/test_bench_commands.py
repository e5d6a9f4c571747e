"""``hicache-io bench`` and ``hicache-io calibrate`` as a user meets them, and the suite for a GPU machine."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sglang_hicache.bench.calibrate import command as calibrate_command
from sglang_hicache.bench.calibrate import machine_policy
from sglang_hicache.bench.calibrate import run as calibrating
from sglang_hicache.bench.calibrate.run import Calibration, Plan
from sglang_hicache.bench.cli import app
from sglang_hicache.bench.lab import gpu_suite
from sglang_hicache.bench.measure import report, results, suite
from sglang_hicache.bench.measure.cases import Case
from sglang_hicache.bench.measure.devices import gpu_missing
from sglang_hicache.bench.measure.results import CPU_WATERMARK, Results, Row, Spread

CASE = Case("Qwen3-8B", "page_first", 16, 4096, True)
needs_no_gpu = pytest.mark.skipif(gpu_missing() is None, reason="it is about machines without a GPU")


def hicache_io(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def saved(path: Path, *ms: float, ran_on: str = "GPU", reason: str | None = None) -> Path:
    made = Row("bandwidth", CASE, "hybrid", checked=True, reason=reason)
    made.metrics = {"ms": Spread.of(ms), "gb_per_s": Spread(1.0, 1.0, 1.0, len(ms))} if ms else {}
    results.save(Results({"ran_on": ran_on, "gpu": "NVIDIA H200"}, [made]), path)
    return path / "bench.json"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["bench", "bandwidth", "--layout", "page_frist"],
            "unknown layout 'page_frist' (did you mean 'page_first'?)",
        ),
        (["bench", "latency", "--backend", "hybird"], "unknown contender 'hybird' (did you mean 'hybrid'?)"),
        (["bench", "all", "--model", "Qwen3-8"], "(did you mean 'Qwen3-8B'?)"),
        (["bench", "fence", "--attention", "fa33"], "(did you mean 'fa3'?)"),
        (["bench", "interference", "--forward", "gem"], "(did you mean 'gemm'?)"),
        (["bench", "submit", "--contiguity", "fragmentd"], "(did you mean 'fragmented'?)"),
        (["bench", "submit", "--page-size", "0"], "--page-size must be at least 1, not 0"),
        (["bench", "submit", "--tokens", "8", "--page-size", "16"], "fewer --tokens than a page has"),
        (["bench", "bandwidth", "--option", "hybrid.gather_cta=3"], "did you mean 'gather_ctas'?"),
        (["bench", "bandwidth", "--option", "hybrid.gather_ctas=many"], "must be a whole number"),
        (
            ["bench", "bandwidth", "--quick", "--policy", "no/such.yaml"],
            "no/such.yaml: there is no such file",
        ),
        (["bench", "compare", "no.json", "no.json"], "no.json: No such file"),
        (["bench", "report", "no.json", "--out", "x"], "no.json: No such file"),
        (["calibrate", "--model", "Qwen"], "unknown model 'Qwen'"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(words: list[str], says: str) -> None:
    done = hicache_io(*words)
    assert done.exit_code == 2
    assert says in done.stderr.splitlines()[-1]
    assert not done.stdout


@needs_no_gpu
def test_a_run_on_a_cpu_says_so_in_every_form(tmp_path: Path, tiny: tuple[str, str]) -> None:
    words = [
        "--model",
        "tiny",
        "--tokens",
        "32",
        "--page-size",
        "4",
        "--layout",
        "layer_first",
        "--repeats",
        "2",
    ]
    done = hicache_io("bench", "bandwidth", *words, "--contiguity", "fragmented", "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown == json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert shown["watermark"] == CPU_WATERMARK
    assert {row["contender"] for row in shown["rows"] if row["metrics"]} >= {"auto", "hybrid", "copy_engine"}
    for name in ("bench.csv", "tables.md", "report.html"):
        assert CPU_WATERMARK in (tmp_path / name).read_text(encoding="utf-8"), name
    assert CPU_WATERMARK in " ".join(done.stderr.split())
    done = hicache_io("bench", "latency", *words)
    assert done.exit_code == 0
    assert CPU_WATERMARK in " ".join(done.stdout.split())


@needs_no_gpu
def test_submit_without_a_gpu_runs_against_a_driver_that_does_nothing(tmp_path: Path) -> None:
    words = ["--tokens", "64", "--page-size", "16", "--layout", "page_first", "--repeats", "2", "--json"]
    out = ("--out", str(tmp_path))
    done = hicache_io("bench", "submit", *words, "--backend", "hybrid", "--backend", "copy_engine", *out)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["rows"]
    rows = {row["contender"]: row["metrics"] for row in found}
    copies = {row["contender"]: row["copies"] for row in found}
    assert set(rows) == {"hybrid", "copy_engine", "host_values"}
    for name in ("hybrid", "copy_engine"):
        parts = rows[name]["plan_us"]["low"], rows[name]["device_us"]["low"]
        assert all(part > 0 for part in parts)
        assert sum(parts) <= rows[name]["submit_us"]["high"] * 1.01
        measured = rows[name]["submit_us"]["median"] + rows[name]["later_us"]["median"]
        assert rows[name]["model_us"]["median"] == pytest.approx(measured + 0.6 * copies[name])
    assert rows["host_values"]["values_us"]["median"] > 0
    saved = list(csv.DictReader(line for line in (tmp_path / "bench.csv").open() if line[0] != "#"))
    assert {row["contender"] for row in saved if row["model_us"]} == {"hybrid", "copy_engine"}


def test_wrong_bytes_end_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(ask: Any, say: Any, save: Any) -> Results:
        return Results(
            {"ran_on": "CPU"}, [Row("bandwidth", CASE, "hybrid", reason=f"{results.WRONG}: k, layer 0")]
        )

    monkeypatch.setattr(suite, "measure", wrong)
    done = hicache_io("bench", "bandwidth")
    assert done.exit_code == 1
    assert "hybrid: WRONG BYTES: k, layer 0" in " ".join(done.stderr.split())
    assert "nothing could be measured" in done.stderr


def test_compare_ends_with_1_when_something_got_slower_and_0_when_not(tmp_path: Path) -> None:
    before = saved(tmp_path / "a", 1.0, 1.1, 1.2)
    slower = saved(tmp_path / "b", 2.0, 2.1, 2.2)
    done = hicache_io("bench", "compare", before, slower)
    assert done.exit_code == 1
    assert "1 slower, 0 faster, 0 same" in done.stdout
    assert hicache_io("bench", "compare", slower, before).exit_code == 0
    assert hicache_io("bench", "compare", before, before).exit_code == 0
    assert hicache_io("bench", "compare", before, slower, "--fail-over", "200%").exit_code == 0
    broken = saved(tmp_path / "c", reason="WRONG BYTES: here")
    done = hicache_io("bench", "compare", before, broken, "--json")
    assert done.exit_code == 1
    (change,) = json.loads(done.stdout)["lines"]
    assert (change["verdict"], change["reason"]) == ("fails", "WRONG BYTES: here")
    cpu = saved(tmp_path / "d", 1.0, 1.1, ran_on="CPU")
    done = hicache_io("bench", "compare", before, cpu)
    assert done.exit_code == 2
    assert "cannot be compared" in done.stderr


def test_report_of_saved_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.plots, "why_not", lambda: "not here")
    runs = [saved(tmp_path / "a", 1.0, 1.1), saved(tmp_path / "b", 7.0, 8.0)]
    done = hicache_io("bench", "report", *runs, "--out", tmp_path)
    assert done.exit_code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "NVIDIA H200" in page
    assert CPU_WATERMARK not in page
    assert [row.metrics["ms"].median for row in results.load(tmp_path / "bench.json").rows] == [7.5]
    done = hicache_io("bench", "report", runs[0], saved(tmp_path / "c", 1.0, ran_on="CPU"), "--out", tmp_path)
    assert done.exit_code == 2
    assert "runs of different machines" in done.stderr


# calibrate


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Calibration:
    """What measuring gives, without measuring."""
    from test_calibration import CPU, sweeps

    found = Calibration(dict(CPU), Plan(), sweeps())

    def give(plan: Plan, *, cpu: bool, say: Any) -> Calibration:
        calibrating.conclude(found)
        return found

    monkeypatch.setattr(calibrate_command, "measure", give)
    return found


@needs_no_gpu
def test_calibrate_needs_a_gpu_or_cpu() -> None:
    done = hicache_io("calibrate", "--dry-run")
    assert done.exit_code == 2
    assert "needs an NVIDIA GPU" in done.stderr


@pytest.mark.usefixtures("measured")
def test_calibrate_on_a_cpu_writes_no_machine_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = tmp_path / "machine.yaml"
    monkeypatch.setenv("SGLANG_HICACHE_IO_MACHINE_POLICY", str(machine))
    for words in ([], ["--out", str(machine)], ["--out", str(tmp_path / "x" / ".." / "machine.yaml")]):
        done = hicache_io("calibrate", "--cpu", *words)
        assert done.exit_code == 2
        assert "this machine's policy file" in done.stderr
    assert not machine.exists()
    out = tmp_path / "rules.yaml"
    done = hicache_io("calibrate", "--cpu", "--out", out, "--json")
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["written"], shown["ran_on"], shown["watermark"]) == (str(out), "CPU", CPU_WATERMARK)
    assert out.read_text() == shown["policy"]
    assert "NOT FOR USE" in shown["policy"]


def test_a_dry_run_writes_nothing_and_prints_the_rules(measured: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "rules.yaml"
    done = hicache_io("calibrate", "--cpu", "--dry-run", "--out", out)
    assert done.exit_code == 0
    assert not out.exists()
    assert "calibrated-layer-first-copy-engine" in done.stdout


def test_measurements_that_give_no_rule_end_with_1_and_say_why(measured: Calibration, tmp_path: Path) -> None:
    for layout in ("layer_first", "page_first"):
        del measured.times[layout]["hybrid"]
        measured.refused[layout] = "hybrid was not measured: no staging"
    out = tmp_path / "rules.yaml"
    done = hicache_io("calibrate", "--cpu", "--out", out)
    assert done.exit_code == 1
    assert "no number for layer_first: hybrid was not measured: no staging" in done.stdout
    assert not out.exists()


def test_explain_cites_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_calibration import GPU, calibrated, sweeps

    text = calibrated(sweeps(), GPU).text()
    assert text is not None
    machine = tmp_path / "machine.yaml"
    monkeypatch.setenv("SGLANG_HICACHE_IO_MACHINE_POLICY", str(machine))
    machine_policy.install(text, machine, GPU)
    facts = [
        "--attention-backend",
        "triton",
        "--gpu-arch",
        "sm90",
        "--mem-layout",
        "layer_first",
        "--kv-kind",
        "mha",
    ]
    done = hicache_io("explain", *facts, "--fact", "gpu_name=NVIDIA H200", "--json")
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    assert "NVIDIA H200, driver 580.159.04" in json.dumps(shown["routes"])
    assert "calibrated-layer-first-copy-engine" in json.dumps(shown["considered"])


@needs_no_gpu
def test_a_calibration_on_this_cpu_measures_every_backend_and_option(tiny: tuple[str, str]) -> None:
    plan = Plan("tiny", 32, (4, 16), {"gather_ctas": (8, 32)}, rounds=2, repeats=1)
    said: list[str] = []
    found = calibrating.calibrate(plan, cpu=True, say=lambda text, done, total: said.append(text))
    for layout in calibrating.LAYOUTS:
        assert set(found.times[layout]) == {"copy_engine", "hybrid", "fenced_kernel"}
        for sweep in found.times[layout].values():
            assert len(sweep) == 3  # two page sizes and one contiguous write
            assert all(len(ms) == 2 for ms in sweep.values())
        assert (layout in found.segments) != (layout in found.refused)
    assert {value: len(ms) for value, ms in found.times["gather_ctas"]["hybrid"].items()} == {8: 2, 32: 2}
    assert len(said) == 2 * (2 * 3 + 1)
    json.dumps(found.to_dict())


# the suite for a GPU machine


@needs_no_gpu
def test_the_gpu_suite_on_a_cpu(
    tmp_path: Path, tiny: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"latency": suite.Grid(models=("tiny",), tokens=(32,), page_sizes=(4,))}
    monkeypatch.setattr(suite, "GRIDS", {**suite.GRIDS, **small})
    monkeypatch.setattr(gpu_suite, "ON_CPU", Plan("tiny", 32, (4,), {}, rounds=2, repeats=1))
    words = ["--cpu", "--parts", "bench", "profile", "calibrate", "--measure", "latency", "--repeats", "2"]
    assert gpu_suite.main([*words, "--out", str(tmp_path)]) == 0
    parts = json.loads((tmp_path / "suite.json").read_text(encoding="utf-8"))["parts"]
    assert parts["bench"]["status"] == "good"
    assert parts["profile"]["status"] == "good"
    profiled = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))
    assert profiled["watermark"] == results.CPU_WATERMARK
    parts_found = {part["part"] for part in profiled["parts"]}
    assert parts_found == {"gather", "sm_store", "drain", "write", "small_copy", "turns", "beside"}
    assert all(part["metrics"] for part in profiled["parts"])
    assert parts["calibrate"]["status"] in ("good", "skipped")
    assert {"bench.json", "bench.csv", "tables.md", "report.html", "calibration.json"} <= {
        path.name for path in tmp_path.iterdir()
    }


@needs_no_gpu
def test_the_gpu_suite_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--cpu"]):
        with pytest.raises(SystemExit) as ended:
            gpu_suite.main([*words, "--out", str(tmp_path)])
        assert ended.value.code == 2
        assert "GPU" in capsys.readouterr().err


def test_a_part_that_breaks_is_bad_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(args: Any) -> gpu_suite.PartOutcome:
        raise RuntimeError("no luck")

    monkeypatch.setattr(gpu_suite, "gpu_missing", lambda: None)
    monkeypatch.setattr(gpu_suite, "describe_environment", lambda cpu: {"ran_on": "GPU"})
    monkeypatch.setitem(gpu_suite.RUNS, "tests", broken)
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: None)
    assert gpu_suite.main(["--parts", "tests", "sanitize", "--out", str(tmp_path)]) == 1
    parts = json.loads((tmp_path / "suite.json").read_text(encoding="utf-8"))["parts"]
    assert (parts["tests"]["status"], parts["tests"]["detail"]) == ("bad", "RuntimeError: no luck")
    assert parts["sanitize"]["status"] == "skipped"


def test_what_a_gpu_machine_runs_needs_neither_typer_nor_rich_nor_matplotlib() -> None:
    import subprocess

    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib'): sys.modules[name] = None\n"
        "from sglang_hicache.bench.lab import gpu_suite\n"
        "from sglang_hicache.bench.measure import report, results\n"
        "print(report.as_html(results.Results({'ran_on': 'GPU'})).count('No pictures'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1", done.stderr
