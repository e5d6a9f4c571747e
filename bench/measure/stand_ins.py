"""Stand-ins for a forward: what an SM copy, a gather or a DMA copy may slow down."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from .devices import Bench

KERNELS = ("cudnn", "flash")
"""Attention kernels: cuDNN's is persistent and uses TMA on Hopper and later, as FA3, FA4 and TRT-LLM's do;
torch's flash attention (FA2) stands for the others."""

DECODE_STEPS = "decode steps"

STEP_PASSES = 4
"""Of the memory-bound kernel in a step. They move 17 GB, as a step of an 8B model in bfloat16 reads 16."""


@dataclass(frozen=True)
class StandIn:
    """One kernel that is launched over and over.

    Attributes:
        name: what rows call it.
        full: whether it has thread blocks for every SM; else for about half of them.
        run: launches it once on the current stream.
        ids: a launch is a step of a scheduler, which waits for the token ids of one while the next one runs.
    """

    name: str
    full: bool
    run: Callable[[], Any]
    ids: bool = False


def stand_ins(device: Bench) -> Iterator[StandIn]:
    """Matrix product, attention and a memory-bound kernel, with all SMs busy and with half of them; and steps
    of decoding."""
    import torch

    def random(*shape: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.randn(*shape, dtype=dtype, device=device.where)

    if device.where == "cpu":
        # Small: they only show that the code runs.
        half, size, batch, length, elements = 1, 128, 1, 128, 2**16
    else:
        half = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count // 2
        size, batch, length, elements = 8192, 4, 8192, 2**29
    a, b = random(size, size), random(size, size)
    yield StandIn("gemm", True, lambda: a @ b)
    # One output tile of 128 x 128 a thread block; operands shared by all, so that it stays within L2.
    few_a = random(1, 128, 8 * size).expand(half, -1, -1)
    few_b = random(1, 8 * size, 128).expand(half, -1, -1)
    yield StandIn("gemm, half", False, lambda: torch.bmm(few_a, few_b))
    yield from _attention(device, random, half, batch, length)
    big = random(elements, dtype=torch.float32)
    yield StandIn("memory", True, lambda: big.mul_(1.0000001))
    # torch's softmax takes one thread block a row.
    rows = big.view(-1)[: elements // 2 // half * half].view(half, -1)
    yield StandIn("memory, half", False, lambda: torch.softmax(rows, -1))

    def step() -> None:
        for _ in range(STEP_PASSES):
            big.mul_(1.0000001)

    yield StandIn(DECODE_STEPS, True, step, ids=True)


def launches(device: Bench, stand_in: StandIn, stream: Any, ms: float) -> int:
    """Launches of ``stand_in`` on ``stream`` that take about ``ms``, at least 3; 3 on a CPU."""
    per = 0.0
    for _ in range(2):  # the first round may compile, or choose kernels
        with device.use_stream(stream):
            begin = device.record(stream)
            for _ in range(3):
                stand_in.run()
            end = device.record(stream)
        end.synchronize()
        per = begin.elapsed_time(end) / 3
    return 3 if device.where == "cpu" else max(3, math.ceil(ms / per))


def _attention(
    device: Bench, random: Callable[..., Any], half: int, batch: int, length: int
) -> Iterator[StandIn]:
    import torch

    heads = 32 if device.where == "cuda" else 1
    q, k, v = (random(batch, heads, length, 128) for _ in range(3))
    # One block of 128 queries for each of half the SMs.
    short = random(1, half, 128, 128)
    long_k, long_v = (random(1, half, 2 * length, 128) for _ in range(2))
    product = torch.nn.functional.scaled_dot_product_attention
    for name, context in _contexts(device):

        def full(context: Callable[[], Any] = context) -> Any:
            with context():
                return product(q, k, v, is_causal=True)

        def few(context: Callable[[], Any] = context) -> Any:
            with context():
                return product(short, long_k, long_v)

        yield StandIn(f"attention {name}", True, full)
        yield StandIn(f"attention {name}, half", False, few)


def _contexts(device: Bench) -> list[tuple[str, Callable[[], Any]]]:
    """Names of attention kernels, and contexts that select them."""
    if device.where == "cpu":
        return [("torch", nullcontext)]
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return [(name, functools.partial(sdpa_kernel, backends[name])) for name in KERNELS]
