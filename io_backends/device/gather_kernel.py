"""The gather's Triton kernel: one source for the GPU and for Triton's interpreter (``TRITON_INTERPRET=1``).

Everything about a pool that decides the shape of the code is a compile-time constant; what changes from
chunk to chunk (addresses, strides, counts) is not specialised, so a pool compiles once.
"""

from __future__ import annotations

import triton
import triton.language as tl

RUNTIME_INTEGERS = (
    "base",
    "start",
    "tokens",
    "first_slot",
    "row_stride",
    "page_stride",
    "token_stride",
    "layer_stride",
    "piece_stride",
    "part_stride",
)
"""Arguments that vary without a recompile. All of them are int64: byte offsets pass 2 GiB in real pools."""


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=("table", "slots")
)
def gather_rows(  # type: ignore[no-untyped-def]
    table,
    slots,
    base: tl.int64,
    start: tl.int64,
    tokens: tl.int64,
    first_slot: tl.int64,
    row_stride: tl.int64,
    page_stride: tl.int64,
    token_stride: tl.int64,
    layer_stride: tl.int64,
    piece_stride: tl.int64,
    part_stride: tl.int64,
    PARTS: tl.constexpr,
    LAYERS: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE_BYTES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    INDEX_STEP: tl.constexpr,
    INDEX_OFFSET: tl.constexpr,
):
    """Copy device rows ``slots[start : start + tokens]`` to slots ``first_slot`` onwards of what ``base`` is.

    With an ``INDEX_STEP`` above 1 ``slots`` are so many times the indices: of each group the one at
    ``INDEX_OFFSET`` counts, divided by the step.

    A tile is ``BLOCK_TOKENS`` tokens of one layer, piece and segment (``BLOCK_UNITS`` accesses of ``WIDTH``
    bytes). Programs walk the tiles in a persistent loop, so any grid is right, also a grid of one.
    """
    # Triton has no 16-byte type: two int64 side by side become one 16-byte access.
    PER_UNIT: tl.constexpr = 2 if WIDTH == 16 else 1
    if WIDTH >= 8:
        dtype = tl.int64
    elif WIDTH == 4:
        dtype = tl.int32
    elif WIDTH == 2:
        dtype = tl.int16
    else:
        dtype = tl.int8
    BLOCK: tl.constexpr = BLOCK_UNITS * PER_UNIT
    ELEMENTS: tl.constexpr = PIECE_BYTES // WIDTH * PER_UNIT
    PER_BLOCK: tl.constexpr = PARTS * LAYERS * PIECES * SEGMENTS

    # Tile numbers fit 32 bits (the launcher checks); everything that becomes an address is 64 bits wide.
    tiles = (tl.cdiv(tokens, BLOCK_TOKENS) * PER_BLOCK).to(tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        segment = tile % SEGMENTS
        piece = tile // SEGMENTS % PIECES
        row = tile // (SEGMENTS * PIECES) % (PARTS * LAYERS)
        block = tile // PER_BLOCK

        token = block.to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        live = token < tokens
        if INDEX_STEP == 1:
            slot = tl.load(slots + start + token, mask=live, other=0).to(tl.int64)
        else:
            # Division truncates here and floors elsewhere: of a negative index, which nobody writes.
            index = (start + token) * INDEX_STEP + INDEX_OFFSET
            slot = tl.load(slots + index, mask=live, other=0).to(tl.int64) // INDEX_STEP
        source = tl.load(table + row) + piece.to(tl.int64) * PIECE_BYTES + slot * row_stride
        to = first_slot + token
        target = (
            base
            + (row // LAYERS).to(tl.int64) * part_stride
            + (row % LAYERS).to(tl.int64) * layer_stride
            + piece.to(tl.int64) * piece_stride
            + to // PAGE_SIZE * page_stride
            + to % PAGE_SIZE * token_stride
        )
        element = segment * BLOCK + tl.arange(0, BLOCK)
        # WIDTH divides every address (that is how it was chosen); the compiler cannot know.
        source_rows = tl.multiple_of(source.to(tl.pointer_type(dtype)), WIDTH)
        target_rows = tl.multiple_of(target.to(tl.pointer_type(dtype)), WIDTH)
        inside = live[:, None] & (element < ELEMENTS)[None, :]
        # Every byte is read once and written once. Unless both say so, they push out of L2 what the copy
        # engine needs beside them, and drains of short copies get slower (H200; one hint alone did nothing).
        values = tl.load(source_rows[:, None] + element[None, :], mask=inside, eviction_policy="evict_first")
        tl.store(target_rows[:, None] + element[None, :], values, mask=inside, cache_modifier=".cs")
