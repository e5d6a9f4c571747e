"""One step of each backend by a cost model, on SGLang's own cache: what `hicache-io race --plot` draws."""

from __future__ import annotations

from dataclasses import replace

from ...io_backends.policy_files import policy_in_force
from ...io_backends.registry import BACKENDS, OWN_NAMES
from ...io_backends.virtual.model import CostModel
from ...io_backends.virtual.timeline import ModelOrder, Timeline
from ...policy.decide import decide
from ...policy.facts import Facts
from .kept_fences import KeptFences
from .simulation import setups
from .simulation.batches import Options
from .simulation.cache import Cache
from .simulation.experiment import Experiment, left_out
from .simulation.workload import Action, NewRequest, RunRounds

TOKEN_BYTES = 147_456
"""KV of one token: Qwen3-8B, bf16, 36 layers, 8 KV heads of 128 (the model of bench/results/2026-11-23-h200).
"""

PROMPT_TOKENS = 2048
"""What the modelled prompt stands for."""

LAYERS = 36
"""Of that model."""


def timelines(facts: Facts) -> dict[str, Timeline]:
    """A prefill, its write-back, and decodes beside it, for each of this project's backends that serve the
    layout; forwards wait as the policy says, and for ``fenced_kernel`` all of them.

    The simulation has few small rows: each stands for as many bytes, tokens and layers as makes its prompt
    one of :data:`PROMPT_TOKENS`.
    """
    cache = Cache(setups.setup_of(facts, "kernel"))
    unit = max(cache.setup.page_size, 4)
    prompt = 8 * unit
    tokens = PROMPT_TOKENS / prompt
    scale = tokens * TOKEN_BYTES / sum(pool.size_per_token for pool in cache.host_pools)
    real = CostModel()
    model = replace(
        real,
        link_d2h_gb_per_s=real.link_d2h_gb_per_s / scale,
        link_h2d_gb_per_s=real.link_h2d_gb_per_s / scale,
        sm_link_gb_per_s=real.sm_link_gb_per_s / scale,
        hbm_gb_per_s=real.hbm_gb_per_s / scale,
        copy_us=real.copy_us * _copies_of_one(cache, tokens),
    )

    def forward_ms(kind: str, computed: int) -> float:
        return real.decode_ms if kind == "decode" else real.extend_ms(int(computed * tokens))

    exclusive = setups.exclusive_forwards(facts)
    options = Options(0, False, frozenset(exclusive), forward_ms)
    program: list[Action] = [NewRequest(0, 0, prompt, 4), RunRounds(2)]
    runs = {}
    for name in OWN_NAMES:
        if BACKENDS[name].cannot_serve(cache.setup.mem_layout, cache.setup.kv_kind) is None:
            order = ModelOrder(model)
            decision = decide(policy_in_force(None), facts, backend=name)
            # As a server starts: a ring for its step's rows, not the simulation's small one.
            Experiment(cache, decision, exclusive).run(
                0,
                left_out(KeptFences.auto),
                program,
                order=order,
                options=options,
                mutate=lambda active: active.writeback.start(prompt),
            )
            runs[name] = order.timeline
    return runs


def _copies_of_one(cache: Cache, tokens: float) -> float:
    """Copies of the model for one of the simulation."""
    layers = LAYERS / cache.setup.layers
    return {"layer_first": layers, "page_first": tokens, "page_first_direct": layers}[cache.setup.mem_layout]
