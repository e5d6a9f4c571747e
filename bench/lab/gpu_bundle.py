"""Packs a whole SGLang server for a machine that has a GPU, CUDA and Python, but no SGLang and no network.

    python3.12 bench/lab/gpu_bundle.py                               # here; writes .gpu/parts, about 1.3 GB
    python3 bench/lab/gpu_bundle.py --unpack .gpu/parts --site DIR   # on the GPU machine
    source DIR/env.sh

Both forms need nothing but Python: the one that packs must be the GPU machine's version (wheels are built
for one), the one that unpacks brings its own decompressor. What is packed is ``constraints.txt`` without the
libraries that the machine's own torch brought (:data:`LEFT_OUT`). Each part travels by itself and is checked.
This project is not in the bundle: ``--unpack`` links the checkout, so that it may change afterwards.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PYTHON = (3, 12)
"""Of the machines that the bundle is for."""

PART_BYTES = 46 * 2**20
"""What travels at once is 64 MiB, with the checkout."""

MANIFEST = "manifest.json"
CHECKOUT = Path(__file__).resolve().parents[2]

LEFT_OUT = re.compile(
    # CUDA's libraries: the machine's torch has them, of the same CUDA.
    r"nvidia-(?!nccl-cu13|cutlass-dsl|ml-py)|cuda-toolkit|nvshmem|nccl(?!-cu13)|"
    # No server here imports them, or the machine has them.
    r"tilelang|z3-solver|torchcodec|Cython|lxml|scipy|numba|llvmlite|matplotlib==|contourpy|fonttools|"
    r"kiwisolver|jedi|"
    # Tools of development.
    r"mypy|ruff|ast_serialize|librt"
)
"""Names of pins that are not packed, as they begin."""

PRUNED = (
    *("torch/test", "torch/include", "torch/share", "torch/bin/protoc*"),
    *("triton/backends/nvidia/bin", "triton/backends/nvidia/lib/cupti*", "triton/_C/libproton.so"),
    "triton/instrumentation",
    # Kernels of another GPU architecture, and of an attention that no model here has.
    *("sgl_kernel/sm100", "sgl_kernel/infllm_ops*"),
    # Scripts that name the interpreter they were installed with.
    "bin",
)
"""Of what those install, not packed either."""

_LEVEL, _WINDOW_LOG = 10, 28
_CHUNK = 2**22


class BundleError(Exception):
    """A bundle that cannot be made, or is not whole."""


def pins(constraints: str) -> list[str]:
    """The pins of a constraints file that are packed, as ``name==version``."""
    lines = (line.strip() for line in constraints.splitlines())
    return [line for line in lines if line and line[0] != "#" and not LEFT_OUT.match(line)]


def split(stream: Iterable[bytes], part_bytes: int = PART_BYTES) -> Iterator[bytes]:
    """The bytes of ``stream`` in pieces of ``part_bytes``; the last one may be shorter, none is empty."""
    held = bytearray()
    for chunk in stream:
        held += chunk
        while len(held) >= part_bytes:
            yield bytes(held[:part_bytes])
            del held[:part_bytes]
    if held:
        yield bytes(held)


def missing_or_damaged(parts: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Names of parts that are not there, or are not what was packed."""
    return [name for name, digest in manifest["parts"].items() if _digest(parts / name) != digest]


def distribution(pyproject: Mapping[str, Any]) -> dict[str, str]:
    """The files of this project's ``dist-info`` by name, as far as anything reads them."""
    project = pyproject["project"]
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    entry_points = "".join(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in names.items())
        for group, names in groups.items()
    )
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    return {"METADATA": metadata, "entry_points.txt": entry_points}


