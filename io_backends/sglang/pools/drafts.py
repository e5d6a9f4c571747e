"""The draft model's layers in the host pools of a server that decodes speculatively.

SGLang's own plan (``BaseSpecWorker.init_hicache_draft_plan``) says how a draft is held. The layers of a
multi-token-prediction head (NEXTN) lie behind the target's in the target's own host pools: packed. Another
model (EAGLE, EAGLE3, STANDALONE) has host pools of its own beside them, written with the target's indices:
a sidecar. A lookup (NGRAM), an adapter (UNO) or a head that reads the target's rows (FROZEN_KV_MTP) has none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

_LAYERS_OF_ITS_MODEL = frozenset({"InklingForConditionalGenerationMTP"})
"""Architectures whose model, not its configuration, says which layers a draft has (0.5.18 to 0.5.23)."""


class UnknownDraftError(Exception):
    """Which layers a draft has is not known without its model; the message says of what."""


def configs(server_args: Any, algorithm: Any, target: Any) -> list[tuple[Any, int | None]]:
    """The ``ModelConfig`` of each runner of the draft, and its place where a step has one each.

    As ``TpModelWorker`` makes them. Empty where no layer of a draft is in the first pipeline stage.

    Args:
        server_args: SGLang's, resolved.
        algorithm: SGLang's ``SpeculativeAlgorithm``.
        target: ``ModelConfig`` of the model that verifies.

    Raises:
        UnknownDraftError: only the draft's model itself could say it.
    """
    from sglang.srt import runtime_context
    from sglang.srt.configs.model_config import ModelConfig

    without_rows = [algorithm.is_none, algorithm.is_ngram, algorithm.is_frozen_kv_mtp]
    without_rows += [algorithm.is_uno] if hasattr(algorithm, "is_uno") else []
    if any(each() for each in without_rows) or runtime_context.get_parallel().pp_size > 1:
        return []
    if not (algorithm.is_eagle() or algorithm.is_standalone()):
        raise UnknownDraftError(f"{algorithm.name} decides which layers its draft keeps when it is loaded")
    spec = runtime_context.get_spec()
    config = ModelConfig.from_server_args(
        server_args,
        model_path=spec.speculative_draft_model_path,
        model_revision=spec.speculative_draft_model_revision,
        is_draft_model=True,
        context_length=target.context_len,
    )
    if _LAYERS_OF_ITS_MODEL.intersection(config.hf_config.architectures):
        raise UnknownDraftError(f"{config.hf_config.architectures[0]} decides its layers when it is loaded")
    if not spec.enable_multi_layer_eagle:
        return [(config, None)]
    return [(config, nth) for nth in range(spec.speculative_num_steps)]


def planned(algorithm: Any, target: Any, pools: Any, drafts: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """The parameters of a radix cache that say which device pools of a draft it is to hold, and how.

    Args:
        algorithm: SGLang's ``SpeculativeAlgorithm``.
        target: SGLang's ``KVCacheConfigurator`` of the model that verifies.
        pools: its device pools.
        drafts: of each runner, its ``ModelConfig`` and its device pools.
    """
    from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

    runner = SimpleNamespace(
        spec_algorithm=algorithm,
        kv_cache_configurator=target,
        req_to_token_pool=pools.req_to_token_pool,
        mtp_draft_device_pools=(),
        mtp_draft_mamba_pools=(),
    )
    worker = object.__new__(BaseSpecWorker)
    worker._target_worker = SimpleNamespace(model_runner=runner)
    of_draft = [
        SimpleNamespace(
            model_config=config,
            token_to_kv_pool=each.token_to_kv_pool,
            req_to_token_pool=each.req_to_token_pool,
        )
        for config, each in drafts
    ]
    worker._draft_worker = SimpleNamespace(draft_runners=of_draft) if of_draft else None
    worker.init_hicache_draft_plan()
    plan = worker.hicache_draft_plan
    return {
        "mtp_draft_device_pools": runner.mtp_draft_device_pools,
        "mtp_draft_mamba_pools": runner.mtp_draft_mamba_pools,
        "sidecar_draft_device_pools": plan.device_pools if plan.mode == "sidecar" else (),
    }


def add_sidecars(
    build: Callable[..., Any], server_args: Any, controller: Any, device_pools: tuple[Any, ...]
) -> None:
    """Build host pools of their own for ``device_pools``, and add them to the controller's group.

    Args:
        build: SGLang's ``build_hicache_draft_sidecars``.
        server_args: SGLang's, resolved.
        controller: whose group of host pools it is.
        device_pools: of the draft; there may be none.
    """
    if not device_pools:
        return
    cache = SimpleNamespace(cache_controller=controller)
    arguments = {"draft_device_pools": device_pools, "tree_cache": cache, "server_args": server_args}
    known = inspect.signature(build).parameters  # the arguments are among them up to 0.5.20
    _, entries = build(**{name: value for name, value in arguments.items() if name in known})
    for entry in entries:
        controller.mem_pool_host.add_entry(entry)
