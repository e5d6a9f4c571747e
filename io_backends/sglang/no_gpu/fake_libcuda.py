"""A stand-in for the CUDA driver library, so that SGLang starts on a machine without an NVIDIA driver.

`import sgl_kernel` links against `libcuda.so.1` and needs one symbol of it, `cuPointerGetAttribute`.
Nothing on SGLang's CPU engine calls it: the library only has to be there. This module compiles one that
answers "not initialised" and says how to put it on the loader's path, for child processes only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = """\
/* 3 is CUDA_ERROR_NOT_INITIALIZED: a caller that ignores it gets an error, never a made-up answer. */
int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) { return 3; }
"""


class NoCompilerError(RuntimeError):
    """The machine has neither an NVIDIA driver nor a C compiler that could build the stand-in."""


def loader_finds_libcuda() -> bool:
    """Whether the dynamic loader finds some `libcuda.so.1`, a real driver or an earlier stand-in.

    Asked in a child process, as it is child processes that need one: in this one a stand-in may be loaded
    already, which no child would find.
    """
    ask = [sys.executable, "-c", "import ctypes; ctypes.CDLL('libcuda.so.1')"]
    return subprocess.run(ask, capture_output=True, check=False).returncode == 0


def build(cache: Path) -> Path:
    """Compile the stand-in into `cache`, unless it is there already, and return `cache`.

    Raises:
        NoCompilerError: no `cc`, `gcc` or `clang` is on `PATH`, or the one found failed.
    """
    library = cache / "libcuda.so.1"
    if library.exists():
        return cache
    # `CC` may carry arguments ("ccache gcc"); only its first word names a program.
    wanted = os.environ.get("CC", "").split()
    compiler = [*wanted] if wanted and shutil.which(wanted[0]) else None
    compiler = compiler or next(([c] for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        raise NoCompilerError(
            "no NVIDIA driver and no C compiler: importing SGLang's kernel package takes a libcuda.so.1, "
            "and building a stand-in takes cc, gcc or clang (Debian, Ubuntu: apt-get install gcc libc6-dev)"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        source = Path(scratch, "libcuda.c")
        source.write_text(_SOURCE, encoding="utf-8")
        built = Path(scratch, "libcuda.so.1")
        command = [*compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(built), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NoCompilerError(
                f"{compiler[0]} could not build the stand-in for libcuda.so.1:\n{done.stderr.strip()[-800:]}"
            )
        # A rename, so that two processes building at once never see half a library.
        built.replace(library)
    return cache


def environment(cache: Path) -> dict[str, str]:
    """Variables a child process needs so that `import sgl_kernel` works; empty where a driver is installed.

    Raises:
        NoCompilerError: see `build`.
    """
    if loader_finds_libcuda():
        return {}
    folder = str(build(cache).resolve())
    inherited = os.environ.get("LD_LIBRARY_PATH", "")
    return {"LD_LIBRARY_PATH": f"{folder}:{inherited}" if inherited else folder}
