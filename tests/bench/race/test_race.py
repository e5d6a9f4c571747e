"""`hicache-io race`, and the simulation behind it. The cases run in processes of their own: they change
SGLang.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from own_process import SHARD, run_cases
from repository import VERSIONS

from sglang_hicache.bench import damaged
from sglang_hicache.bench.race import command as race_command
from sglang_hicache.io_backends.sglang import versions

pytestmark = pytest.mark.sglang

HERE = Path(__file__).parent
Python = tuple[str, ...]


def test_help_and_completion_name_what_is_there() -> None:
    """Without importing it."""
    from sglang_hicache.bench.race.simulation import modes, setups

    assert tuple(modes.MODES) == race_command.MODES
    assert setups.LAYOUTS == race_command.LAYOUTS


# Minutes of one core each; more where others run beside it.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", ["0/4", "1/4", "2/4", "3/4"])
def test_fences_and_races(subtests: pytest.Subtests, share: str, plain_python: Python) -> None:
    run_cases(subtests, HERE / "race_cases.py", {SHARD: share}, plain_python)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", ["0/3", "1/3", "2/3"])
def test_every_mode(subtests: pytest.Subtests, share: str, plain_python: Python) -> None:
    run_cases(subtests, HERE / "race_mode_cases.py", {SHARD: share}, plain_python)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", ["0/2", "1/2"])
def test_states(subtests: pytest.Subtests, share: str, plain_python: Python) -> None:
    run_cases(subtests, HERE / "race_state_cases.py", {SHARD: share}, plain_python)


def in_release(subtests: pytest.Subtests, version: str, cases: str) -> None:
    tree = VERSIONS / version
    if not (tree / ".complete").exists():
        pytest.skip("not unpacked; run `make versions`")
    run_cases(subtests, HERE / cases, {"PYTHONPATH": str(tree)})


HOLD_STATES = [release.version for release in versions.RELEASES[:-1] if release.states_held]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", HOLD_STATES)
def test_states_of_another_release(subtests: pytest.Subtests, version: str) -> None:
    in_release(subtests, version, "race_state_cases.py")


@pytest.mark.timeout(1800)
def test_rows_of_sliding_layers(subtests: pytest.Subtests, plain_python: Python) -> None:
    run_cases(subtests, HERE / "window_cases.py", {}, plain_python)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", [release.version for release in versions.RELEASES[:-1]])
def test_rows_of_sliding_layers_of_another_release(subtests: pytest.Subtests, version: str) -> None:
    """Also of those whose rows are not held: that is shown."""
    in_release(subtests, version, "window_cases.py")


@pytest.mark.timeout(1800)
def test_any_program(subtests: pytest.Subtests, plain_python: Python) -> None:
    run_cases(subtests, HERE / "race_programs.py", {}, plain_python)


def race(*options: str, status: int, python: Python = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    command = [*python, "-c", "from sglang_hicache.bench.cli import main; main()", "race", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == status, done.stderr[-4_000:]
    return done


def test_a_published_sglang_without_a_write_fence() -> None:
    """0.5.22: the last token of a finished request is copied while the next decode writes it."""
    tree = VERSIONS / "0.5.22"
    if not (tree / ".complete").exists():
        pytest.skip("not unpacked; run `make versions`")
    options = ["--backend", "kernel", "--json", "--sglang-path", str(tree)]
    found: dict[str, Any] = json.loads(race(*options, status=1).stdout)
    assert found["seeds"] == 200
    assert found["sglang"] == {
        "version": "0.5.22",
        "load_fence": True,
        "write_fence": False,
        "forward_fence": False,
    }
    assert found["kinds"] == ["read_before_write", "sm_overlap"]
    assert found["corrupted"]
    (early,) = (each for each in found["races"] if each["kind"] == "read_before_write")
    assert early["first"]["stream"] == "forward"
    assert early["second"]["issued"].startswith("sglang/srt/mem_cache/pool_host/mha.py")
    assert "must wait" in early["fence"]
    # What it says replays it is one seed of the same.
    words = found["replay"].split()
    assert words[:2] == ["hicache-io", "race"]
    again = json.loads(race(*words[2:], status=1).stdout)
    assert again["seeds"] == 1
    assert set(again["kinds"]) <= set(found["kinds"])


def test_a_good_run_says_so_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace, plot = tmp_path / "trace.json", tmp_path / "streams.png"
    done = race("--seeds", "3", "--json", "--trace", str(trace), "--plot", str(plot), status=0)
    found = json.loads(done.stdout)
    assert found["races"] == []
    assert found["corrupted"] == []
    assert found["replay"] is None
    assert "no race, and every row right" in " ".join(done.stderr.split())
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["name"] for event in events} & {"gather", "drain"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_modes_are_run_together(plain_python: Python) -> None:
    done = race(
        "--seeds",
        "2",
        "--json",
        "--mode",
        "retraction",
        "--mode",
        "no-overlap",
        status=0,
        python=plain_python,
    )
    found = json.loads(done.stdout)
    assert found["modes"] == ["retraction", "no-overlap"]
    assert found["seeds"] == 2
    assert found["races"] == []
    assert "modes retraction, no-overlap" in " ".join(done.stderr.split())
    bad = race(
        "--seeds", "2", "--json", "--mode", "no-overlap", "--backend", "kernel", status=1, python=plain_python
    )
    found = json.loads(bad.stdout)
    assert {each["mode"] for each in found["races"]} == {"no-overlap"}
    assert found["replay"].split()[2:] == [
        *("--json", "--backend", "kernel", "--mode", "no-overlap"),
        *("--seed", str(found["races"][0]["seeds"][0])),
    ]


NOTHING = """
class Nothing:
    name = "nothing"

    def __init__(self, device, options):
        pass

    def supports(self, geometry):
        return "no pool is mine"

    def prepare(self, geometry):
        pass

    def submit(self, transfer, stream):
        raise AssertionError
"""


def test_a_backend_that_served_nothing_is_not_called_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_python: Python
) -> None:
    (tmp_path / "their_backend.py").write_text(NOTHING)
    installed = damaged.third_party(tmp_path, "nothing", "their_backend:Nothing")
    monkeypatch.setenv("PYTHONPATH", installed["PYTHONPATH"])
    said = race("--seeds", "2", "--backend", "nothing", status=2, python=plain_python).stderr
    assert "nothing served none of" in " ".join(said.split())


def test_a_release_that_is_not_simulated() -> None:
    tree = VERSIONS / "0.5.18"
    if not (tree / ".complete").exists():
        pytest.skip("not unpacked; run `make versions`")
    assert "0.5.18 is not simulated" in race("--sglang-path", str(tree), status=2).stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--backend", "hybird"], "did you mean 'hybrid'?"),
        (["--backend", "kernel", "--fences", "both"], "has no fence for forwards"),
        (["--mem-layout", "page_head"], "have no stand-in"),
        (["--mode", "pipelines"], "did you mean 'pipeline'?"),
        (["--gpu-arch", "hoppper"], "unknown GPU architecture"),
        (["--sglang-path", "nowhere"], "there is no folder nowhere"),
        (["--sglang-path", "tests"], "holds no sglang/"),
        (["--seed", "1", "--program", "dance"], "is not an action"),
    ],
)
def test_wrong_input_is_one_sentence(options: list[str], why: str, plain_python: Python) -> None:
    done = race(*options, status=2, python=plain_python)
    assert why in done.stderr
    assert done.stdout == ""
