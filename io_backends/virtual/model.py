"""The cost model: how long things take on a virtual device, for timelines. A model, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from .operations import Operation

_BYTES_PER_MS = 1e6
"""In one GB/s."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Every constant, each with where it is from.

    What contention costs is left out: SM work neither slows other SM work nor waits for it, and copies do not
    slow forwards. So a model shows who waits for whom, and not what sharing the SMs or the HBM costs.

    Attributes:
        link_d2h_gb_per_s: GPU to host by copy engine. H200: about 55 (published by others; 55.2 measured
            here, bench/results/2026-11-23-h200).
        link_h2d_gb_per_s: host to GPU. No figure of its own was published; taken as the same.
        sm_link_gb_per_s: GPU to host by SM kernels. H100, nvbandwidth: 52.8.
        hbm_gb_per_s: device memory, bytes read and bytes written counted. H200: 4,172, measured here
            (bench/results/2026-11-23-h200).
        copy_us: of the host, for each copy of a batch. 0.6 (vLLM and LMCache; H200, CUDA 13.0).
        engine_copy_us: of the copy engine, for each copy. Nobody has published one: 0.
        call_us: of the host, for a launch or a batch of copies. 5 to 7 for a single ``cudaMemcpyAsync``.
        event_us: of the host, to record an event or to make a stream wait. An assumption.
        poll_us: of the host, to ask whether an event is complete. An assumption.
        decode_ms: a decode forward. 11, an SGLang user's GPU step (sgl-project/sglang#40363).
        extend_us_per_token: of a prefill forward. By arithmetic, Qwen3-8B on an H200 at half its peak:
            2 x 8.2e9 operations a token / (0.5 x 989e12 a second, NVIDIA's data sheet, dense bf16).
        bytes_scale: bytes that each byte of a virtual pool stands for: a small pool can be drawn as a large
        one.
    """

    link_d2h_gb_per_s: float = 55.0
    link_h2d_gb_per_s: float = 55.0
    sm_link_gb_per_s: float = 52.8
    hbm_gb_per_s: float = 4172.0
    copy_us: float = 0.6
    engine_copy_us: float = 0.0
    call_us: float = 5.0
    event_us: float = 0.5
    poll_us: float = 10.0
    decode_ms: float = 11.0
    extend_us_per_token: float = 33.0
    bytes_scale: float = 1.0

    def __post_init__(self) -> None:
        rates = ("link_d2h_gb_per_s", "link_h2d_gb_per_s", "sm_link_gb_per_s", "hbm_gb_per_s", "bytes_scale")
        for name in rates:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")

    def extend_ms(self, tokens: int) -> float:
        """A prefill forward of that many new tokens."""
        return tokens * self.extend_us_per_token / 1e3

    def host_ms(self, operation: Operation) -> float:
        """How long enqueuing it keeps the host."""
        copies = operation.copies if operation.engine.startswith("copy") else 0
        return (self.call_us + copies * self.copy_us) / 1e3

    def nbytes(self, operation: Operation) -> float:
        """What it moves, to scale."""
        return operation.nbytes * self.bytes_scale

    def device_ms(self, operation: Operation) -> float:
        """How long it runs, alone."""
        if operation.ms is not None:
            return operation.ms
        if operation.engine == "none":
            return 0.0
        nbytes = self.nbytes(operation)
        if operation.engine == "sm":
            # A row is read and written; over the link, the slower side counts.
            hbm = 2 * nbytes / (self.hbm_gb_per_s * _BYTES_PER_MS)
            link = nbytes / (self.sm_link_gb_per_s * _BYTES_PER_MS)
            return max(hbm, link) if operation.crosses_link else hbm
        rate = self.link_d2h_gb_per_s if operation.engine == "copy_d2h" else self.link_h2d_gb_per_s
        return max(nbytes / (rate * _BYTES_PER_MS), operation.copies * self.engine_copy_us / 1e3)
