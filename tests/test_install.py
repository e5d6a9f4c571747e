"""Installing and leaving: what works on a machine of its own, and what remains."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_hicache.io_backends.sglang import versions

ROOT = Path(__file__).parents[1]
DEPENDENCIES = ("numpy", "packaging", "pydantic>=2", "rich", "ruamel.yaml>=0.18", "typer")


def texts() -> list[Path]:
    sources = [
        path for folder in ("bench", "policy", "io_backends") for path in (ROOT / folder).rglob("*.py")
    ]
    return [*sources, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.*"), ROOT / "Makefile"]


def test_nobody_is_told_to_install_a_name_that_no_index_has() -> None:
    """Anybody could take it there: only a checkout or a wheel of it is named."""
    asked = {
        f"{path.relative_to(ROOT)}: {found}"
        for path in texts()
        for found in re.findall(
            r"pip install (?:--?[\w-]+ )*['\"]?sglang[-_]hicache[-_]io.*", path.read_text()
        )
    }
    assert asked == set()


class Environment:
    """A virtual environment with what the package needs and no SGLang, and a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder / "venv", folder / "home"
        self.home.mkdir()
        subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
        self.run("python", "-m", "pip", "install", "--quiet", *DEPENDENCIES)

    def run(self, program: str, *words: str | Path, status: int = 0) -> str:
        """Standard output and error of a program of this environment."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XDG"))}
        done = subprocess.run(
            [self.folder / "bin" / program, *words],
            cwd=self.home,
            env={**clean, "HOME": str(self.home), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def files(self) -> dict[str, str]:
        """Hashes of all that is there, by path; Python's own caches of what was imported are left out."""
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.folder.rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }


@pytest.mark.sglang  # not that SGLang is needed: a minute, and a package index
def test_what_is_installed_works_and_leaves_nothing(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, ROOT],
        check=True,
    )
    (wheel,) = wheels.glob("*.whl")
    own = Environment(tmp_path)
    before = own.files()
    own.run("python", "-m", "pip", "install", "--quiet", "--no-index", wheel)
    added = own.files().keys() - before.keys()
    assert added
    assert {name for name in added if not re.search("hicache[_-]io|sglang_hicache/", name)} == set()
    assert own.run("hicache-io", "--version").strip()
    explained = own.run("hicache-io", "explain", "--attention-backend", "fa3", "--gpu-arch", "sm90", "--json")
    assert '"fa3-on-hopper' in explained
    own.run("hicache-io", "policy", "validate", ROOT / "docs" / "deploy" / "policy.yaml")
    assert versions.INSTALL in own.run("hicache-io", "demo", status=2)
    own.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "sglang-hicache-io")
    assert own.files() == before
    # pip removes the folders that held files; the namespace's held none.
    (left,) = (path for path in own.folder.rglob("*") if "hicache" in path.name)
    assert (left.name, left.is_dir(), list(left.iterdir())) == ("sglang_hicache", True, [])
    assert [path for path in own.home.rglob("*") if "hicache" in path.name] == []
