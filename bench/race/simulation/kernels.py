"""Stand-ins for the copies that SGLang's host pools launch: they have no CPU form.

They are called as the kernels are, with SGLang's own pointer tables, indices and strides. Each enqueues one
virtual operation on the current stream, says which bytes it reads and writes and whether it runs on the SMs,
and moves those bytes when its stream gets there. What is launched, and where, stays SGLang's decision.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ....io_backends.virtual import gpu
from ....io_backends.virtual.memory import Borrowed
from ....io_backends.virtual.operations import Operation
from ....io_backends.virtual.ranges import ByteRanges
from ....io_backends.virtual.sites import hide

# Reports name the pool that wanted the copy.
hide(__name__)
hide("sglang.kernels")

Indices = npt.NDArray[np.int64]

_PIECES = 4
"""In how many pieces a copy is done, so that what runs beside it can come in between."""


class HostMemory:
    """Which addresses are host memory; everything else is the device's."""

    def __init__(self) -> None:
        self._extents: list[tuple[int, int]] = []

    def add(self, start: int, nbytes: int) -> None:
        self._extents.append((start, start + nbytes))

    def __contains__(self, address: int) -> bool:
        return any(start <= address < stop for start, stop in self._extents)


host_memory = HostMemory()
"""Of this process."""


@dataclass(frozen=True, slots=True)
class StridedRows:
    """Rows of ``nbytes`` bytes, ``stride`` bytes apart."""

    base: int
    stride: int
    nbytes: int

    @classmethod
    def of(cls, tensor: Any) -> StridedRows:
        """A tensor's rows along its first axis, each in one piece."""
        if tensor.numel() and not tensor[0].is_contiguous():
            raise ValueError(f"a row of {tuple(tensor.shape)} with strides {tensor.stride()} is in pieces")
        size = tensor.element_size()
        return cls(tensor.data_ptr(), tensor.stride(0) * size, tensor[0].numel() * size)

    def spans(self, slots: Indices) -> Indices:
        """Where these rows are: [start, stop) addresses, int64 [n, 2]."""
        starts = self.base + slots * self.stride
        return np.column_stack((starts, starts + self.nbytes))

    def view(self, slots: Indices) -> npt.NDArray[np.uint8]:
        """Memory that has these rows, in place: uint8 [more than the greatest of them, nbytes]."""
        # Few sizes, so that views are made once.
        return _memory(self.base, self.stride, self.nbytes, 1 << int(slots.max()).bit_length())


@functools.lru_cache(maxsize=4096)
def _memory(base: int, stride: int, nbytes: int, slots: int) -> npt.NDArray[np.uint8]:
    extent = (slots - 1) * stride + nbytes
    flat = np.ctypeslib.as_array((ctypes.c_uint8 * extent).from_address(base))
    return np.lib.stride_tricks.as_strided(flat, (slots, nbytes), (stride, 1))


@dataclass(frozen=True, slots=True)
class Copy:
    """Rows ``sources[i]`` of one memory to rows ``targets[i]`` of another."""

    target: StridedRows
    targets: Indices
    source: StridedRows
    sources: Indices

    def run(self) -> None:
        if len(self.targets):
            self.target.view(self.targets)[self.targets] = self.source.view(self.sources)[self.sources]


def launch(
    name: str,
    copies: Sequence[Copy],
    indices: Sequence[Any] = (),
    *,
    on_sms: bool,
    d2h: bool,
    engine_copies: int = 1,
) -> None:
    """Enqueue ``copies`` as one operation on the current stream.

    Args:
        indices: tensors that it reads while it runs; only those on the device can be read too early, or be
        gone.
        on_sms: by a kernel, or else by a copy engine.
        d2h: a part of a transfer to the host.
        engine_copies: that the copy engine gets.
    """
    on_device = [_OnDevice(each) for each in indices if each.is_cuda]
    pieces = [copies[nth::_PIECES] for nth in range(min(_PIECES, len(copies)))]
    gpu.current_stream().launch(
        Operation(
            name,
            work=[functools.partial(_run, piece, on_device) for piece in pieces],
            reads=ByteRanges.of(
                np.concatenate(
                    [
                        *(copy.source.spans(copy.sources) for copy in copies),
                        *(each.where.bytes.spans for each in on_device),
                    ]
                )
            ),
            writes=ByteRanges.of(np.concatenate([copy.target.spans(copy.targets) for copy in copies])),
            engine="sm" if on_sms else "copy_d2h" if d2h else "copy_h2d",
            d2h_on_sms=on_sms and d2h,
            uses=[each.where for each in on_device],
            copies=engine_copies,
            nbytes=sum(len(copy.targets) * copy.target.nbytes for copy in copies),
            crosses_link=on_sms
            and (copies[0].target.base in host_memory or copies[0].source.base in host_memory),
        )
    )


def borrowed_indices(indices: Any) -> Borrowed:
    """The memory of an index tensor, for the operation that reads it."""
    borrowed = gpu.gpu.memory.borrow(indices, "index tensor")
    if borrowed.block.stream is None:
        # Made by the code that launches this, on the same stream.
        gpu.allocated(indices)
    return borrowed


