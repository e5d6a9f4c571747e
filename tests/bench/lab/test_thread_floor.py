import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_hicache.bench.lab.thread_floor import in_turns
from sglang_hicache.io_backends.plan.copies import CopyBatch

COPIES = st.lists(
    st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(1, 90)), min_size=1, max_size=9
)


@given(COPIES, st.integers(1, 200))
def test_every_byte_goes_where_it_went_and_turns_are_full(
    copies: list[tuple[int, int, int]], quantum: int
) -> None:
    dst, src, nbytes = (np.array(column, dtype=np.uint64) for column in zip(*copies, strict=True))
    cut, first = in_turns(CopyBatch(dst, src, nbytes), quantum)
    given_bytes, found_bytes = [
        [
            (int(to) + at, int(of) + at)
            for to, of, length in zip(batch.dst, batch.src, batch.nbytes, strict=True)
            for at in range(int(length))
        ]
        for batch in (CopyBatch(dst, src, nbytes), cut)
    ]
    assert found_bytes == given_bytes
    turns = [int(part.sum()) for part in np.split(cut.nbytes, first[1:].astype(int))]
    assert first[0] == 0
    assert all(turn == quantum for turn in turns[:-1])
    assert 0 < turns[-1] <= quantum
