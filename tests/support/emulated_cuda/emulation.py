"""Puts the virtual CUDA under the product's ``CudaDevice``, and under SGLang's L2 transfers, in this process.

The product's code is not changed. What it reaches through stays where it was and is replaced behind it:

- the driver: the stand-in ``libcuda.so.1`` (fake_cuda.c), which hands each accepted batch back to the virtual
  stream whose handle it was called with, and copies when that stream gets there;
- ``torch``, as ``device/cuda.py`` and ``device/gather.py`` import it: ``torch.cuda`` is the virtual one, and
  memory that is asked for on the GPU or pinned is ordinary memory;
- the gather's kernel: Triton's interpreter, when the virtual stream gets there. ``TRITON_INTERPRET=1`` must
  be set before Triton is imported, and the stand-in driver be the ``libcuda.so.1`` that the loader finds.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from sglang_hicache.io_backends.virtual import gpu as virtual_cuda
from sglang_hicache.io_backends.virtual.device import STALE
from sglang_hicache.io_backends.virtual.operations import Operation

_INVALID_HANDLE = 400


class DeviceTensor(torch.Tensor):
    """Ordinary memory that says it is on the GPU."""

    is_cuda = True  # type: ignore[assignment]


class VirtualTorch:
    """``torch``, except for what needs a GPU."""

    cuda = virtual_cuda

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *size: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        memory = torch.empty(*size, **options)
        memory.view(-1).view(torch.uint8).fill_(STALE)
        if pin_memory:
            self._driver.register(memory.data_ptr(), memory.numel() * memory.element_size())
            return memory
        return memory.as_subclass(DeviceTensor)

    @staticmethod
    def tensor(values: Any, device: Any = None, **options: Any) -> torch.Tensor:
        """From pageable memory: torch returns when the copy is done."""
        return torch.tensor(values, **options).as_subclass(DeviceTensor)


class Kernel:
    """A Triton kernel whose launches go on a virtual stream and run in Triton's interpreter there."""

    def __init__(self, interpreted: Any) -> None:
        self._interpreted = interpreted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._interpreted, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def launch(*arguments: Any, num_warps: int, **named: Any) -> Compiled:
            compiled = Compiled(self._interpreted, arguments, named)
            compiled[grid](*arguments, **named)
            return compiled

        return launch


class Compiled:
    """What a launch returns: the code for these constants and types, whatever a later launch passes."""

    def __init__(self, interpreted: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._interpreted = interpreted
        self._signature = inspect.signature(interpreted.fn)
        passed = self._signature.bind(*arguments, **named).arguments
        constants = {name for name in passed if self._signature.parameters[name].annotation == "tl.constexpr"}
        assert constants, "the kernel's annotations are not read as they were"
        self._constants = {name: passed[name] for name in constants}
        self._types = {name: _type(value) for name, value in passed.items()}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, stream: int | None = None, **named: Any) -> None:
            passed = self._signature.bind(*arguments, **named).arguments
            assert {name: _type(value) for name, value in passed.items()} == self._types
            gpu = virtual_cuda.gpu
            gpu.counts["gathers"] += 1
            on = virtual_cuda.current_stream() if stream is None else gpu.streams[stream]
            run = self._interpreted[grid]
            on.launch(Operation("gather", (lambda: run(**{**passed, **self._constants}),)))

        return launch


def _type(value: Any) -> Any:
    return getattr(value, "dtype", type(value))


class Driver:
    """The stand-in driver: its copies run on the virtual streams."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.fake_register.argtypes = (ctypes.c_uint64,) * 3
        self._library.fake_run.argtypes = (ctypes.c_void_p,)
        self._library.fake_set.argtypes = (ctypes.c_char_p, ctypes.c_longlong)
        # ctypes frees a callback that nobody holds.
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p)(self._put_off)
        self._library.fake_defer(self._callback)

    def _put_off(self, handle: int, copies: int) -> int:
        stream = virtual_cuda.gpu.streams.get(handle)
        if stream is None:
            return _INVALID_HANDLE
        virtual_cuda.gpu.counts["copies"] += 1
        run = self._library.fake_run
        stream.launch(Operation("copies", (lambda: run(copies),), engine="copy_d2h"))
        return 0

    def reset(self) -> None:
        """No host memory is registered, and settings are the first ones."""
        self._library.fake_reset()

    def set(self, key: str, value: int) -> None:
        assert self._library.fake_set(key.encode(), value) == 0, key

    def register(self, start: int, nbytes: int, flags: int = 0) -> int:
        """``cudaHostRegister``."""
        self._library.fake_register(start, nbytes, 0)
        return 0


def _record_stream(tensor: torch.Tensor, stream: Any) -> None:
    virtual_cuda.gpu.counts[f"recorded on {stream.name}"] += 1


def install() -> Driver:
    """Do all of it. Once a process."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "too late: Triton chose when it was imported"
    from sglang_hicache.io_backends.device import cuda, gather, gather_kernel

    driver = Driver()

    def import_module(name: str) -> Any:
        return VirtualTorch(driver) if name == "torch" else importlib.import_module(name)

    for module in (cuda, gather):
        module.importlib = SimpleNamespace(import_module=import_module)  # type: ignore[attr-defined]
    gather_kernel.gather_rows = Kernel(gather_kernel.gather_rows)  # type: ignore[assignment]
    torch.Tensor.record_stream = _record_stream  # type: ignore[method-assign, assignment]
    return driver


def install_in_sglang(driver: Driver) -> None:
    """SGLang's L2 transfer engine on virtual streams, its host pools registered with the stand-in driver."""
    from sglang.srt.mem_cache import l2_transfer
    from sglang.srt.mem_cache.pool_host import common

    from sglang_hicache.io_backends.sglang.no_gpu import cpu_engine

    cpu_engine.install()
    # SGLang's own allocation, which registers what it allocated.
    common.ALLOC_MEMORY_FUNCS["cpu"] = common.alloc_with_host_register
    torch.cuda.cudart = lambda: SimpleNamespace(  # type: ignore[assignment]
        cudaHostRegister=driver.register, cudaHostUnregister=lambda start: 0
    )
    l2_transfer.device_module = virtual_cuda