class _OnDevice:
    """An index tensor that a kernel reads when it runs."""

    def __init__(self, indices: Any) -> None:
        self.where = borrowed_indices(indices)
        self._values = self.where.values().copy()

    def intact(self) -> bool:
        return np.array_equal(self.where.values(), self._values)


def _run(copies: Sequence[Copy], indices: Sequence[_OnDevice]) -> None:
    # With other indices than these (the tensor was freed) a kernel copies anything, or faults. Here: nothing.
    if all(each.intact() for each in indices):
        for copy in copies:
            copy.run()


def _values(indices: Any) -> Indices:
    return np.asarray(indices, dtype=np.int64)


class CopyKernels:
    """What ``load_jit`` gives for ``hicache.cuh`` and ``hicache_tma.cuh``: rows by two lists of indices."""

    def __init__(self, name: str, element_size: int | None) -> None:
        self._name = name
        self._element_size = element_size

    def fits_device(self, device: int) -> bool:
        """The TMA kernel's shared memory fits every GPU that it is asked for on (sm_90 and later)."""
        return True

    def launch_one(self, k_dst: Any, v_dst: Any, dst: Any, k_src: Any, v_src: Any, src: Any) -> None:
        self._launch(
            [(StridedRows.of(k_dst), StridedRows.of(k_src)), (StridedRows.of(v_dst), StridedRows.of(v_src))],
            dst,
            src,
        )

    def launch_one_mla(self, to: Any, dst: Any, source: Any, src: Any) -> None:
        self._launch([(StridedRows.of(to), StridedRows.of(source))], dst, src)

    def launch_all(
        self,
        k_dst: Any,
        v_dst: Any,
        dst: Any,
        k_src: Any,
        v_src: Any,
        src: Any,
        src_stride: int,
        dst_stride: int,
        element_size: int | None = None,
    ) -> None:
        size = element_size or self._element_size
        self._launch(
            [
                *_layers(k_dst, k_src, dst_stride, src_stride, size),
                *_layers(v_dst, v_src, dst_stride, src_stride, size),
            ],
            dst,
            src,
        )

    def launch_all_mla(
        self,
        to: Any,
        dst: Any,
        source: Any,
        src: Any,
        src_stride: int,
        dst_stride: int,
        element_size: int | None = None,
    ) -> None:
        size = element_size or self._element_size
        self._launch(list(_layers(to, source, dst_stride, src_stride, size)), dst, src)

    def _launch(self, pairs: Sequence[tuple[StridedRows, StridedRows]], dst: Any, src: Any) -> None:
        targets, sources = _values(dst), _values(src)
        launch(
            self._name,
            [Copy(target, targets, source, sources) for target, source in pairs],
            (dst, src),
            on_sms=True,
            d2h=pairs[0][0].base in host_memory,
        )


def _layers(
    dst: Any, src: Any, dst_stride: int, src_stride: int, size: Any
) -> Iterator[tuple[StridedRows, StridedRows]]:
    """Rows of each layer, from tables of addresses (uint64 [layers])."""
    for target, source in zip(dst.tolist(), src.tolist(), strict=True):
        yield StridedRows(target, dst_stride, size), StridedRows(source, src_stride, size)


class StagedKernels:
    """What ``load_jit`` gives for ``staged_write_back.cuh``: relayout to device staging, then one copy a
    page.
    """

    def launch_all_lf_pf_staged(
        self,
        k_dst: Any,
        v_dst: Any,
        dst: Any,
        k_staging: Any,
        v_staging: Any,
        pages: Any,
        k_src: Any,
        v_src: Any,
        page_size: int,
    ) -> None:
        self._launch([(k_dst, k_staging, k_src), (v_dst, v_staging, v_src)], dst, pages, page_size)

    def launch_all_mla_lf_pf_staged(
        self, to: Any, dst: Any, staging: Any, pages: Any, source: Any, page_size: int
    ) -> None:
        self._launch([(to, staging, source)], dst, pages, page_size)

    def _launch(self, parts: Sequence[tuple[Any, Any, Any]], dst: Any, pages: Any, page_size: int) -> None:
        # The slot of each page's first token.
        rows = (_values(pages)[:, None] + np.arange(page_size)).reshape(-1)
        staged = np.arange(len(rows))
        relayout, drain = [], []
        for target, staging, source in parts:
            # [token, layer, row]: a token's layers lie together in staging, and on the host.
            token = StridedRows.of(staging)
            row = token.nbytes // staging.shape[1]
            for layer, address in enumerate(source.tolist()):
                to = StridedRows(token.base + layer * row, token.stride, row)
                relayout.append(Copy(to, staged, StridedRows(address, row, row), rows))
            drain.append(Copy(StridedRows.of(target), _values(dst), token, staged))
        launch("staged relayout", relayout, (pages,), on_sms=True, d2h=True)
        launch("staged copies", drain, on_sms=False, d2h=True, engine_copies=len(parts) * len(pages))


