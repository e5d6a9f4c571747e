"""A GPU that does nothing, for measurements of what the host does.

Real: cuda-python, ctypes, Triton's compiler and all that it does in Python for a launch. Idle: libcuda (C,
compiled into a folder and loaded under the driver's name before anything asks for it), torch's streams,
events and pinned memory, and Triton's launcher. For a process of its own: :func:`install` is not undone.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

_SOURCE = r"""
#include <string.h>
static int succeed(void) { return 0; }
static int version(int *v) { *v = 13000; return 0; }
static int attribute(unsigned *value) { *value = 1; return 0; } /* pinned, and reached as it is */
/* Indices must arrive: the plan is made of them. They have a stream of their own. Rows are only addresses. */
static int copy(void *to, void *from, size_t size, void *stream) {
    if (stream == (void *)3) memcpy(to, from, size);
    return 0;
}
static int capturing(void *stream, int *status) { *status = 0; return 0; }
static int stream(long *handle, unsigned flags, int priority) { *handle = priority ? 3 : 2; return 0; }
int cuGetProcAddress_v2(const char *name, void **function, int v, unsigned long long f, int *status) {
    *function = !strcmp(name, "cuDriverGetVersion") ? (void *)version
        : !strcmp(name, "cuPointerGetAttribute") || !strcmp(name, "cuDeviceGetAttribute") ? (void *)attribute
        : !strcmp(name, "cuStreamIsCapturing") ? (void *)capturing
        : !strcmp(name, "cuStreamCreateWithPriority") ? (void *)stream
        : !strcmp(name, "cuMemcpyAsync") ? (void *)copy
        : !strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress_v2 : (void *)succeed;
    if (status) *status = 0;
    return 0;
}
int cuGetProcAddress(const char *name, void **function, int v, unsigned long long f) {
    return cuGetProcAddress_v2(name, function, v, f, 0);
}
"""


class _Stream:
    """Handle 3 for ``IndexReader``'s, the one whose copies must arrive, else 2."""

    def __init__(self, handle: int = 2) -> None:
        self.cuda_stream = handle

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5

    def query(self) -> bool:
        return True

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Event:
    """Complete once the clock of the idle GPU has moved on."""

    clock = 0

    def record(self, stream: Any) -> None:
        self.at = _Event.clock

    def query(self) -> bool:
        return self.at < _Event.clock

    def synchronize(self) -> None:
        pass


class _Torch(ModuleType):
    """torch, except that ``cuda`` is idle and pinned memory is ordinary."""

    def __init__(self, torch: Any) -> None:
        super().__init__("torch")
        here = _Stream()
        self._torch = torch
        self.version = SimpleNamespace(cuda="13.0")
        self.cuda = SimpleNamespace(
            Stream=_Stream,
            ExternalStream=_Stream,
            Event=_Event,
            is_available=lambda: True,
            current_device=lambda: 0,
            get_device_properties=lambda _: SimpleNamespace(multi_processor_count=132),
            current_stream=lambda: here,
            stream=nullcontext,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def empty(self, *size: Any, pin_memory: bool = False, device: Any = None, **more: Any) -> Any:
        return self._torch.empty(*size, **more)


class _TritonDriver:
    """As much of a driver as Triton needs to compile for sm_90 and launch nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 2, 64, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
        )

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Any:
        def launch(*_: Any) -> None:
            pass

        return launch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return _Stream().cuda_stream


def install(folder: Path) -> None:
    """Make this process's libcuda, torch.cuda and Triton driver idle ones. Before any of them is loaded.

    Raises:
        RuntimeError: there is no C compiler, or it fails.
    """
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        raise RuntimeError("the stand-in driver needs a C compiler (Debian, Ubuntu: apt-get install gcc)")
    source, library = folder / "idle.c", folder / "libcuda.so.1"
    source.write_text(_SOURCE, encoding="utf-8")
    flags = ["-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library)]
    subprocess.run([compiler, *flags, str(source)], check=True)
    # The loader takes a library that is loaded already for every later request of the same soname.
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import torch

    sys.modules["torch"] = _Torch(torch)
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
    from triton.runtime import driver

    driver.set_active(_TritonDriver())


def make_device() -> Any:
    """A CudaDevice whose GPU is idle, to measure on; ``synchronize()`` completes all events."""
    import torch

    from ...io_backends.device.copy_interleaving import QUANTUM_BYTES
    from ...io_backends.device.cuda import CudaDevice

    class Device(CudaDevice):
        def prepare_gather(self, geometry: Any) -> None:
            self._gather.prepare(geometry, "cpu")

        def allocate_staging(self, nbytes: int) -> Any:
            return SimpleNamespace(address=1 << 30, nbytes=nbytes)

        def host_values(self, indices: Any, after: Any = None) -> Any:
            # A tensor on a GPU would go this way.
            assert self._indices is not None
            return self._indices.read(indices, after)

        where = "cpu"

        def synchronize(self) -> None:
            _Event.clock += 1

        def flush(self) -> None:
            """There is no cache."""

        def forward_stream(self) -> Any:
            return _Stream()

        def indices(self, slots: Any) -> Any:
            return torch.from_numpy(slots)

    return Device(quantum_bytes=QUANTUM_BYTES)  # there is no link to measure
