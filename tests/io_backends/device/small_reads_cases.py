"""The kernel of small reads in Triton's interpreter, on ordinary memory. Run by test_small_reads.py."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sglang_hicache.io_backends.device.small_reads import MOST_BYTES, WORD, KernelReads

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_small_reads.py"

GUARD = 64


def reads_into(memory: torch.Tensor) -> KernelReads:
    inside = memory[GUARD : GUARD + MOST_BYTES]
    return KernelReads(torch, torch.device("cpu"), inside, inside.data_ptr())


@given(
    dtype=st.sampled_from([torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.bool]),
    shape=st.lists(st.integers(1, 9), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_every_tensor_that_is_served_arrives_as_it_is(
    dtype: torch.dtype, shape: list[int], seed: int
) -> None:
    memory = torch.full((MOST_BYTES + 2 * GUARD,), 0xA5, dtype=torch.uint8)
    reads = reads_into(memory)
    values = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.manual_seed(seed)).to(
        torch.uint8
    )
    values = (values & 1 if dtype is torch.bool else values).view(dtype).reshape(shape)
    nbytes = values.numel() * values.element_size()
    assert reads.serves(values) == (nbytes % WORD == 0)
    if not reads.serves(values):
        return
    read = reads.read(values)
    assert (read.dtype, read.shape) == (values.dtype, values.shape)
    assert read.reshape(-1).view(torch.uint8).tolist() == values.reshape(-1).view(torch.uint8).tolist()
    # Nothing around it, and nothing that the next read changes.
    assert set(memory[:GUARD].tolist() + memory[GUARD + nbytes :].tolist()) == {0xA5}
    before = read.clone()
    reads.read(torch.zeros(MOST_BYTES // 8, dtype=torch.int64))
    assert torch.equal(read.reshape(-1).view(torch.uint8), before.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("words", [1, 1023, 1024, 1025, MOST_BYTES // WORD])
def test_any_number_of_words(words: int) -> None:
    reads = reads_into(torch.zeros(MOST_BYTES + 2 * GUARD, dtype=torch.uint8))
    values = torch.arange(1, words + 1, dtype=torch.int32)
    assert torch.equal(reads.read(values), values)
    assert torch.equal(reads.read(-values), -values)  # by the kernel as compiled


def test_what_is_not_served() -> None:
    reads = reads_into(torch.zeros(MOST_BYTES + 2 * GUARD, dtype=torch.uint8))
    bytes_ = torch.zeros(16, dtype=torch.uint8)
    for values in (
        torch.zeros(0, dtype=torch.int32),
        torch.zeros(MOST_BYTES // 4 + 1, dtype=torch.int32),
        torch.zeros(8, dtype=torch.int32)[::2],
        torch.zeros(4, 4, dtype=torch.int32).t(),
        bytes_[:3],
        bytes_[1:5],
        torch.zeros(4, dtype=torch.complex64).conj(),
        torch._neg_view(torch.ones(4, dtype=torch.int32)),
        torch.ones(4, requires_grad=True),
        torch.nn.Parameter(torch.ones(4)),
        torch.eye(4).to_sparse(),
        torch.eye(4).to_sparse_csr(),
        torch.zeros(4, device="meta"),
        FakeTensorMode().from_tensor(torch.zeros(4)),
    ):
        assert not reads.serves(values), values
    with torch.no_grad():
        assert reads.serves(torch.ones(4, requires_grad=True))
    with torch.inference_mode():
        values = torch.arange(4)
        assert reads.serves(values)
        assert torch.equal(reads.read(values), values)
    assert reads.serves(bytes_[4:8])
