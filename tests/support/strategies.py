"""Random pools and index vectors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from pools import MemoryPool, make_pool

LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")


@st.composite
def pools(draw: st.DrawFn, layouts: tuple[str, ...] = LAYOUTS) -> MemoryPool:
    heads = draw(st.integers(1, 4))
    row = heads * draw(st.sampled_from([1, 2, 8, 24]))
    kinds = draw(st.sampled_from(["mha", "mla", "wide_k", "states"]))
    rows = {"mha": (row, row), "mla": (row,), "wide_k": (2 * row, row), "states": (4 * row, row, row)}[kinds]
    return make_pool(
        draw(st.sampled_from(layouts)),
        layers=draw(st.integers(1, 4)),
        page_size=draw(st.sampled_from([1, 2, 3, 16, 64, 128])),
        row_bytes=rows,
        heads=heads,
        pages=draw(st.integers(1, 5)),
        device_slots=draw(st.integers(1, 96)),
        padding=draw(st.sampled_from([0, 0, 8])),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def stepped_pools(draw: st.DrawFn, layouts: tuple[str, ...] = LAYOUTS) -> MemoryPool:
    """As :func:`pools`, or with several indices for each slot (:func:`~pools.indices_of`)."""
    pool = draw(pools(layouts))
    step = draw(st.sampled_from([1, 1, 2, 3, 8]))
    offset = draw(st.integers(0, step - 1))
    return replace(pool, geometry=replace(pool.geometry, index_step=step, index_offset=offset))


@st.composite
def writes(draw: st.DrawFn, pool: MemoryPool) -> tuple[np.ndarray, np.ndarray]:
    """(host slots, device slots): whole pages or any tokens, in order or shuffled, also one or none."""
    g = pool.geometry
    n_max = min(g.host_slots, g.device_slots)
    shape = draw(st.sampled_from(["pages", "run", "scattered", "one", "none"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    if shape == "none" or n_max == 0:
        host = np.empty(0, dtype=np.int64)
    elif shape == "one":
        host = rng.integers(0, g.host_slots, 1)
    elif shape == "run":
        n = draw(st.integers(1, n_max))
        first = draw(st.integers(0, g.host_slots - n))
        host = np.arange(first, first + n)
    elif shape == "pages":
        count = min(g.host_slots, n_max) // g.page_size
        pages = rng.permutation(g.host_slots // g.page_size)[: draw(st.integers(0, count))]
        if draw(st.booleans()):
            pages = np.sort(pages)
        host = (pages[:, None] * g.page_size + np.arange(g.page_size)).reshape(-1)
        # A partial last page.
        host = host[: len(host) - draw(st.integers(0, max(0, g.page_size - 1)))]
    else:
        host = rng.permutation(g.host_slots)[: draw(st.integers(1, n_max))]
    n = len(host)
    if draw(st.booleans()):
        first = draw(st.integers(0, g.device_slots - n))
        device = np.arange(first, first + n)
    else:
        device = rng.permutation(g.device_slots)[:n]
    return host.astype(np.int64), device.astype(np.int64)


@st.composite
def whole_writes(draw: st.DrawFn, pool: MemoryPool) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`writes`; whole pages in a paged layout, in order or shuffled, also one or none."""
    g = pool.geometry
    if not g.paged:
        return draw(writes(pool))
    most = min(g.host_slots, g.device_slots) // g.page_size
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    pages = rng.permutation(g.host_slots // g.page_size)[: draw(st.integers(0, most))]
    if draw(st.booleans()):
        pages = np.sort(pages)
    host = (pages[:, None] * g.page_size + np.arange(g.page_size)).reshape(-1)
    return host.astype(np.int64), rng.permutation(g.device_slots)[: len(host)].astype(np.int64)
