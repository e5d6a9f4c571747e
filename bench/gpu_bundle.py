"""Packs what SGLang's host pools and copy kernels need on a GPU machine that has torch 2.11 but no SGLang.

    python -m sglang_hicache.bench.gpu_bundle          # where the pinned SGLang is installed
    python3 bench/gpu_bundle.py --unpack DIR           # on the GPU machine; needs no packages

The first form writes ``.gpu/site.tar.gz``: the installed SGLang's Python files and kernel sources, its small
dependencies as wheels for Python 3.12 on x86-64, stubs for packages of which only names are imported, and,
of sglang-kernel, the one library with its AOT copy kernels. The second form unpacks it; DIR then goes on
``PYTHONPATH``.

The AOT library is that of sglang-kernel 0.4.5, the last one built for torch 2.11 (CUDA 13). SGLang 0.5.23
pins 0.4.10, built for torch 2.14. Its JIT kernels come from SGLang itself and are compiled on the GPU
machine. :data:`MANIFEST` in the bundle says all this for the results.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

SGLANG = "0.5.23"
AOT = "0.4.5"
TORCH = "2.11"
MANIFEST = "gpu_bundle.json"
BUNDLE = Path(".gpu/site.tar.gz")

_WHEELS = (
    # What importing SGLang's memory pools takes and a machine with torch and transformers lacks.
    "msgspec",
    "orjson",
    "pybase64",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "pyzmq",
    "apache-tvm-ffi",
    "starlette",
    "dill",
    "gguf",
    "compressed-tensors",
    "loguru",
    "zstandard",
    # This project's policy files.
    "ruamel.yaml",
)
"""In the versions installed here."""

_PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (39, 36, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)),
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
)

_LEFT_OUT = ("multimodal_gen", "test", "rust_extensions", "__pycache__", "benchmark")

_STUBS = ("IPython", "soundfile", "torch_memory_saver")
"""Packages of which SGLang's modules import names that no copy of KV rows uses."""

_STUB = '''\
"""Stands in for a package that is not in the GPU bundle: its names import, using one of them raises."""

import gpu_bundle_stub

gpu_bundle_stub.stub(__name__)
'''

_STUB_MODULE = '''\
"""Modules whose names can be imported but not used."""

import importlib.abc
import importlib.machinery
import sys


class NotInBundleError(RuntimeError):
    """Something of a package that the GPU bundle replaces by a stub was used."""


class _Meta(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(f"{cls.__qualname__}.{name}")


def _missing(what):
    def fail(*args, **kwargs):
        raise NotInBundleError(f"{what} is not in the GPU bundle (see bench/gpu_bundle.py)")

    # A class, because some are subclassed or named in annotations.
    return _Meta(what.rpartition(".")[2], (), {"__init__": fail, "__qualname__": what})


def stub(package):
    """Let any name and any submodule of ``package`` be imported."""
    _add(sys.modules[package], package)
    _Finder.packages.add(package)


def _add(module, name):
    def __getattr__(attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _missing(f"{name}.{attribute}")

    module.__getattr__ = __getattr__


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    packages = set()

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        _add(module, module.__name__)


# Last, so that modules that do exist are found first.
sys.meta_path.append(_Finder())
'''

_SGL_KERNEL = '''\
"""sglang-kernel {aot} cut down to its common operators for sm90, the copy kernels of HiCache among them.

Everything else raises when it is called.
"""

import ctypes
import glob
import os

import gpu_bundle_stub
import torch

__version__ = "{aot}"


def _preload():
    # torch loads NVRTC only when it needs it; the library below is linked against it.
    for name in ("libnvrtc.so.13", "libcublasLt.so.13", "libcublas.so.13"):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            roots = {{os.path.dirname(os.path.dirname(torch.__file__))}}
            found = [p for r in roots for p in glob.glob(os.path.join(r, "nvidia", "*", "lib", name))]
            for path in found[:1]:
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


_preload()
torch.ops.load_library(os.path.join(os.path.dirname(__file__), "sm90", "common_ops.abi3.so"))
gpu_bundle_stub.stub(__name__)
'''


