"""Facts of a server: as SGLang resolved its arguments, and as a scheduler then runs.

The first are final only after SGLang's whole resolution. In every supported version steps behind
``handle_hicache`` still change what a decision rests on: speculative decoding (draft backend, overlap),
diffusion LLMs (attention backend, page size), models that force a backend (HRM-Text), pipeline parallelism
(overlap). In 0.5.18 defaults are not even written to the arguments before the end. The second are what the
model runner and the pools stand for once they exist; `differences` compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....policy.fact_spec import FactValue
from ....policy.fact_table import ATTENTION_FACTS, SERVER_FACTS
from ....policy.facts import Fact, Facts
from ....policy.names import NO_SPECULATION
from .. import versions
from ..pools.errors import UnsupportedPoolError
from ..pools.geometry import describe_pool
from .machine_facts import detect

RESOLVED = "resolved by SGLang"
RUNNING = "as this scheduler runs"

_NO_SPECULATION = Fact(None, "no speculative decoding")
_TARGET_DRAFTS = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE", "FROZEN_KV_MTP")
"""Algorithms whose draft runs the target's backends unless it is given its own (``DraftBackendFactory``)."""

_OWN_DRAFTS = ("DFLASH", "DSPARK")
"""Algorithms whose draft runs one backend of a short list, and flashinfer for any other
(``draft_worker_common.resolve_draft_worker_attention_backend``)."""

_COMPARED = tuple(name for name, spec in SERVER_FACTS.items() if spec.compared)
_WANTED = (*ATTENTION_FACTS, "gpu_arch")
"""Facts that must not have been unknown when they can be known: forwards are fenced by them."""


def resolved_facts(server_args: Any, machine: Facts | None = None) -> Facts:
    """Facts of the server that these arguments describe, once SGLang has resolved them.

    Args:
        server_args: SGLang's ``ServerArgs``, resolved.
        machine: facts about the machine; detected if not given.
    """
    config = versions.view(server_args)
    device = str(config.device).partition(":")[0]
    machine = machine or detect({"device": device})
    algorithm = str(config.speculative_algorithm or NO_SPECULATION)
    facts = {
        "kv_kind": "mla" if versions.arguments().uses_mla(server_args) else "mha",
        "mem_layout": config.hicache_mem_layout,
        "page_size": config.page_size,
        "write_policy": config.hicache_write_policy,
        "overlap": not config.disable_overlap_schedule,
        "speculative": algorithm,
        "tp": config.tp_size,
        "dp": config.dp_size
        if config.enable_dp_attention
        else config.dp_size * versions.attention_dp(config),
        "pp": config.pp_size,
        "device": device,
    }
    prefill, decode = _attention_backends(config)
    backends = {
        "prefill_attention_backend": Fact(prefill, RESOLVED),
        "decode_attention_backend": Fact(decode, RESOLVED),
        "verify_attention_backend": _verify(config, algorithm, prefill, decode),
        "draft_attention_backend": _draft(config, algorithm, prefill, decode),
    }
    return Facts(
        {
            **machine,
            **{name: Fact(value, RESOLVED) for name, value in facts.items()},
            **_kernels_inside(backends, server_args, machine.value("gpu_arch")),
            "row_bytes": _row_bytes(server_args, config),
            # HostKVCache's default, which no option changes (0.5.18 to 0.5.23).
            "pinned_memory": Fact(device == "cuda", "SGLang pins its host pools on CUDA, and only there"),
        }
    )


def running_facts(scheduler: Any) -> Facts:
    """What a scheduler runs, read off its model runners and pools; unknown where they do not say.

    To be called when the scheduler is built and its device is the current one.
    """
    config = versions.view(scheduler.server_args)
    device = str(config.device).partition(":")[0]
    machine = detect({"device": device})
    runner = scheduler.tp_worker.model_runner
    prefill, decode = runner.prefill_attention_backend_str, runner.decode_attention_backend_str
    spec = getattr(scheduler, "spec_algorithm", None)
    algorithm = NO_SPECULATION if spec is None or spec.is_none() else str(config.speculative_algorithm)
    draft = _draft_runner(getattr(scheduler, "draft_worker", None))
    backends = {
        "prefill_attention_backend": Fact(prefill, RUNNING),
        "decode_attention_backend": Fact(decode, RUNNING),
        "verify_attention_backend": _verify(config, algorithm, prefill, decode, source=RUNNING),
        "draft_attention_backend": (
            Fact(draft.decode_attention_backend_str, RUNNING)
            if draft is not None and algorithm != NO_SPECULATION
            else _NO_SPECULATION
        ),
    }
    facts: dict[str, FactValue] = {
        "page_size": scheduler.page_size,
        "overlap": bool(scheduler.enable_overlap),
        "speculative": algorithm,
        "device": device,
        **_pool_facts(scheduler),
    }
    return Facts(
        {
            **machine,
            **{name: Fact(value, RUNNING) for name, value in facts.items()},
            **_kernels_inside(backends, scheduler.server_args, machine.value("gpu_arch")),
        }
    )


def differences(decided: Facts, running: Facts) -> list[str]:
    """Where what runs is not what was decided on, one sentence each.

    A fact that was unknown to the decision is a difference only if forwards are fenced by it; one that is
    unknown here is none. ``row_bytes`` is not compared: only speed rests on it.
    """
    found = []
    for name in _COMPARED:
        before, now = decided.value(name), running.value(name)
        if now is None or now == before or (before is None and name not in _WANTED):
            continue
        source = running[name].source
        found.append(f"{name} is {running[name]} ({source}), and the decision was made for {decided[name]}")
    return found


def _attention_backends(config: Any) -> tuple[str | None, str | None]:
    from sglang.srt.arg_groups.overrides import attention_backends_of

    prefill, decode = attention_backends_of(config)
    return prefill, decode