def load_jit(name: str, *arguments: Any, **_: Any) -> Any:
    """For ``sglang.kernels.jit.utils.load_jit`` in SGLang's HiCache module: nothing is compiled."""
    if name == "hicache_staged":
        return StagedKernels()
    if name == "hicache_tma":
        return CopyKernels("TMA kernel", None)  # told at each launch
    if name == "hicache":
        return CopyKernels("register kernel", int(arguments[0]))
    raise NotImplementedError(f"SGLang's kernel {name} has no stand-in")


def transfer_kv_direct(
    src_layers: Sequence[Any], dst_layers: Sequence[Any], src_indices: Any, dst_indices: Any, page_size: int
) -> None:
    """``sgl_kernel.kvcacheio``: one memcpy for each run of pages that is contiguous on both sides."""
    sources, targets = _values(src_indices), _values(dst_indices)
    _direct(
        [
            Copy(StridedRows.of(dst), targets, StridedRows.of(src), sources)
            for src, dst in zip(src_layers, dst_layers, strict=True)
        ],
        page_size,
    )


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[Any], dst_ptrs: Sequence[Any], src_indices: Any, dst_indices: Any, page_size: int
) -> None:
    """``sgl_kernel.kvcacheio``: device layers to host pages [page, layer, offset, ...]."""
    sources, targets = _values(src_indices), _values(dst_indices)
    layers = len(src_ptrs) // len(dst_ptrs)
    copies = []
    for nth, src in enumerate(src_ptrs):
        pages = PagedRows.of(dst_ptrs[nth // layers], nth % layers)
        copies.append(Copy(pages.rows, pages.at(targets), StridedRows.of(src), sources))
    _direct(copies, page_size)


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[Any],
    dst_ptrs: Sequence[Any],
    src_indices: Any,
    dst_indices: Any,
    layer_id: int,
    page_size: int,
) -> None:
    """``sgl_kernel.kvcacheio``: host pages [page, layer, offset, ...] to one device layer."""
    sources, targets = _values(src_indices), _values(dst_indices)
    copies = []
    for src, dst in zip(src_ptrs, dst_ptrs, strict=True):
        pages = PagedRows.of(src, layer_id)
        copies.append(Copy(StridedRows.of(dst), targets, pages.rows, pages.at(sources)))
    _direct(copies, page_size)


def states_to_host(
    *, src_layers: Sequence[Any], dst: Any, src_indices: Any, dst_indices: Any, io_backend: str, **_: Any
) -> None:
    """``MambaPoolHost._copy_tensor_all_layers_lf_pf``: device layers to host slots [slot, layer, 1, ...]."""
    _states(
        [(StridedRows.of(dst[:, nth, 0]), StridedRows.of(src)) for nth, src in enumerate(src_layers)],
        dst_indices,
        src_indices,
        io_backend,
    )


def states_to_device(
    *, src: Any, dst: Any, src_indices: Any, dst_indices: Any, layer_id: int, io_backend: str, **_: Any
) -> None:
    """``MambaPoolHost._copy_tensor_pf_lf``: host slots to one device layer."""
    pair = StridedRows.of(dst), StridedRows.of(src[:, layer_id, 0])
    _states([pair], dst_indices, src_indices, io_backend)


def _states(pairs: Sequence[tuple[StridedRows, StridedRows]], to: Any, of: Any, io_backend: str) -> None:
    on_sms = io_backend == "kernel"
    targets, sources = _values(to), _values(of)
    launch(
        "state kernel" if on_sms else "direct copies",
        [Copy(target, targets, source, sources) for target, source in pairs],
        (to, of) if on_sms else (),
        on_sms=on_sms,
        d2h=pairs[0][0].base in host_memory,
        engine_copies=len(pairs) * len(targets),
    )


class PagedRows(NamedTuple):
    """Rows of one layer in a buffer [page, layer, offset, ...]."""

    rows: StridedRows
    layer: int
    layers: int
    page_size: int

    @classmethod
    def of(cls, buffer: Any, layer: int) -> PagedRows:
        row = buffer[0, 0, 0].numel() * buffer.element_size()
        return cls(StridedRows(buffer.data_ptr(), row, row), layer, buffer.shape[1], buffer.shape[2])

    def at(self, slots: Indices) -> Indices:
        """Which of :attr:`rows` the slots are."""
        page, offset = np.divmod(slots, self.page_size)
        rows: Indices = (page * self.layers + self.layer) * self.page_size + offset
        return rows


def _direct(copies: Sequence[Copy], page_size: int) -> None:
    engine_copies = len(copies) * -(-len(copies[0].targets) // page_size)
    launch(
        "direct copies",
        copies,
        on_sms=False,
        d2h=copies[0].target.base in host_memory,
        engine_copies=engine_copies,
    )


DIRECT: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        transfer_kv_direct,
        transfer_kv_all_layer_direct_lf_pf,
        transfer_kv_per_layer_direct_pf_lf,
    )
}
"""Of ``sgl_kernel.kvcacheio``, what the pools call for io backend ``direct``."""
