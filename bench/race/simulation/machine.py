"""Makes SGLang believe that it runs on a GPU of some architecture, and puts the virtual device there.

Nothing of SGLang is edited. Module globals that SGLang reads when it was imported on a machine without a GPU
are set to what they are on one with a GPU, and what cannot run there is the stand-in of :mod:`~.kernels`.
This changes the process for good: it is one's own to run simulations in.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from ....io_backends.virtual import gpu
from ....io_backends.virtual.operations import Operation
from ....io_backends.virtual.ranges import ByteRanges
from ....io_backends.virtual.sites import hide
from . import kernels

hide(__name__)

POISON = 0xA5
"""What KV memory holds that nobody wrote."""


class DeviceTensor(torch.Tensor):
    """Ordinary memory that says it is on the GPU: an index tensor."""

    is_cuda = True

    def record_stream(self, stream: Any) -> None:
        gpu.record_stream(self, stream)

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        """A copy that the host waits for, on the current stream."""
        gpu.current_stream().synchronize()
        return self.as_subclass(torch.Tensor)

    def sort(self, *_: Any, **__: Any) -> Any:
        """Work on the current stream, like everything here that makes a tensor of others."""
        values, order = torch.sort(self.as_subclass(torch.Tensor))
        return on_device(values, "indices sorted", self), on_device(order, "their order", self)

    def index_select(self, dim: int, index: Any) -> torch.Tensor:
        picked = self.as_subclass(torch.Tensor).index_select(dim, index.as_subclass(torch.Tensor))
        return on_device(picked, "indices picked", self, index)


class HostTensor(torch.Tensor):
    """An index tensor on the host, whose copy to the device runs on the current stream."""

    def to(self, *args: Any, **named: Any) -> torch.Tensor:
        return on_device(self.as_subclass(torch.Tensor), "host indices to the device")


def on_device(values: torch.Tensor, name: str, *of: torch.Tensor) -> torch.Tensor:
    """``values`` as the result of work that the current stream does now.

    Args:
        values: computed already.
        name: for reports.
        of: index tensors that it reads. It is part of a transfer to the host then.
    """
    made = values.clone().as_subclass(DeviceTensor)
    gpu.allocated(made, name=name)
    borrowed = gpu.gpu.memory.borrow(made)
    read = [kernels.borrowed_indices(each) for each in of]
    gpu.current_stream().launch(
        Operation(
            name,
            reads=ByteRanges.of([span for each in read for span in each.bytes.spans]),
            writes=borrowed.bytes,
            engine="sm",
            d2h_on_sms=bool(read),
            uses=(borrowed, *read),
            nbytes=made.nbytes,
        )
    )
    return made


class _Torch:
    """``torch`` as SGLang's kernel module sees it: its decisions ask for the GPU's architecture."""

    cuda = SimpleNamespace()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _Unpinned(_Torch):
    """``torch`` as SGLang's batches see it: 0.5.22 pins memory without asking whether there is a driver."""

    @staticmethod
    def tensor(*args: Any, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        return torch.tensor(*args, **named)


def install() -> None:
    """Do all of it. Idempotent."""
    from sglang.kernels.ops.kvcache import hicache
    from sglang.srt.managers import cache_controller, schedule_batch
    from sglang.srt.mem_cache import l2_transfer, unified_radix_cache
    from sglang.srt.mem_cache.pool_host import common, mamba, mha, mla

    if hicache.load_jit is kernels.load_jit:
        return
    torch.set_num_threads(1)
    for module in (l2_transfer, cache_controller):
        module.device_module = gpu
    hicache.load_jit = kernels.load_jit
    hicache.torch = _Torch()
    schedule_batch.torch = _Unpinned()
    # It keeps its first answer for each row size, and the architecture may change here.
    hicache.use_hicache_tma_kernel = hicache.use_hicache_tma_kernel.__wrapped__
    platform = SimpleNamespace(capabilities=SimpleNamespace(hicache_device_kernels=True))
    for module in (mha, mla):
        module._is_cuda = True
        module.current_platform = platform
        for name, function in kernels.DIRECT.items():
            setattr(module, name, function)
    mamba.MambaPoolHost._copy_tensor_all_layers_lf_pf = staticmethod(kernels.states_to_host)
    mamba.MambaPoolHost._copy_tensor_pf_lf = staticmethod(kernels.states_to_device)
    common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate_host_memory
    _merge_on_device(cache_controller.CacheOperation)
    # Of a retraction, which merges nothing.
    unified_radix_cache.CacheOperation = lambda *args, **named: _on_gpu(
        cache_controller.CacheOperation(*args, **named)
    )


def set_arch(arch: str) -> None:
    """The GPU's architecture from now on, as ``sm90``."""
    digits = re.sub(r"[^0-9]", "", arch)
    _Torch.cuda = SimpleNamespace(
        get_device_capability=lambda: (int(digits[:-1]), int(digits[-1])), current_device=gpu.current_device
    )


def _allocate_host_memory(
    dims: tuple[int, ...], dtype: Any, device: str, pin_memory: bool, allocator: Any, **_: Any
) -> Any:
    buffer = allocator.allocate(dims, dtype=dtype, device=device)
    kernels.host_memory.add(buffer.data_ptr(), buffer.nbytes)
    return buffer


def _merge_on_device(operation: Any) -> None:
    merge = operation.merge_ops
    operation.merge_ops = staticmethod(lambda operations: _on_gpu(merge(operations)))


def _on_gpu(operation: Any) -> Any:
    """On a GPU the indices of an operation are made by work on the schedule stream."""

    def convert(of: Any) -> dict[str, Any]:
        return {
            "device_indices": on_device(of.device_indices, "device indices"),
            "host_indices": of.host_indices.as_subclass(HostTensor),
        }

    for name, indices in convert(operation).items():
        setattr(operation, name, indices)
    if operation.pool_transfers:
        operation.pool_transfers = [replace(each, **convert(each)) for each in operation.pool_transfers]
    return operation
