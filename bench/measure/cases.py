"""What is written back: the geometry of named models, and one write of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ...io_backends.plan.copies import Slots
from ...io_backends.plan.geometry import Component, PoolGeometry, host_strides
from ...io_backends.plan.staged_write import copies_to_drain


@dataclass(frozen=True, slots=True)
class KvShape:
    """KV rows of a model on one GPU; ``components``: bytes of a layer's row, of K and V or the latent."""

    name: str
    kv_kind: str
    layers: int
    heads: int
    components: tuple[int, ...]

    @property
    def bytes_per_token(self) -> int:
        return self.layers * sum(self.components)


# Layers, KV heads and head size of the models' published configurations; bf16.
MODELS = {
    model.name: model
    for model in (
        KvShape("Qwen3-8B", "mha", 36, 8, (8 * 128 * 2, 8 * 128 * 2)),
        KvShape("Llama-3-70B-TP8", "mha", 80, 1, (128 * 2, 128 * 2)),
        KvShape("DeepSeek-V3", "mla", 61, 1, ((512 + 64) * 2,)),
    )
}
LAYOUTS = ("page_first", "layer_first", "page_first_direct")
"""``page_head`` is left out: ``hybrid`` alone serves it, so that there is nothing to choose."""

PAGE_SIZES = (1, 16, 64, 128)


@dataclass(frozen=True, slots=True)
class Case:
    """One write.

    Attributes:
        model: a name in :data:`MODELS`.
        layout: of the host pool.
        page_size: tokens a page.
        tokens: rows written in each layer; a multiple of ``page_size``.
        fragmented: host and device pages are shuffled, each on its own; else both are contiguous.
        attention: SGLang's name of the attention backend whose forwards run beside it; the policy's fences
            depend on it.
    """

    model: str
    layout: str
    page_size: int
    tokens: int
    fragmented: bool
    attention: str = "triton"

    def __str__(self) -> str:
        shape = "fragmented" if self.fragmented else "contiguous"
        return (
            f"{self.model} {self.layout} page {self.page_size} {self.tokens} tokens {shape} {self.attention}"
        )

    @property
    def nbytes(self) -> int:
        return self.tokens * MODELS[self.model].bytes_per_token

    @property
    def pool_slots(self) -> int:
        """Slots of the pools it is measured in: an eighth more than it writes, and a page."""
        pages = -(-self.tokens * 9 // (8 * self.page_size)) + 1
        if self.layout == "page_first_direct":
            # SGLang 0.5.23 cannot build MLA's pool in this layout with fewer pages than layers.
            pages = max(pages, MODELS[self.model].layers)
        return pages * self.page_size


def grid(
    models: Sequence[str],
    layouts: Sequence[str],
    page_sizes: Sequence[int],
    tokens: Sequence[int],
    contiguity: Iterable[bool],
    attention: Sequence[str],
) -> Iterator[Case]:
    """Every combination, in the order given, the last one fastest; writes shorter than a page are left out.

    Args:
        contiguity: whether fragmented, as :attr:`Case.fragmented`.
    """
    for count, model, layout, page, fragmented, backend in product(
        tokens, models, layouts, page_sizes, tuple(contiguity), attention
    ):
        if count >= page:
            yield Case(model, layout, page, count // page * page, fragmented, backend)


def slots_of(case: Case, seed: int = 0) -> tuple[Slots, Slots]:
    """(host, device) slots of a case, int64 [tokens]: whole pages, in order or shuffled independently."""
    pages, total = case.tokens // case.page_size, case.pool_slots // case.page_size
    rng = np.random.default_rng(seed)

    def some() -> Slots:
        picked = rng.permutation(total)[:pages] if case.fragmented else np.arange(pages)
        slots = picked[:, None] * case.page_size + np.arange(case.page_size)
        return slots.reshape(-1).astype(np.int64)

    return some(), some()


def pool_of(case: Case) -> PoolGeometry:
    """The case's pool at addresses that nobody reads."""
    model, slots = MODELS[case.model], case.pool_slots
    parts = []
    for index, row in enumerate(model.components):
        base = (1 << 44) + sum(model.components[:index]) * model.layers * slots
        strides = host_strides(
            case.layout,
            base=base,
            layers=model.layers,
            page_size=case.page_size,
            slots=slots,
            row_bytes=row,
            heads=model.heads,
        )
        rows = tuple((base << 1) + layer * slots * row for layer in range(model.layers))
        parts.append(Component("kv"[index], row, rows, row, strides))
    return PoolGeometry(
        label="kv",
        kv_kind=model.kv_kind,
        layout=case.layout,
        dtype="bfloat16",
        heads=model.heads,
        layers=model.layers,
        page_size=case.page_size,
        host_slots=slots,
        device_slots=slots,
        components=tuple(parts),
    )


def entry_bytes(case: Case) -> int:
    """Bytes of the case's write by the copies that drain it from staging."""
    host, _ = slots_of(case)
    return case.nbytes // copies_to_drain(pool_of(case), host)
