"""Copies through the CUDA driver: one cuMemcpyBatchAsync call for thousands of them.

torch has no binding for it. The entry point comes from cuGetProcAddress at an explicit version, so that its
signature does not depend on the driver's age, and is called through ctypes with the addresses of numpy
arrays: turned into lists, each copy would cost 0.3 to 0.6 us of the scheduler's thread (seen, cuda-python
13 against a stand-in driver).
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np

from ...policy.log import logger_of
from ..plan.copies import CopyBatch
from .base import DeviceUnavailableError
from .host_memory import drop_empty

logger = logger_of(__name__)

MAX_COPIES_PER_CALL = 256
"""Copies a call. The engine starts on them when the call returns, at 0.4 to 1 us a copy, so that a large
call keeps it waiting; from a few hundred copies on the call itself is noise. (On an H200, 8,192 copies of
72 KiB went fastest in calls of 256.) A segmentation fault at 51,828 was reported (vLLM #49276)."""

FIRST_CALL_COPIES = 32
"""Copies of a batch's first call, and twice as many in each one after it up to the cap. At 0.4 us a copy
(H100, bench/results/2026-11-25-h100/profile.json) an idle engine starts 0.1 ms earlier for it."""

BATCH_VERSION = 12_080
"""CUDA 12.8 brought cuMemcpyBatchAsync. Asked for at this version, CUDA 12.8 to 13 give the form with
``failIdx``; CUDA 13's own form has none."""


class LegacyStream(IntEnum):
    """Handles of the legacy default stream, which takes no batched copies."""

    NULL = 0
    EXPLICIT = 1
    """CU_STREAM_LEGACY."""


class StreamFlag(IntEnum):
    """CUstream_flags."""

    NON_BLOCKING = 1
    """The NULL stream and it do not wait for each other."""


class SourceOrder(IntEnum):
    """CUmemcpySrcAccessOrder: when a copy may read its source."""

    STREAM = 1


class CopyFlag(IntEnum):
    """CUmemcpyFlags."""

    DEFAULT = 0
    PREFER_OVERLAP_WITH_COMPUTE = 1
    """As old as the batched call (CUDA 12.8), which documents it as a hint to keep copies off the SMs."""


class PointerAttribute(IntEnum):
    """CUpointer_attribute."""

    MEMORY_TYPE = 2


class MemoryType(IntEnum):
    """CUmemorytype."""

    HOST = 1


class DeviceAttribute(IntEnum):
    """CUdevice_attribute."""

    CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM = 91


class ResultCode(IntEnum):
    """CUresult, as far as it is looked at."""

    INVALID_VALUE = 1


_LEGACY_STREAMS = frozenset(map(int, LegacyStream))
_NO_COPY = ctypes.c_size_t(-1).value

_size_t = ctypes.c_size_t
_int = ctypes.c_int
_pointer = ctypes.c_void_p
_device_pointer = ctypes.c_uint64

# Name: (version of the form that is called here, argument types). 4000 and the like are the CUDA
# versions in which the form appeared, as in the toolkit's cudaTypedefs.h.
_SIGNATURES: dict[str, tuple[int, tuple[Any, ...]]] = {
    "cuMemcpyBatchAsync": (
        BATCH_VERSION,
        # dsts, srcs, sizes, count, attrs, attrsIdxs, numAttrs, failIdx, stream
        (_pointer, _pointer, _pointer, _size_t, _pointer, _pointer, _size_t, _pointer, _pointer),
    ),
    "cuMemcpyAsync": (4_000, (_device_pointer, _device_pointer, _size_t, _pointer)),
    # phStream, flags, priority
    "cuStreamCreateWithPriority": (5_050, (_pointer, ctypes.c_uint, _int)),
    "cuStreamIsCapturing": (10_000, (_pointer, _pointer)),
    "cuPointerGetAttribute": (4_000, (_pointer, _int, _device_pointer)),
    "cuMemHostGetDevicePointer": (3_020, (_pointer, _pointer, ctypes.c_uint)),
    "cuDeviceGet": (2_000, (_pointer, _int)),
    "cuDeviceGetAttribute": (2_000, (_pointer, _int, _int)),
}


class CopyRefusedError(RuntimeError):
    """The copy cannot be enqueued on this stream; nothing of it was."""


class DriverError(RuntimeError):
    """A driver call failed.

    Attributes:
        call: the function's name.
        code: its CUresult.
        name: the code's name, such as ``CUDA_ERROR_INVALID_VALUE``.
        index: of the copy it blames among those enqueued together, or None.
    """

    def __init__(self, call: str, code: int, name: str, index: int | None = None, detail: str = "") -> None:
        super().__init__(f"{call} failed with {code} ({name}){detail}")
        self.call = call
        self.code = code
        self.name = name
        self.index = index


class _Location(ctypes.Structure):
    _fields_ = (("type", _int), ("id", _int))


class _CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("src_access_order", _int),
        ("src_hint", _Location),
        ("dst_hint", _Location),
        ("flags", ctypes.c_uint),
    )


