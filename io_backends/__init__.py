"""What moves the bytes: backends, the plan of a transfer, the device seam, and SGLang's side of it.

``geometry`` and ``plan`` are pure functions of numbers; ``copy_engine``, ``hybrid`` and ``fenced_kernel``
are the backends; ``device`` is the only way to hardware; ``sglang`` is the only folder that knows SGLang.
"""

from sglang_hicache.io_backends.device.base import Device
from sglang_hicache.io_backends.geometry import Component, HostStrides, PoolGeometry, host_strides
from sglang_hicache.io_backends.interface import Backend, BackendFactory, OptionsError, Submission, Transfer
from sglang_hicache.io_backends.plan import CopyBatch, direct_copies
from sglang_hicache.io_backends.registry import (
    UnknownBackendError,
    available_backends,
    get_backend,
    register_backend,
)

__all__ = [
    "Backend",
    "BackendFactory",
    "Component",
    "CopyBatch",
    "Device",
    "HostStrides",
    "OptionsError",
    "PoolGeometry",
    "Submission",
    "Transfer",
    "UnknownBackendError",
    "available_backends",
    "direct_copies",
    "get_backend",
    "host_strides",
    "register_backend",
]