def environment(site: Path) -> str:
    """A shell file to source: finds what was unpacked into ``site``, before what the machine has."""
    paths = (site / "project", site, site / "nvidia_cutlass_dsl" / "dsl_packages")
    values = {
        "PYTHONPATH": ":".join(map(str, paths)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "CUDA_HOME": "/usr/local/cuda",
        "TRITON_PTXAS_PATH": "/usr/local/cuda/bin/ptxas",
        # The machine's cuDNN is older than SGLang asks for; nothing but convolutions uses it.
        "SGLANG_DISABLE_CUDNN_CHECK": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
    return "\n".join([*lines, f"export PATH={shlex.quote(str(site / 'bin'))}:/usr/local/cuda/bin:$PATH", ""])


def build(constraints: Path, work: Path, out: Path) -> dict[str, Any]:
    """Write the parts into ``out``, downloading into ``work``, and return their manifest.

    Raises:
        BundleError: this Python is not the GPU machine's version.
        subprocess.CalledProcessError: pip could not install something.
    """
    if sys.version_info[:2] != PYTHON:
        raise BundleError(f"run this with Python {_dotted(PYTHON)}, not {_dotted(sys.version_info[:2])}")
    wanted = pins(constraints.read_text(encoding="utf-8"))
    site, wheels = work / "site", work / "wheels"
    shutil.rmtree(site, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    _say(f"installing {len(wanted)} packages into {site}")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--no-compile", "--target", str(site)]
    subprocess.run([*pip, "install", *options, *wanted], check=True)
    for pattern in PRUNED:
        for path in site.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    decompressor = next(pin for pin in wanted if pin.startswith("zstandard=="))
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "-d", str(wheels)]
    subprocess.run([*pip, "download", *options, decompressor], check=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(next(wheels.glob("zstandard-*.whl")), out / "zstandard.whl")
    _say("compressing")
    digests = {}
    for number, part in enumerate(split(compressed(site, out / "zstandard.whl"))):
        path = out / f"p{number:02}"
        path.write_bytes(part)
        digests[path.name] = hashlib.sha256(part).hexdigest()
        _say(f"{path}: {len(part) / 2**20:.1f} MiB")
    manifest = {"python": _dotted(PYTHON), "packages": wanted, "parts": digests}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def unpack(parts: Path, site: Path, *, checkout: Path = CHECKOUT, link_machine: bool = True) -> None:
    """Unpack ``parts`` into ``site`` and write ``site/env.sh``.

    Args:
        parts: folder with every part, the manifest and the decompressor.
        site: a folder that is not there yet, or is replaced.
        checkout: this project; linked, not copied.
        link_machine: whether to link the CUDA libraries of the Python that runs this.

    Raises:
        BundleError: a part is missing or damaged.
        subprocess.CalledProcessError: tar failed.
    """
    manifest = json.loads((parts / MANIFEST).read_text(encoding="utf-8"))
    if bad := missing_or_damaged(parts, manifest):
        raise BundleError(f"missing or damaged of {len(manifest['parts'])} parts: {', '.join(bad)}")
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    with _zstandard(parts / "zstandard.whl") as zstd:
        tar = subprocess.Popen(["tar", "-x", "-C", str(site)], stdin=subprocess.PIPE)
        assert tar.stdin is not None
        source = zstd.decompressobj()
        for name in manifest["parts"]:
            with (parts / name).open("rb") as file:
                while chunk := file.read(_CHUNK):
                    tar.stdin.write(source.decompress(chunk))
        tar.stdin.close()
        if tar.wait():
            raise subprocess.CalledProcessError(tar.returncode, "tar")
    if link_machine:
        link_machines_libraries(site, Path(sysconfig.get_paths()["purelib"]))
    link_project(site, checkout)
    (site / "env.sh").write_text(environment(site), encoding="utf-8")


def link_machines_libraries(site: Path, installed: Path, cuda: Path = Path("/usr/local/cuda")) -> None:
    """Link what was left out of ``site``: CUDA's libraries and tools, from the machine."""
    # torch looks for CUDA's libraries beside itself. What the bundle brings stays: an older NCCL lacks
    # symbols that its torch needs.
    for folder in (installed / "nvidia").glob("*"):
        target = site / "nvidia" / folder.name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(folder)
    backend = site / "triton" / "backends" / "nvidia"
    for folder in (backend / "bin", backend / "lib" / "cupti"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, tool in {
        **{name: name for name in ("ptxas", "cuobjdump", "nvdisasm")},
        "ptxas-blackwell": "ptxas",
    }.items():
        (backend / "bin" / name).symlink_to(cuda / "bin" / tool)
    for library in (installed / "nvidia" / "cu13" / "lib").glob("libcupti*"):
        (backend / "lib" / "cupti" / library.name).symlink_to(library)


def link_project(site: Path, checkout: Path) -> None:
    """Make the checkout importable below ``site/project``, with its entry points and its command."""
    pyproject = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    root = site / "project"
    for name, folder in pyproject["tool"]["setuptools"]["package-dir"].items():
        link = root.joinpath(*name.split("."))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(checkout / folder)
    project = pyproject["project"]
    info = root / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    for name, text in distribution(pyproject).items():
        (info / name).write_text(text, encoding="utf-8")
    for name, target in project["scripts"].items():
        module, _, function = target.partition(":")
        script = site / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(
            f"#!/usr/bin/env python3\nfrom {module} import {function}\n\n{function}()\n", encoding="utf-8"
        )
        script.chmod(0o755)


def compressed(site: Path, wheel: Path) -> Iterator[bytes]:
    """Everything in ``site`` as a compressed archive, by the decompressor in ``wheel``."""
    with _zstandard(wheel, compress=True) as compressor:
        # Sorted, so that files alike are near each other.
        names = sorted(path.name for path in site.iterdir())
        tar = subprocess.Popen(["tar", "-C", str(site), "--sort=name", "-c", *names], stdout=subprocess.PIPE)
        assert tar.stdout is not None
        while chunk := tar.stdout.read(_CHUNK):
            yield compressor.compress(chunk)
        yield compressor.flush()
        if tar.wait():
            raise subprocess.CalledProcessError(tar.returncode, "tar")


class _zstandard:
    """The bundle's own copy of the library, imported from its wheel."""

    def __init__(self, wheel: Path, *, compress: bool = False) -> None:
        self._wheel, self._compress = wheel, compress
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Any:
        self._folder = tempfile.TemporaryDirectory()
        with zipfile.ZipFile(self._wheel) as archive:
            archive.extractall(self._folder.name)
        sys.path.insert(0, self._folder.name)
        import zstandard

        if not self._compress:
            return zstandard.ZstdDecompressor(max_window_size=2**_WINDOW_LOG)
        parameters = zstandard.ZstdCompressionParameters.from_level(
            _LEVEL, window_log=_WINDOW_LOG, enable_ldm=True, threads=2
        )
        return zstandard.ZstdCompressor(compression_params=parameters).compressobj()

    def __exit__(self, *_: object) -> None:
        assert self._folder is not None
        sys.path.remove(self._folder.name)
        self._folder.cleanup()


def _digest(path: Path) -> str | None:
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Pack, or unpack."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=CHECKOUT / ".gpu/parts", help="where the parts go")
    parser.add_argument("--work", type=Path, default=CHECKOUT / "build/gpu_bundle", help="for downloads")
    parser.add_argument("--unpack", type=Path, metavar="PARTS", help="unpack these instead, into --site")
    parser.add_argument("--site", type=Path, metavar="DIR", help="where to unpack")
    args = parser.parse_args()
    if (args.unpack is None) != (args.site is None):
        parser.error("--unpack PARTS and --site DIR go together")
    try:
        if args.unpack is None:
            manifest = build(CHECKOUT / "constraints.txt", args.work, args.out)
            _say(f"{len(manifest['parts'])} parts of {len(manifest['packages'])} packages in {args.out}")
        else:
            unpack(args.unpack, args.site.resolve())
            # Servers that start together would each compile what they import, on the same cores.
            compileall.compile_dir(args.site, quiet=2, workers=0)
            _say(f"unpacked into {args.site}; source {args.site}/env.sh")
    except BundleError as error:
        sys.exit(f"gpu_bundle: {error}")


if __name__ == "__main__":
    main()
