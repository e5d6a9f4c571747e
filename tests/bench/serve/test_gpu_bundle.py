"""The bundle of a whole server: what goes in, its parts, and what is written where it is unpacked."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repository import ROOT

from sglang_hicache.bench.lab import gpu_bundle


def test_everything_that_is_pinned_is_packed_but_cuda_and_tools() -> None:
    text = (ROOT / "constraints.txt").read_text()
    packed = {pin.split("==")[0] for pin in gpu_bundle.pins(text)}
    assert {"torch", "sglang", "sglang-kernel", "triton", "transformers", "flashinfer-python"} <= packed
    assert {"nvidia-nccl-cu13", "nvidia-cutlass-dsl", "aiohttp", "prometheus_client", "ruamel.yaml"} <= packed
    # gpu_suite runs the tests there, and the bundle unpacks itself.
    assert {"pytest", "pytest-timeout", "hypothesis", "zstandard", "numpy", "matplotlib-inline"} <= packed
    # SGLang's own benchmark imports these.
    assert {"pandas", "pyarrow", "datasets"} <= packed
    assert not {"nvidia-cublas", "nvidia-cudnn-cu13", "mypy", "ruff", "scipy", "matplotlib"} & packed
    assert all(pin.count("==") == 1 for pin in gpu_bundle.pins(text))


@given(st.lists(st.binary(max_size=50)), st.integers(1, 40))
def test_parts_joined_are_what_was_split(chunks: list[bytes], size: int) -> None:
    parts = list(gpu_bundle.split(chunks, size))
    assert b"".join(parts) == b"".join(chunks)
    assert all(len(part) == size for part in parts[:-1])
    assert all(0 < len(part) <= size for part in parts[-1:])


def test_a_part_travels_beside_the_checkout() -> None:
    tree = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, check=True).stdout
    files = [ROOT / name for name in tree.decode().split("\0") if name]
    checkout = sum(path.stat().st_size for path in files if path.is_file())
    assert gpu_bundle.PART_BYTES + checkout < 63.5 * 2**20


def bundle(folder: Path) -> Path:
    """A bundle of one small package, in parts of 200 bytes, made with the tool's own steps."""
    zstandard = pytest.importorskip("zstandard")
    site, parts = folder / "packed", folder / "parts"
    (site / "small").mkdir(parents=True)
    (site / "small" / "__init__.py").write_text("ANSWER = 42\n" + "# " + os.urandom(600).hex() + "\n")
    script = site / "small" / "tool"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    parts.mkdir()
    # The decompressor, as a wheel holds it.
    package = Path(zstandard.__file__).parent
    with zipfile.ZipFile(parts / "zstandard.whl", "w") as wheel:
        for path in package.rglob("*"):
            if path.suffix in (".py", ".so"):
                wheel.write(path, Path("zstandard") / path.relative_to(package))
    digests = {}
    for number, part in enumerate(
        gpu_bundle.split(gpu_bundle.compressed(site, parts / "zstandard.whl"), 200)
    ):
        (parts / f"p{number:02}").write_bytes(part)
        digests[f"p{number:02}"] = hashlib.sha256(part).hexdigest()
    assert len(digests) > 2
    (parts / "manifest.json").write_text(json.dumps({"parts": digests}))
    return parts


def test_a_bundle_is_unpacked_and_finds_this_checkout(tmp_path: Path) -> None:
    parts, site = bundle(tmp_path), tmp_path / "site with a space"
    gpu_bundle.unpack(parts, site, link_machine=False)
    assert (site / "small" / "tool").stat().st_mode & 0o111
    code = (
        "import small, sglang_hicache.policy, sglang_hicache.bench, importlib.metadata as m\n"
        "print(small.ANSWER, sglang_hicache.bench.__path__[0])\n"
        "print([e.value for e in m.entry_points(group='sglang.srt.plugins') if e.name == 'hicache_io'][0])\n"
    )
    # -S: nothing of this environment's own installation is seen.
    shell = f"source '{site}/env.sh' && exec '{sys.executable}' -S -c \"{code}\""
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True, cwd=tmp_path)
    first, second = done.stdout.splitlines()
    assert first.split(maxsplit=1) == ["42", str(site / "project" / "sglang_hicache" / "bench")]
    assert Path(first.split(maxsplit=1)[1]).resolve() == ROOT / "bench"
    assert second == "sglang_hicache.io_backends.sglang.plugin:load"


def test_the_linked_project_has_what_an_installation_has(tmp_path: Path) -> None:
    gpu_bundle.link_project(tmp_path, ROOT)
    (found,) = distributions(path=[str(tmp_path / "project")])
    assert isinstance(found, Distribution)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (found.metadata["Name"], found.version) == (project["name"], project["version"])
    assert {(e.group, e.name) for e in found.entry_points} == {
        ("console_scripts", "hicache-io"),
        ("sglang.srt.plugins", "hicache_io"),
    }
    assert os.access(tmp_path / "bin" / "hicache-io", os.X_OK)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_part_that_is_missing_or_changed_is_named(tmp_path: Path, damage: str) -> None:
    parts = bundle(tmp_path)
    if damage == "missing":
        (parts / "p01").unlink()
    else:
        (parts / "p01").write_bytes(b"x" + (parts / "p01").read_bytes()[1:])
    with pytest.raises(gpu_bundle.BundleError, match=r"of \d+ parts: p01$"):
        gpu_bundle.unpack(parts, tmp_path / "site", link_machine=False)
    assert not (tmp_path / "site").exists()


def test_what_the_bundle_brings_is_not_replaced_by_the_machines(tmp_path: Path) -> None:
    site, machine, cuda = tmp_path / "site", tmp_path / "machine", tmp_path / "cuda"
    (site / "nvidia" / "nccl").mkdir(parents=True)
    for name in ("nccl", "cudnn", "cu13/lib"):
        (machine / "nvidia" / name).mkdir(parents=True)
    (machine / "nvidia" / "cu13" / "lib" / "libcupti.so.13").touch()
    gpu_bundle.link_machines_libraries(site, machine, cuda)
    assert not (site / "nvidia" / "nccl").is_symlink()
    assert (site / "nvidia" / "cudnn").resolve() == machine / "nvidia" / "cudnn"
    backend = site / "triton" / "backends" / "nvidia"
    assert os.readlink(backend / "bin" / "ptxas-blackwell") == str(cuda / "bin" / "ptxas")
    assert (backend / "lib" / "cupti" / "libcupti.so.13").exists()


def test_another_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bundle, "PYTHON", (3, 9))
    with pytest.raises(gpu_bundle.BundleError, match=r"run this with Python 3\.9, not 3\."):
        gpu_bundle.build(ROOT / "constraints.txt", tmp_path / "work", tmp_path / "out")
