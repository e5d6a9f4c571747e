"""The wheel: what it holds, and what installing it beside SGLang would change."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.sglang


def pip(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *args], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    return next(folder.glob("*.whl"))


def test_it_holds_one_top_level_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"sglang_hicache", next(t for t in tops if t.endswith(".dist-info"))}
    # A namespace: third parties may add to it.
    assert "sglang_hicache/__init__.py" not in names


def test_it_holds_the_policy_the_types_and_the_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("io_backends", "policy", "bench"):
        assert f"sglang_hicache/{package}/py.typed" in names
    assert "sglang_hicache/policy/default.yaml" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "test" in name]


def test_its_entry_points(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "[sglang.srt.plugins]\nhicache_io = " in text
    assert "[console_scripts]\nhicache-io = " in text


def test_every_module_in_the_tree_is_packaged(wheel: Path) -> None:
    """But for the maintainers' scripts, which are run from a clone."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    tracked = [
        path.relative_to(ROOT)
        for package in ("io_backends", "policy", "bench")
        for path in (ROOT / package).rglob("*.py")
    ]
    assert {f"sglang_hicache/{path}" for path in tracked if path.parts[:2] != ("bench", "lab")} == names


def test_installing_it_beside_sglang_changes_nothing_that_is_installed(wheel: Path) -> None:
    report = json.loads(
        pip("install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--report", "-", str(wheel))
    )
    assert [entry["metadata"]["name"] for entry in report["install"]] == ["sglang-hicache-io"]
    report = json.loads(pip("install", "--dry-run", "--quiet", "--report", "-", str(wheel)))
    # Installed already, in the same version, it may be skipped altogether; ruamel.yaml depends on nothing.
    assert {entry["metadata"]["name"] for entry in report["install"]} <= {"sglang-hicache-io", "ruamel.yaml"}


def test_sglang_is_an_extra_not_a_dependency(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: sglang")]
    assert required
    assert all('extra == "sglang"' in line for line in required)
    assert not [line for line in metadata.splitlines() if line.startswith("Requires-Dist: torch")]