def _verify(
    config: Any, algorithm: str, prefill: str | None, decode: str | None, source: str = RESOLVED
) -> Fact:
    """The backend of target-verify, by the rule of ``HybridAttnBackend._select_backend``."""
    if algorithm == NO_SPECULATION:
        return _NO_SPECULATION
    by_decode = prefill == decode or config.speculative_attention_mode == "decode"
    return Fact(decode if by_decode else prefill, source)


def _draft(config: Any, algorithm: str, prefill: str | None, decode: str | None) -> Fact:
    """The backend of the draft's decode steps. What else a draft runs is the target's prefill backend."""
    explicit = config.speculative_draft_attention_backend
    if algorithm == NO_SPECULATION:
        return _NO_SPECULATION
    if algorithm in _TARGET_DRAFTS:
        return Fact(explicit or decode, RESOLVED)
    if algorithm in _OWN_DRAFTS:
        backend = explicit or prefill
        return Fact(backend if backend in versions.current().own_draft_backends() else "flashinfer", RESOLVED)
    return Fact(None, f"{algorithm} has no draft model that SGLang gives a backend")


def _draft_runner(worker: Any) -> Any:
    """The model runner of a speculative worker's draft model; None if it has none."""
    for owner in (worker, getattr(worker, "_draft_worker", None)):
        for name in ("draft_model_runner", "draft_runner"):
            runner = getattr(owner, name, None)
            if runner is not None:
                return runner
    return None


def _kernels_inside(backends: Mapping[str, Fact], server_args: Any, arch: FactValue) -> dict[str, Fact]:
    """The backends, except that one which runs FlashAttention-3 inside is called fa3: rules mean kernels.

    ``dsa`` chooses its kernels by options of its own; decode, verification and draft extension take the
    decode one, and on sm90 short prefills take FA3 whatever they say (``set_dsa_prefill_impl``). A vision
    encoder runs inside prefill, by default with fa3 on sm90 (``_determine_attention_backend``).
    """
    config = versions.view(server_args)
    found = dict(backends)
    hopper = arch == "sm90"
    for name, fact in backends.items():
        if fact.value not in ("dsa", "nsa"):
            continue
        if name == "prefill_attention_backend":
            if hopper or config.dsa_prefill_backend == "fa3":
                found[name] = Fact("fa3", f"{fact.value} runs FA3 kernels in prefill on this GPU")
        elif config.dsa_decode_backend == "fa3":
            found[name] = Fact("fa3", f"{fact.value} runs FA3 kernels here (dsa_decode_backend)")
    encoder = config.mm_attention_backend or ("fa3" if hopper else None)
    prefill = found["prefill_attention_backend"]
    if (
        encoder == "fa3"
        and prefill.value != "fa3"
        and versions.arguments().model_config(server_args).is_multimodal
    ):
        found["prefill_attention_backend"] = Fact(
            "fa3", f"its vision encoder runs fa3 inside prefill; the language model runs {prefill}"
        )
    return found


_ELEMENT_BYTES = {"bf16": 2, "bfloat16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Of ``--kv-cache-dtype``, where rows are plain elements: MXFP8 and FP4 have scales (0.5.18 to 0.5.23)."""


def _row_bytes(server_args: Any, config: Any) -> Fact:
    """Bytes of one token's K in one layer on one rank, [heads, head_dim], for plain MHA pools.

    As SGLang sizes them (``MHATokenToKVPool``): heads over attention-TP ranks, at least one.
    """
    asked = config.kv_cache_dtype
    if versions.arguments().uses_mla(server_args) or asked not in ("auto", *_ELEMENT_BYTES):
        return Fact(None, "SGLang decides it with the pool")
    model = versions.arguments().model_config(server_args)
    if asked == "auto" and _may_quantize_rows(model):
        return Fact(None, "the checkpoint asks for a KV cache of another dtype, or may do so")
    ranks = config.tp_size // versions.attention_dp(config) // (getattr(config, "attn_cp_size", 1) or 1)
    itemsize = _ELEMENT_BYTES.get(asked, model.dtype.itemsize)
    return Fact(model.get_num_kv_heads(ranks) * model.head_dim * itemsize, "SGLang's model configuration")


def _may_quantize_rows(model: Any) -> bool:
    """Whether ``auto`` may be FP8 by a checkpoint's own word (``configure_kv_cache_dtype`` of 0.5.23).

    Args:
        model: SGLang's ``ModelConfig``.
    """
    if model.quantization is None:
        return False
    places = (model.hf_config, getattr(model.hf_config, "text_config", None))
    names = ("quantization_config", "compression_config")
    said = (getattr(place, name, None) for place in places for name in names)
    found = next((each for each in said if isinstance(each, Mapping)), None)
    if found is None or model.quantization == "modelopt_mixed":  # a file beside config.json says it
        return "modelopt" in model.quantization
    return bool(found.get("kv_cache_quant_algo") or found.get("kv_cache_scheme"))


def _pool_facts(scheduler: Any) -> dict[str, FactValue]:
    """What the anchor's host pool is like (a draft's may be another kind); nothing if it is not described."""
    for owner in (scheduler.tree_cache, getattr(scheduler, "decode_offload_manager", None)):
        group = getattr(getattr(owner, "cache_controller", None), "mem_pool_host", None)
        entries = getattr(group, "entries", ())
        anchor = entries[0].host_pool if entries else group
        if anchor is not None:
            try:
                geometry = describe_pool(anchor)
            except UnsupportedPoolError:
                continue
            return {
                "kv_kind": geometry.kv_kind,
                "mem_layout": geometry.layout,
                "row_bytes": geometry.components[0].row_bytes,
            }
    return {}