class _Scratch(threading.local):
    """Memory that the driver reads and writes in a call; a thread's own, since a call lets others run.

    Descriptors are copied here so that nobody asks for their address: with numpy that takes longer than
    copying a short array.
    """

    def __init__(self, most: int) -> None:
        descriptors = np.empty((3, most), dtype=np.uint64)
        start, row = int(descriptors.ctypes.data), descriptors.strides[0]
        self.dst, self.src, self.nbytes = descriptors
        self.addresses = (start, start + row, start + 2 * row)
        self.failed = _size_t(_NO_COPY)
        self.failed_at = ctypes.byref(self.failed)
        self.capture = _int(0)
        self.capture_at = ctypes.byref(self.capture)


class Driver:
    """The driver calls that copies need; every return code becomes an exception.

    Args:
        max_copies_per_call: copies given to one cuMemcpyBatchAsync call at most.
        prefer_overlap: ask for copies that leave the SMs to others, in batches. Without it nothing says so
            but what drivers do today; for measurements.

    Raises:
        DeviceUnavailableError: cuda-python or the driver is missing, or does not start.
        ValueError: ``max_copies_per_call`` is below 1.
    """

    def __init__(
        self, max_copies_per_call: int = MAX_COPIES_PER_CALL, *, prefer_overlap: bool = True
    ) -> None:
        if max_copies_per_call < 1:
            raise ValueError(f"max_copies_per_call must be at least 1, not {max_copies_per_call}")
        self._max_copies_per_call = max_copies_per_call
        self._first_call_copies = min(FIRST_CALL_COPIES, max_copies_per_call)
        try:
            self._bindings: Any = importlib.import_module("cuda.bindings.driver")
            (code,) = self._bindings.cuInit(0)
            self._check("cuInit", int(code))
            code, version = self._bindings.cuDriverGetVersion()
            self._check("cuDriverGetVersion", int(code))
        except ImportError as error:
            raise DeviceUnavailableError(
                f"copies need cuda-python (pip install cuda-bindings): {error}"
            ) from error
        except RuntimeError as error:
            # cuda-python says "no libcuda.so.1" with a plain RuntimeError.
            raise DeviceUnavailableError(f"the CUDA driver does not start: {error}") from error
        self.version = int(version)
        """As CUDA counts: 12080 is 12.8."""
        self._memcpy = self._function("cuMemcpyAsync")
        self._create_stream = self._function("cuStreamCreateWithPriority")
        self._is_capturing = self._function("cuStreamIsCapturing")
        self._pointer_attribute = self._function("cuPointerGetAttribute")
        self._host_device_pointer = self._function("cuMemHostGetDevicePointer")
        self._device = self._function("cuDeviceGet")
        self._device_attribute = self._function("cuDeviceGetAttribute")
        self._batch: Callable[..., int] | None = None
        if self.version >= BATCH_VERSION:
            self._batch = self._function("cuMemcpyBatchAsync")
        else:
            logger.warning(
                "sglang-hicache-io: driver for CUDA %d.%d has no cuMemcpyBatchAsync (12.8): copies go one by "
                "one, at 5 to 7 us of CPU each instead of about 0.6; update the driver",
                self.version // 1000,
                self.version % 1000 // 10,
            )
        # One attribute for all copies: its index array says where it begins to apply, not one per copy.
        # The source is device memory that earlier work in the stream writes: any other order than STREAM
        # lets the copy read it early.
        flags = CopyFlag.PREFER_OVERLAP_WITH_COMPUTE if prefer_overlap else CopyFlag.DEFAULT
        self._attributes = ctypes.byref(_CopyAttributes(src_access_order=SourceOrder.STREAM, flags=flags))
        self._attributes_begin = ctypes.byref(_size_t(0))
        self._scratch = _Scratch(max_copies_per_call)

    @property
    def batched(self) -> bool:
        """Whether copies go in batches; False on a driver older than CUDA 12.8."""
        return self._batch is not None

    def copy(self, batch: CopyBatch, stream: int) -> None:
        """Enqueue every copy of ``batch`` on ``stream``, reading sources in stream order.

        The driver has read the arrays when this returns; nothing of them needs to be kept.

        Args:
            batch: addresses as the GPU sees them. Copies of no bytes are left out.
            stream: a CUstream's value.

        Raises:
            CopyRefusedError: the legacy NULL stream, or a stream under graph capture; nothing was enqueued.
            DriverError: the driver refused. Earlier copies may be under way; record no completion.
        """
        batch = drop_empty(batch)
        if batch.nbytes.size:
            self.check(stream)
            self.enqueue(batch, stream)

    def check(self, stream: int) -> None:
        """Raise if ``stream`` takes no copies.

        Raises:
            CopyRefusedError: it is the legacy NULL stream, or under graph capture.
        """
        if stream in _LEGACY_STREAMS:
            raise CopyRefusedError(
                "the legacy NULL stream takes no batched copies; make a stream of its own current first"
            )
        self.refuse_capture(stream)

    def enqueue(self, batch: CopyBatch, stream: int, start: int = 0, stop: int | None = None) -> None:
        """As :meth:`copy`, on a stream that :meth:`check` has seen, of copies none of which is empty.

        Args:
            batch: addresses as the GPU sees them.
            stream: a CUstream's value.
            start: the first of its copies that is enqueued. Where there are others before it the engine is
                busy with them, and calls need not begin short.
            stop: behind the last one; None: all that follow.

        Raises:
            DriverError: the driver refused.
        """
        stop = len(batch) if stop is None else stop
        if self._batch is None:
            self._one_by_one(batch, stream, start, stop)
        else:
            self._in_batches(self._batch, batch, stream, start, stop)

    def copy_one(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        """Enqueue one copy of ``nbytes`` bytes between addresses as the GPU sees them.

        Raises:
            DriverError: the driver refused.
        """
        code = self._memcpy(dst, src, nbytes, stream)
        if code:
            detail = f": {nbytes} bytes from {src:#x} to {dst:#x}"
            raise DriverError("cuMemcpyAsync", code, self._name(code), detail=detail)

    def refuse_capture(self, stream: int) -> None:
        """Raise if ``stream`` is under graph capture.

        Asked before anything is enqueued, because CUDA 13 answers a batched copy there with an error (900),
        drops it, and lets the capture go on to a graph without it.

        Raises:
            CopyRefusedError: it is.
        """
        scratch = self._scratch
        code = self._is_capturing(stream, scratch.capture_at)
        if code:
            self._check("cuStreamIsCapturing", code)
        if scratch.capture.value:
            raise CopyRefusedError(
                "a CUDA graph is being captured on this stream: a write to host memory cannot be part of it"
            )

    def new_stream(self, priority: int) -> int:
        """A CUstream of the context that is current, which lives as long as the process.

        Args:
            priority: as CUDA counts: 0 is the lowest, a negative one is higher.

        Raises:
            DriverError: there is no context, say.
        """
        stream = _pointer(0)
        self._check(
            "cuStreamCreateWithPriority",
            self._create_stream(ctypes.byref(stream), StreamFlag.NON_BLOCKING, priority),
        )
        assert stream.value
        return stream.value

    def is_pinned(self, address: int) -> bool:
        """Whether ``address`` is host memory that CUDA allocated or registered.

        Raises:
            DriverError: the driver refused to say.
        """
        kind = ctypes.c_uint(0)
        code = self._pointer_attribute(ctypes.byref(kind), PointerAttribute.MEMORY_TYPE, address)
        if code == ResultCode.INVALID_VALUE:  # how the driver says that it never heard of this memory
            return False
        self._check("cuPointerGetAttribute", code)
        return kind.value == MemoryType.HOST

    def host_addresses_work(self, ordinal: int) -> bool:
        """Whether GPU ``ordinal`` reaches registered host memory under the host's own addresses.

        Raises:
            DriverError: there is no such GPU, say.
        """
        device, value = _int(0), _int(0)
        self._check("cuDeviceGet", self._device(ctypes.byref(device), ordinal))
        code = self._device_attribute(
            ctypes.byref(value), DeviceAttribute.CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, device
        )
        self._check("cuDeviceGetAttribute", code)
        return value.value != 0

    def device_address(self, address: int) -> int:
        """The address under which the GPU reaches the registered host memory at ``address``.

        Raises:
            DriverError: the memory is not registered.
        """
        result = _device_pointer(0)
        code = self._host_device_pointer(ctypes.byref(result), address, 0)
        self._check("cuMemHostGetDevicePointer", code)
        return result.value

    def _in_batches(
        self, call: Callable[..., int], batch: CopyBatch, stream: int, start: int, end: int
    ) -> None:
        scratch, attributes, begin = self._scratch, self._attributes, self._attributes_begin
        dst, src, nbytes = scratch.dst, scratch.src, scratch.nbytes
        most = self._max_copies_per_call if start else self._first_call_copies
        while start < end:
            stop = start + most if start + most < end else end
            count = stop - start
            dst[:count] = batch.dst[start:stop]
            src[:count] = batch.src[start:stop]
            nbytes[:count] = batch.nbytes[start:stop]
            scratch.failed.value = _NO_COPY
            code = call(*scratch.addresses, count, attributes, begin, 1, scratch.failed_at, stream)
            if code:
                failed = scratch.failed.value
                index = start + failed if failed < count else None
                raise self._error("cuMemcpyBatchAsync", code, batch, index)
            start, most = stop, min(2 * most, self._max_copies_per_call)

    def _one_by_one(self, batch: CopyBatch, stream: int, start: int, end: int) -> None:
        columns = (each[start:end].tolist() for each in (batch.dst, batch.src, batch.nbytes))
        for index, (dst, src, nbytes) in enumerate(zip(*columns, strict=True), start):
            code = self._memcpy(dst, src, nbytes, stream)
            if code != 0:
                raise self._error("cuMemcpyAsync", code, batch, index)

    def _error(self, call: str, code: int, batch: CopyBatch, index: int | None) -> DriverError:
        detail = f", one of {len(batch)} copies"
        if index is not None:
            detail = (
                f" at copy {index} of {len(batch)}: {int(batch.nbytes[index])} bytes from "
                f"{int(batch.src[index]):#x} to {int(batch.dst[index]):#x}"
            )
        return DriverError(call, code, self._name(code), index, detail)

    def _function(self, name: str) -> Callable[..., int]:
        version, arguments = _SIGNATURES[name]
        code, address, status = self._bindings.cuGetProcAddress(name.encode(), version, 0)
        if int(code) != 0 or not int(address):
            raise DeviceUnavailableError(
                f"the CUDA driver has no {name} at version {version}: {self._name(int(code))}, {status!s}"
            )
        # CFUNCTYPE lets other threads run during the call, which takes milliseconds for a full batch.
        return ctypes.CFUNCTYPE(_int, *arguments)(int(address))

    def _check(self, call: str, code: int) -> None:
        if code != 0:
            raise DriverError(call, code, self._name(code))

    def _name(self, code: int) -> str:
        try:
            return str(self._bindings.CUresult(code).name)
        except ValueError:
            return "a code that this cuda-python does not know"
