"""What a HiCache pool looks like in memory: pure numbers, no tensors, no SGLang.

A pool holds, for every token slot, one row per layer and component (K and V for MHA, one latent row
for MLA). On the device each layer and component is its own array of rows. On the host all of them share
one buffer whose axis order is the *layout*. Everything the planner needs about a layout is a handful of
byte strides, so a new layout is one new branch in :func:`host_strides`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PAGED_LAYOUTS = frozenset({"page_first_direct", "page_head"})
"""Layouts in which the rows of one page are not evenly spaced across a page boundary."""

LAYOUTS = frozenset({"layer_first", "page_first"}) | PAGED_LAYOUTS
"""Host layouts that :func:`host_strides` can describe."""


@dataclass(frozen=True, slots=True)
class HostStrides:
    """Where one component's rows lie in a buffer with a host layout. All values in bytes.

    The address of piece ``p`` of layer ``l`` of slot ``s`` (page ``s // page_size``, offset
    ``s % page_size``) is ``base + page * page + offset * token + l * layer + p * piece``. ``pieces`` is 1
    except in ``page_head``, which stores a row's heads apart.
    """

    base: int
    page: int
    token: int
    layer: int
    pieces: int = 1
    piece: int = 0


def host_strides(
    layout: str, *, base: int, layers: int, page_size: int, slots: int, row_bytes: int, heads: int = 1
) -> HostStrides:
    """Strides of one component in ``layout``.

    Args:
        layout: one of :data:`LAYOUTS`; the axis orders are those of SGLang's
            ``MHATokenToKVPoolHost.init_kv_buffer`` and ``MLATokenToKVPoolHost.init_kv_buffer``.
        base: address of the component's first byte.
        layers: layers in the buffer.
        page_size: tokens a page.
        slots: token slots in the buffer (a multiple of ``page_size`` for paged layouts).
        row_bytes: bytes of one token's row in one layer.
        heads: KV heads; only ``page_head`` splits a row by them.

    Raises:
        ValueError: the layout is unknown, or ``page_head`` cannot split the row evenly.
    """
    if layout == "layer_first":  # (L, T, row)
        return HostStrides(base, page=page_size * row_bytes, token=row_bytes, layer=slots * row_bytes)
    if layout == "page_first":  # (T, L, row)
        token = layers * row_bytes
        return HostStrides(base, page=page_size * token, token=token, layer=row_bytes)
    if layout == "page_first_direct":  # (P, L, page, row)
        layer = page_size * row_bytes
        return HostStrides(base, page=layers * layer, token=row_bytes, layer=layer)
    if layout == "page_head":  # (P, H, page, L, row / H)
        if heads <= 0 or row_bytes % heads:
            raise ValueError(f"page_head cannot split a row of {row_bytes} bytes into {heads} heads")
        head = row_bytes // heads
        token = layers * head
        return HostStrides(
            base,
            page=heads * page_size * token,
            token=token,
            layer=head,
            pieces=heads,
            piece=page_size * token,
        )
    raise ValueError(f"unknown host layout {layout!r}; known: {', '.join(sorted(LAYOUTS))}")


@dataclass(frozen=True, slots=True)
class Component:
    """One of the arrays a pool keeps per layer: ``k``, ``v``, or MLA's ``kv``.

    Attributes:
        name: for messages.
        row_bytes: bytes of one token's row in one layer, the same on both sides.
        device_rows: address of row 0, one per layer.
        device_row_stride: bytes between consecutive device rows; larger than ``row_bytes`` when strided.
        host: where the rows go.
    """

    name: str
    row_bytes: int
    device_rows: tuple[int, ...]
    device_row_stride: int
    host: HostStrides

    @property
    def piece_bytes(self) -> int:
        """Bytes of one separately stored part of a row."""
        return self.row_bytes // self.host.pieces


@dataclass(frozen=True, slots=True)
class PoolGeometry:
    """A host pool and the device pool it backs.

    Attributes:
        label: SGLang's name for the pool (``kv``, ``swa``, ...).
        kv_kind: what it holds: ``mha``, ``mla``, ``index``, or ``state``, where a slot is of a whole prefix.
        layout: host layout name.
        dtype: storage dtype's name, for messages; copies are byte copies.
        heads: KV heads stored per row.
        layers: layers the pool stores, packed drafts included.
        page_size: tokens a page.
        host_slots, device_slots: token slots on each side; valid indices are below them.
        components: ``(k, v)`` or ``(kv,)`` of rows; arrays of states; ``(page,)``.
        record_slots: slots that must be written together, in order: a page where the bytes of its slots are
            not each slot's own (keys, then scales), 1 elsewhere.
        index_step: indices of a write, on both sides, that stand for one slot together (:meth:`slots_of`): a
            page whose bytes are no whole number a token, or the ranks that share a sequence's rows.
        index_offset: which of them counts, below ``index_step``.

    Raises:
        ValueError: numbers that no pool can have together: an unknown layout, a size below 1, host slots that
            are not whole pages, device arrays that are not one a layer, rows that overlap.
    """

    label: str
    kv_kind: str
    layout: str
    dtype: str
    heads: int
    layers: int
    page_size: int
    host_slots: int
    device_slots: int
    components: tuple[Component, ...]
    record_slots: int = 1
    index_step: int = 1
    index_offset: int = 0

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown host layout {self.layout!r}; known: {', '.join(sorted(LAYOUTS))}")
        if min(self.layers, self.page_size, self.host_slots, self.device_slots, self.heads) <= 0:
            raise ValueError(f"{self.label}: layers, page size, slots and heads must be positive")
        if self.paged and self.host_slots % self.page_size:
            raise ValueError(f"{self.label}: {self.host_slots} host slots are not whole pages")
        if not 0 <= self.index_offset < self.index_step:
            raise ValueError(
                f"{self.label}: index {self.index_offset} of {self.index_step} is not among them"
            )
        if self.record_slots not in (1, self.page_size):
            raise ValueError(f"{self.label}: a record of {self.record_slots} slots is not a page")
        for part in self.components:
            if len(part.device_rows) != self.layers:
                raise ValueError(
                    f"{self.label}.{part.name}: {len(part.device_rows)} device arrays, {self.layers} layers"
                )
            if not 0 < part.row_bytes <= part.device_row_stride:
                raise ValueError(
                    f"{self.label}.{part.name}: device rows of {part.row_bytes} bytes overlap at a stride of "
                    f"{part.device_row_stride}"
                )

    def __hash__(self) -> int:
        # Plans are cached by pool, on the scheduler's thread: not over hundreds of row addresses each time.
        return hash((self.label, self.components[0].host.base))

    @property
    def paged(self) -> bool:
        """Whether rows are unevenly spaced across a page boundary on the host."""
        return self.layout in PAGED_LAYOUTS

    @property
    def as_a_whole(self) -> bool:
        """Whether some indices must be written together, in order, whatever the layout."""
        return self.record_slots > 1 or self.index_step > 1

    def slots_of(self, indices: Any) -> Any:
        """The slots that indices stand for, [n / index_step] of [n]; numpy arrays and tensors alike.

        By SGLang's ``maybe_dcp_kernel_indices`` (``layers/dcp/layout.py``), and by ``_to_page_indices`` of
        ``DeepSeekV4PagedHostPool``, whose page is the index divided by its tokens (0.5.23).
        """
        if self.index_step == 1:
            return indices
        return indices[self.index_offset :: self.index_step] // self.index_step

    @property
    def by_token(self) -> bool:
        """Whether every token that a forward computes gets bytes here."""
        return self.kv_kind != "state"

    @property
    def unit_slots(self) -> int:
        """Slots that are staged together, and whose rows are one block on the host: a page, or a token where
        rows are evenly spaced.
        """
        return self.page_size if self.paged else 1

    @property
    def unit_bytes(self) -> int:
        """Bytes of those slots: all layers, all components."""
        return self.unit_slots * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token moves: all layers, all components."""
        return self.layers * sum(part.row_bytes for part in self.components)
