"""What moves the bytes: backends, the plan of a transfer, the device seam, and SGLang's side of it.

``plan`` is pure functions of numbers; ``copy_engine``, ``hybrid`` and ``fenced_kernel``
are the backends; ``device`` is the only way to hardware; ``sglang`` is the only folder that knows SGLang.
"""

from ..policy.backend_spec import BackendSpec, Option, SmWork
from .device.base import Device
from .interface import Backend, BackendFactory, OptionsError, Submission, Transfer
from .plan.copies import CopyBatch, direct_copies
from .plan.geometry import Component, HostStrides, PoolGeometry, host_strides
from .registry import (
    UnknownBackendError,
    available_backends,
    get_backend,
    register_backend,
)

__all__ = [
    "Backend",
    "BackendFactory",
    "BackendSpec",
    "Component",
    "CopyBatch",
    "Device",
    "HostStrides",
    "Option",
    "OptionsError",
    "PoolGeometry",
    "SmWork",
    "Submission",
    "Transfer",
    "UnknownBackendError",
    "available_backends",
    "direct_copies",
    "get_backend",
    "host_strides",
    "register_backend",
]
