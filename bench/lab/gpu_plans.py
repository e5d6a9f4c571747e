"""The named plans of :mod:`~.gpu_plan`: cells of whole servers, and what memory they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from .. import damaged
from ..serve import models, run
from ..serve.arms import CPU_PAGE, CPU_POOL_TOKENS, EXPERIMENTS, NONE, Cell, unserved

FA3 = ("--attention-backend", "fa3")
FA3_FLASHINFER = ("--prefill-attention-backend", "fa3", "--decode-attention-backend", "flashinfer")
GRAPHS = ("--cuda-graph-max-bs-decode", "32")
"""No workload has more requests in flight; the start is shorter."""

GIB = 2**30
_SGLANG_RESERVE = 10 * GIB
"""Host memory that SGLang leaves free (``HICACHE_HOST_MEMORY_RESERVE_BYTES`` of 0.5.23)."""
SERVER_BYTES = 5 * GIB
"""Host memory of a server without a host pool, about."""


@dataclass(frozen=True)
class PlannedCell:
    """A cell of a plan.

    Attributes:
        name: of the cell.
        arms, workloads, rounds, at_once, enough_s: see `run.ServeOptions`.
        model: a name of `models.NAMES`.
        page_size, layout, pool_tokens, ratio, tp, deterministic: see `Cell`.
        options: of every server.
    """

    name: str
    arms: Sequence[str]
    workloads: Sequence[str] = ("chat", "prefill")
    rounds: int = 2
    at_once: int = 8
    # ``direct`` with pages of 1 takes 30 s for a turn of chat, 100 for one of prefill: others 5.
    enough_s: float = 60
    model: str = models.HEAVY
    page_size: int = 64
    layout: str = "page_first"
    # Four host pools of a third of 128 GiB of host memory would not leave room for the servers themselves.
    pool_tokens: int = 49_152
    ratio: float = 3.0
    tp: int = 1
    deterministic: bool = False
    options: tuple[str, ...] = field(default=FA3 + GRAPHS)

    def cell(self, folder: Path) -> Cell:
        """The cell, its model written below ``folder``."""
        return Cell(
            self.name,
            models.make(self.model, folder),
            page_size=self.page_size,
            mem_layout=self.layout,
            pool_tokens=self.pool_tokens,
            ratio=self.ratio,
            tp=self.tp,
            deterministic=self.deterministic,
            more=self.options,
        )

    def rehearsal(self) -> PlannedCell:
        """The same step on the CPU engine: small, and without the arms that need CUDA."""
        return replace(
            self,
            arms=[arm for arm in self.arms if unserved(arm, cpu=True) is None],
            rounds=min(self.rounds, 2),
            model=models.TINY,
            page_size=self.page_size if self.page_size == 1 else CPU_PAGE,
            pool_tokens=CPU_POOL_TOKENS,
            tp=1,
            options=(),
        )


LIMIT = ("none", "kernel", "direct", "auto", "null")
OURS = ("fenced_kernel", "copy_engine", "hybrid")


def _by_page(name: str, pages: Sequence[int], step: PlannedCell) -> list[PlannedCell]:
    return [replace(step, name=f"{name}-page{page}", page_size=page) for page in pages]


_BYTES = PlannedCell(
    "",
    (NONE, "kernel", "auto", *OURS, damaged.NAME),
    ("chat",),
    rounds=1,
    pool_tokens=16_384,
    deterministic=True,
)
_SOON_UP = "--disable-prefill-cuda-graph"
"""With experts or states SGLang captures 58 graphs of prefills: 2 minutes for four servers at once (H200)."""
_INVARIANT = ("--moe-runner-backend", "triton", _SOON_UP)
"""The runner that SGLang takes for this model by itself rounds by the number of tokens in a batch."""
_FEW_STATES = ("--max-mamba-cache-size", "96", _SOON_UP)
"""Left to itself each server would fill the GPU with states, and the host with three times as many."""

PLANS: dict[str, list[PlannedCell]] = {
    "first": _by_page("kvheavy", (1, 64), PlannedCell("", LIMIT, rounds=3)),
    # The pool and the load of shared/gpu_servers; host memory for three host pools at a time.
    "as-by-hand": _by_page(
        "kvheavy",
        (1, 64),
        PlannedCell(
            "",
            ("none", "kernel", "auto", "null", "direct"),
            at_once=4,
            pool_tokens=65_536,
            workloads=("chat",),
        ),
    ),
    "workloads": _by_page(
        "kvheavy",
        (1, 64),
        PlannedCell("", ("none", "kernel", "auto", "null"), workloads=("shared", "decode")),
    ),
    "backends": _by_page(
        "kvheavy", (1, 64), PlannedCell("", ("kernel", *OURS), workloads=("chat", "prefill"))
    ),
    "layouts": [
        PlannedCell(f"kvheavy-{layout}-page{page}", arms, ("chat", "prefill"), page_size=page, layout=layout)
        for layout, arms in (
            ("layer_first", ("none", "kernel", "auto", "null")),
            ("page_first_direct", ("none", "direct", "auto", "null")),
        )
        for page in (1, 64)
    ],
    # Who should write layer_first: whatever the policy could choose there.
    "layer-first": _by_page(
        "kvheavy-layer_first",
        (64, 1),
        PlannedCell("", ("kernel", "auto", "copy_engine", "null"), layout="layer_first"),
    ),
    "attention": [
        PlannedCell(
            f"kvheavy-{name}-page{page}",
            ("none", "kernel", "auto", "null"),
            page_size=page,
            options=options + GRAPHS,
        )
        for name, options in (
            ("triton", ("--attention-backend", "triton")),
            ("flashinfer", ("--attention-backend", "flashinfer")),
            ("fa3-flashinfer", FA3_FLASHINFER),
        )
        for page in (1, 64)
    ],
    # 17 GB of weights each: two at once beside their pools on 80 GB.
    "qwen": _by_page(
        "qwen3-8b",
        (1, 64),
        PlannedCell("", ("kernel", "auto", "none", "null"), at_once=2, model="qwen3-8b", workloads=("chat",)),
    ),
    "mla": [
        *_by_page("mlaheavy", (1, 64), PlannedCell("", LIMIT, model=models.MLA)),
        # Experts as the original has: 31 GB of weights, of which 80 GB hold one beside a pool and graphs
        # (141 GB hold three: --at-once 3).
        *_by_page(
            "deepseek-v2-lite",
            (1, 64),
            PlannedCell("", ("none", "kernel", "auto", "null"), at_once=1, model="deepseek-v2-lite"),
        ),
    ],
    "swa": _by_page(
        "swaheavy",
        (64, 1),
        PlannedCell("", ("none", "kernel", "auto", "null"), model=models.SWA),
    ),
    # SGLang's own benchmark, which others know.
    "public": _by_page(
        "kvheavy-gsp",
        (1, 64),
        PlannedCell("", ("none", "kernel", "auto", "null"), workloads=("gsp", "gsp-turns")),
    ),
    # Which fences are needed on silicon: see the document on the FA3 crash. Turns of load for each arm, as
    # long as there is time; bench/lab/experiments.py adds up.
    "experiments": [
        PlannedCell(
            f"experiments-{name}-page{page}",
            tuple(EXPERIMENTS),
            ("chat",),
            rounds=1000,
            enough_s=inf,
            layout="layer_first",
            page_size=page,
            options=options + GRAPHS,
        )
        for name, options in (("fa3", FA3), ("fa3-flashinfer", FA3_FLASHINFER))
        for page in (64, 1)
    ],
    # The same with outputs that can be compared: a stale row is a wrong token there.
    "experiments-bytes": _by_page(
        "experiments-bytes",
        (1, 64),
        PlannedCell(
            "",
            (NONE, *EXPERIMENTS),
            ("chat",),
            rounds=1000,
            enough_s=inf,
            layout="layer_first",
            pool_tokens=16_384,
            deterministic=True,
        ),
    ),
    "tp2-bytes": [
        PlannedCell(
            f"bytes-tp2-{prefix}page{page}",
            (NONE, "auto", damaged.NAME),
            ("chat",),
            rounds=1,
            model=model,
            page_size=page,
            pool_tokens=16_384,
            tp=2,
            deterministic=True,
        )
        for model, prefix in ((models.HEAVY, ""), (models.MLA, "mla-"))
        for page in (64, 1)
    ],
    "tp2": _by_page("kvheavy-tp2", (1, 64), PlannedCell("", LIMIT, tp=2)),
    "bytes": [
        replace(
            _BYTES,
            name=f"bytes-{model}-{layout}-page{page}",
            model=model,
            page_size=page,
            layout=layout,
            options=_BYTES.options + more,
        )
        for model, layout, more in (
            (models.HEAVY, "page_first", ()),
            (models.MLA, "page_first", ()),
            (models.HEAVY, "layer_first", ()),
            (models.HEAVY, "page_first_direct", ()),
            (models.MLA, "layer_first", ()),
            (models.MLA, "page_first_direct", ()),
            (models.SWA, "page_first", _INVARIANT),
            (models.SWA, "layer_first", _INVARIANT),
            # SGLang's pool of states knows no layer_first.
            (models.MAMBA, "page_first", _FEW_STATES),
        )
        for page in (1, 64)
    ]
    # Device pools in memory that the driver maps in pieces.
    + [
        replace(
            _BYTES,
            name="bytes-kvheavy-memory-saver",
            options=(*_BYTES.options, "--enable-memory-saver"),
        )
    ],
    # SGLang serves it with pages of 64 and not deterministically; bench/lab/gpu_stress.py judges its answers.
    "dsa": [
        PlannedCell(
            "dsaheavy",
            ("none", "kernel", "auto", "null"),
            model=models.DSA,
            pool_tokens=32_768,
            options=GRAPHS,
        )
    ],
}
"""By name. A step's servers start together; each is loaded alone."""


def kv_bytes_per_token(config: Mapping[str, Any]) -> int:
    """Bytes of bfloat16 KV cache of one token, from a model's config.json."""
    layers = int(config["num_hidden_layers"])
    if config.get("kv_lora_rank"):
        return 2 * layers * (int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"]))
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    return 2 * 2 * layers * int(config.get("num_key_value_heads") or heads) * width


def host_bytes(step: PlannedCell, token_bytes: int) -> int:
    """Host memory that the servers of a step need at most, together."""
    most = 0
    for together in run.groups(step.arms, step.at_once):
        pools = sum(arm != NONE for arm in together)
        pool = int(step.pool_tokens * step.ratio * token_bytes)
        most = max(most, pools * pool + len(together) * SERVER_BYTES)
    return most + _SGLANG_RESERVE
