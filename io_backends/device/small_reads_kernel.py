"""The Triton kernel of :mod:`~.small_reads`, for the GPU and for Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("source", "target", "words"))  # type: ignore[untyped-decorator]
def copy_words(  # type: ignore[no-untyped-def]
    source: tl.int64, target: tl.int64, words: tl.int64, BLOCK: tl.constexpr
):
    """Copy ``words`` 4-byte words between two addresses, ``BLOCK`` of them a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < words
    values = tl.load(source.to(tl.pointer_type(tl.int32)) + at, mask=inside)
    tl.store(target.to(tl.pointer_type(tl.int32)) + at, values, mask=inside)
