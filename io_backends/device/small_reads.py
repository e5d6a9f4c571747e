"""Small device tensors read by a kernel, which waits for no copy engine.

All copies to the host share one copy engine, and a small one waits for a turn of whatever large one is under
way (:mod:`~.copy_interleaving`), about 0.6 ms on an H200. There a kernel that writes the same bytes to pinned
memory takes 0.05 to 0.08 ms, and 0.2 to 0.3 the first time
(bench/results/2026-11-28-h200-quiet/profile.json). So where the host must wait for a value anyway, it need
not wait for write-back too.
"""

from __future__ import annotations

import threading
from typing import Any

WORD = 4
"""Bytes that the kernel moves at once."""

MOST_BYTES = 64 * 1024
"""Of a tensor; a kernel moves them in microseconds. Index pointers of 4,096 requests are 16 KiB."""

_BLOCK = 1024


class KernelReads:
    """Reads on the current stream, behind what is queued there; the host waits, as for torch's own copies.

    Any thread may read; one at a time does. Not while a CUDA graph is captured, which the kernel would become
    part of. Compiles its kernel, and waits for it: make one before serving.

    Args:
        torch: the module.
        device: torch's, of the tensors that are read; it is the current one when they are.
        buffer: uint8 [:data:`MOST_BYTES`], host memory that the GPU may write, and nobody else has.
        address: of its first byte, as the GPU sees it.

    Raises:
        Exception: whatever Triton or the driver does where the kernel cannot be made or run.
    """

    def __init__(self, torch: Any, device: Any, buffer: Any, address: int) -> None:
        self._torch, self._device, self._buffer, self._address = torch, device, buffer, address
        self._compiled: Any = None
        self._lock = threading.Lock()
        self.read(torch.zeros(1, dtype=torch.int32, device=device))

    def serves(self, values: Any) -> bool:
        """Whether :meth:`read` takes this tensor: a plain one of the device, whole words side by side, few
        enough, and the values are what lies there.
        """
        torch = self._torch
        if type(values) is not torch.Tensor or values.device != self._device:
            return False
        if values.layout is not torch.strided or values.is_neg() or values.is_conj():
            return False
        nbytes = values.numel() * values.element_size()
        return (
            0 < nbytes <= MOST_BYTES
            and not nbytes % WORD
            and values.is_contiguous()
            and not values.data_ptr() % WORD
            and not (values.requires_grad and torch.is_grad_enabled())
        )

    def read(self, values: Any) -> Any:
        """A device tensor's values, in a new tensor on the host.

        Args:
            values: one that it :meth:`serves`.

        Returns:
            The same shape and dtype, and memory of its own.

        Raises:
            RuntimeError: the driver refuses the launch, or work before it on the stream has failed.
        """
        nbytes = values.numel() * values.element_size()
        words = nbytes // WORD
        with self._lock:
            self._launch(-(-words // _BLOCK), (values.data_ptr(), self._address, words, _BLOCK))
            if values.is_cuda:
                self._torch.cuda.current_stream().synchronize()
            return self._buffer[:nbytes].view(values.dtype).reshape(values.shape).clone()

    def _launch(self, grid: int, arguments: tuple[int, int, int, int]) -> None:
        if self._compiled is not None:
            # Past Triton's look-up of a kernel by its arguments.
            self._compiled[grid, 1, 1](*arguments, stream=None)
            return
        # Triton comes late: a process that never reads so needs none of it.
        from .small_reads_kernel import copy_words

        self._compiled = copy_words[grid, 1, 1](*arguments, num_warps=4)
