"""Options and variables of the SGLang servers that the demo and the end-to-end tests start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..io_backends.sglang.no_gpu import fake_libcuda


@dataclass(frozen=True)
class HiCache:
    """SGLang's HiCache options for one server.

    Attributes:
        io_backend: `--hicache-io-backend`, one of SGLang's own or of this plug-in's.
        mem_layout: `--hicache-mem-layout`; None leaves SGLang's default.
        ratio: tokens in the host pool for each token in the device pool.
        write_policy: `write_through` writes every prompt back as soon as it is done.
    """

    io_backend: str
    mem_layout: str | None = None
    ratio: float = 8.0
    write_policy: str = "write_through"

    def args(self) -> list[str]:
        """The command line options."""
        layout = ["--hicache-mem-layout", self.mem_layout] if self.mem_layout else []
        return [
            *("--enable-hierarchical-cache", "--hicache-ratio", str(self.ratio)),
            *("--hicache-write-policy", self.write_policy, "--hicache-io-backend", self.io_backend),
            *layout,
        ]


def base_args(
    model: Path | str,
    *,
    cpu_engine: bool,
    page_size: int = 16,
    max_total_tokens: int = 4096,
    hicache: HiCache | None = None,
) -> list[str]:
    """Options of a server that takes and gives token ids.

    Args:
        model: folder or Hugging Face name of the model.
        cpu_engine: serve on SGLang's CPU engine; the environment must then come from `cpu_engine_env`.
        page_size: tokens a KV cache page.
        max_total_tokens: capacity of the device pool, in tokens. Small, so that prefixes get evicted.
        hicache: HiCache's options, or None for a server without HiCache.
    """
    args = [
        *("--model-path", str(model), "--skip-tokenizer-init", "--skip-server-warmup"),
        *("--page-size", str(page_size), "--max-total-tokens", str(max_total_tokens)),
    ]
    if cpu_engine:
        # float32: SGLang computes a prefix again in other pieces than it was computed in at first, and with
        # bfloat16 the rounding of that alone turns a near-tie now and then (2 of 42 answers, seen).
        args += ["--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"]
    return args + (hicache.args() if hicache else [])


def cpu_engine_env(cache: Path) -> dict[str, str]:
    """Variables of a server on SGLang's CPU engine, on a machine with or without an NVIDIA driver.

    Args:
        cache: folder for the stand-in for `libcuda.so.1`, if one is needed.

    Raises:
        NoCompilerError: the stand-in is needed and cannot be built.
    """
    return {
        "SGLANG_USE_CPU_ENGINE": "1",
        # No device is visible, so that a machine with a GPU behaves like one without.
        "CUDA_VISIBLE_DEVICES": "",
        # A tiny model gains nothing from more threads, and where other work keeps a core busy they spin at
        # every barrier: the demo's requests took 42 s instead of 3 s with two threads on two busy cores.
        "OMP_NUM_THREADS": "1",
        **fake_libcuda.environment(cache),
    }