def sglang_files(root: Path) -> Iterator[Path]:
    """Paths below ``root``, the installed package: its Python files, and its JIT kernels' sources."""
    kernels = root / "kernels" / "jit"
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if not path.is_file() or any(part in _LEFT_OUT for part in parts):
            continue
        source = kernels in path.parents and parts[2] in ("csrc", "include")
        # The sources of kernels that have nothing to do with HiCache are half of all.
        if source and parts[2] == "csrc" and parts[3] not in ("kvcacheio", "occupancy"):
            continue
        if path.suffix == ".py" or source:
            yield path


def download(names: list[str], into: Path) -> None:
    """Wheels for the GPU machine's Python, without their requirements."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp"]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, "-d", str(into), *names], check=True)


def _file_pattern(pin: str) -> str:
    name, version = pin.split("==")
    return f"{name.replace('-', '_').replace('.', '?')}-{version}-*.whl"


def build(work: Path, bundle: Path) -> None:
    """Write ``bundle``; downloads stay in ``work``."""
    installed = importlib.metadata.version("sglang")
    if installed != SGLANG:
        raise SystemExit(f"sglang {installed} is installed here; the bundle is made of {SGLANG}")
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(next(iter(spec.submodule_search_locations)))
    wheels, aot = work / "wheels", work / "aot"
    wheels.mkdir(parents=True, exist_ok=True)
    aot.mkdir(parents=True, exist_ok=True)
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in _WHEELS]
    missing = [pin for pin in pins if not list(wheels.glob(_file_pattern(pin)))]
    if missing:
        download(missing, wheels)
    if not list(aot.glob(f"sglang_kernel-{AOT}-*.whl")):
        download([f"sglang-kernel=={AOT}"], aot)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        site = Path(scratch)
        for path in sglang_files(root):
            target = site / "sglang" / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        info = site / f"sglang-{SGLANG}.dist-info"
        info.mkdir()
        shutil.copy(root.parent / info.name / "METADATA", info)
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        _sgl_kernel(site / "sgl_kernel", next(aot.glob(f"sglang_kernel-{AOT}-*.whl")))
        (site / "gpu_bundle_stub.py").write_text(_STUB_MODULE, encoding="utf-8")
        for name in _STUBS:
            (site / name).mkdir()
            (site / name / "__init__.py").write_text(_STUB, encoding="utf-8")
        manifest = {
            "sglang": SGLANG,
            "sglang_kernel_aot": f"{AOT} (SGLang {SGLANG} pins another, built for another torch)",
            "for_torch": TORCH,
            "wheels": sorted(pins),
            "stubs": sorted((*_STUBS, "sgl_kernel (all but common_ops of sm90)")),
        }
        (site / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        bundle.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(bundle, "w:gz", compresslevel=9) as archive:
            archive.add(site, arcname=".")
    print(f"{bundle}: {bundle.stat().st_size / 2**20:.1f} MiB")


def _sgl_kernel(package: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in ("kvcacheio.py", "sm90/common_ops.abi3.so"):
            target = package / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(f"sgl_kernel/{name}"))
    (package / "__init__.py").write_text(_SGL_KERNEL.format(aot=AOT), encoding="utf-8")


def unpack(bundle: Path, site: Path) -> None:
    """Unpack ``bundle`` into ``site``."""
    site.mkdir(parents=True, exist_ok=True)
    with tarfile.open(bundle) as archive:
        archive.extractall(site, filter="data")


def main() -> None:
    """Build the bundle, or unpack it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--work", type=Path, default=Path("build/gpu_bundle"), help="where downloads stay")
    parser.add_argument("--unpack", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.unpack is None:
        build(args.work, args.bundle)
    else:
        unpack(args.bundle, args.unpack)


if __name__ == "__main__":
    main()
