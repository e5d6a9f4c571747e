"""The host pools that a command line would have: SGLang's own code builds them, small and on the CPU.

``KVCacheConfigurator`` builds the device pools of a model's configuration, the strategies of
``hybrid_pool_assembler`` the host pools beside them, as in a scheduler; only the model, its weights, the GPU
and the controller that would move anything are left out. For a process of its own: it publishes arguments,
and changes what SGLang's modules hold.
"""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

from . import drafts
from .first_rank import first_rank
from .host_pools import HostPool, host_pools

REQUESTS = 2
STATES = 8
"""Slots of the small pools: what they hold of each is the same in a large one."""

_TOKENS = 256
_GROWTH = 10
"""Times that the number of tokens is doubled until SGLang takes it: sliding windows must fit."""


class UnknownPoolsError(Exception):
    """SGLang does not build the pools of this command line here; the message says why."""


def predicted(server_args: Any) -> tuple[HostPool, ...]:
    """The host pools of a server with these arguments, resolved; of its first pipeline stage and first rank.

    The layers of a draft are among them: see :mod:`.drafts`.

    Raises:
        UnknownPoolsError: SGLang refuses, or cannot do it here.
        ShortHostRowsError: a pool cannot hold what it is for.
    """
    try:
        entries, window, cache = _built(server_args)
    except (Exception, SystemExit) as error:
        text = (str(error).splitlines() or [""])[0]
        raise UnknownPoolsError(text or type(error).__name__) from error
    return host_pools(entries, window, cache)


def _built(server_args: Any) -> tuple[list[tuple[str, Any, Any]], int | None, Any]:
    _publish(server_args)
    with first_rank(server_args):
        return _built_here(server_args)


def _built_here(server_args: Any) -> tuple[list[tuple[str, Any, Any]], int | None, Any]:
    from sglang.srt import runtime_context
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler as assembler
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

    algorithm = _algorithm()
    configurator = _configurator(server_args, algorithm, ModelConfig.from_server_args(server_args))
    page = runtime_context.get_schedule().page_size
    _without_warm_up()
    config, pools = _device_pools(configurator, page)
    allocator, device_pool = pools.token_to_kv_pool_allocator, pools.token_to_kv_pool
    components = {ComponentType.FULL}
    if configurator.is_hybrid_swa and getattr(device_pool, "needs_paged_swa_allocator", True):
        components.add(ComponentType.SWA)
    if configurator.mambaish_config is not None:
        components.add(ComponentType.MAMBA)
    of_draft = []
    for draft, nth in drafts.configs(server_args, algorithm, configurator.model_config):
        runner = _configurator(server_args, algorithm, draft, nth, pools, config)
        of_draft.append((draft, _of_sizes(runner, config, pools)))
    plan = drafts.planned(algorithm, configurator, pools, of_draft)
    nothing: dict[str, Any] = dict.fromkeys(
        ("tp_cache_group", "attn_cp_cache_group", "attn_tp_cache_group", "pp_cache_group")
    )
    page = allocator.page_size if runtime_context.get_parallel().dcp_enabled else page
    params = SimpleNamespace(
        page_size=page,
        token_to_kv_pool_allocator=allocator,
        req_to_token_pool=pools.req_to_token_pool,
        pp_size=runtime_context.get_parallel().pp_size,
        **nothing,
        **plan,
    )
    _without_transfers(assembler)
    result = assembler._select_strategy(device_pool, components).build(
        cache=SimpleNamespace(page_size=page, components=components),
        kvcache=device_pool,
        params=params,
        server_args=server_args,
        load_cache_event=None,
    )
    drafts.add_sidecars(
        assembler.build_hicache_draft_sidecars,
        server_args,
        result.cache_controller,
        plan["sidecar_draft_device_pools"],
    )
    entries = [
        (_name(entry.name), entry.host_pool, entry.device_pool) for entry in result.host_pool_group.entries
    ]
    return entries, configurator.sliding_window_size, device_pool


def _name(name: Any) -> str:
    return str(getattr(name, "value", name))


def _publish(server_args: Any) -> None:
    from sglang.srt import runtime_context

    ranks: dict[str, Any] = {}
    if hasattr(runtime_context, "SpawnRanks"):
        ranks["ranks"] = runtime_context.SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0)
    runtime_context.publish(server_args, role="scheduler", **ranks)
    changes: dict[str, Any] = {"max_running_requests": REQUESTS, "max_mamba_cache_size": STATES}
    # The small pools follow the ratio, and need none of the memory that is asked for.
    changes |= {"hicache_size": 0, "hicache_ratio": 2.0}
    # Its library must be preloaded, and says nothing of how large a pool is.
    changes["enable_memory_saver"] = False
    runtime_context.get_context().override("sglang-hicache-io", **changes)


def _algorithm() -> Any:
    from sglang.srt import runtime_context
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    return SpeculativeAlgorithm.from_string(runtime_context.get_spec().speculative_algorithm)


def _configurator(
    server_args: Any,
    algorithm: Any,
    config: Any,
    nth: int | None = None,
    target: Any = None,
    sizes: Any = None,
) -> Any:
    """Of the model that ``config`` is of; with the pools and sizes of a target, of its draft."""
    from sglang.srt import runtime_context
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.distributed.utils import get_pp_indices
    from sglang.srt.mem_cache import kv_cache_dtype
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.model_executor.model_runner_components import layer_setup, spec_aux_hidden_state

    parallel, spec = runtime_context.get_parallel(), runtime_context.get_spec()
    of_draft = target is not None
    model = SimpleNamespace()
    if parallel.pp_size > 1:
        start, end = get_pp_indices(config.num_hidden_layers, 0, parallel.pp_size)
        model = SimpleNamespace(start_layer=start, end_layer=end)
    asked = runtime_context.get_model().kv_cache_dtype
    resolved, dtype = kv_cache_dtype.configure_kv_cache_dtype(
        **_taken(
            kv_cache_dtype.configure_kv_cache_dtype,
            server_args_kv_cache_dtype=asked,
            model=SimpleNamespace(quant_config=_quantization(config)),
            model_dtype=config.dtype,
            is_draft_worker=of_draft,
            is_dflash=algorithm.is_dflash_family(),
            speculative_draft_attention_backend=spec.speculative_draft_attention_backend,
            speculative_draft_kv_cache_dtype=spec.speculative_draft_kv_cache_dtype,
        )
    )
    return KVCacheConfigurator(
        **_taken(
            KVCacheConfigurator,
            device="cpu",
            gpu_id=0,
            ps=parallel,
            attn_dp_size=parallel.attn_dp_size,
            pp_size=parallel.pp_size,
            pp_group=None,
            model=model,
            model_config=config,
            server_args=server_args,
            kv_cache_dtype=dtype,
            kv_cache_dtype_str=resolved or asked,
            model_dtype=config.dtype,
            page_size=runtime_context.get_schedule().page_size,
            sliding_window_size=getattr(config, "sliding_window_size", None),
            spec_algorithm=algorithm,
            is_draft_worker=of_draft,
            draft_model_idx=nth,
            post_capture_kv_active=False,
            spec_aux_config=spec_aux_hidden_state.SpecAuxHiddenStateConfig(),
            is_hybrid_swa=config.is_hybrid_swa,
            is_hybrid_swa_compress=config.is_hybrid_swa_compress,
            use_mla_backend=config.attention_arch == AttentionArch.MLA,
            layer_info=layer_setup.resolve_layer_indices(
                **_taken(
                    layer_setup.resolve_layer_indices,
                    model=model,
                    model_config=config,
                    is_draft_worker=of_draft,
                    draft_model_idx=nth,
                    spec_algorithm=algorithm,
                )
            ),
            forward_stream=None,
            req_to_token_pool=getattr(target, "req_to_token_pool", None),
            token_to_kv_pool_allocator=getattr(target, "token_to_kv_pool_allocator", None),
            memory_pool_config=sizes,
        )
    )


def _quantization(config: Any) -> Any:
    """What a checkpoint says of its weights and rows, as its model would keep it."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.weight_utils import get_quant_config

    return None if config.quantization is None else get_quant_config(config, LoadConfig(), {})


def _taken(function: Any, **values: Any) -> dict[str, Any]:
    """Those of ``values`` that this release's function has a parameter for."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in known}


def _device_pools(configurator: Any, page: int) -> tuple[Any, Any]:
    """Sizes, and pools of them."""
    from sglang.srt.model_executor.pool_configurator import create_memory_pool_configurator

    sizing = create_memory_pool_configurator(configurator)
    refused: ValueError | None = None
    for doubled in range(_GROWTH):
        tokens = max(4 * page, _TOKENS) << doubled
        try:
            config = sizing.calculate_pool_sizes_from_max_tokens(tokens, page)
            config.max_running_requests = REQUESTS
            config = sizing.finalize_with_max_running_requests(config)
            if getattr(config, "swa_max_total_num_tokens", None) == 0:
                raise ValueError("no token of a sliding window fits")
        except ValueError as error:
            refused = error
            continue
        return config, _of_sizes(configurator, config)
    assert refused is not None
    raise refused


def _of_sizes(configurator: Any, config: Any, target: Any = None) -> Any:
    """The device pools; a draft shares the slots of its target's."""
    return configurator._init_pools(
        sizes=configurator._derive_pool_sizes(config=config),
        req_to_token_pool=getattr(target, "req_to_token_pool", None),
        token_to_kv_pool_allocator=getattr(target, "token_to_kv_pool_allocator", None),
    )


def _without_warm_up() -> None:
    """No kernel that moves a draft's tokens is launched to be ready."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    setattr(MHATokenToKVPool, "_init_kv_copy_and_warmup", _not_ready)  # noqa: B010 (not ours)


def _not_ready(pool: Any) -> None:
    pool._kv_copy_config = None


def _without_transfers(assembler: Any) -> None:
    """Nothing is pinned, nothing is compiled, and nobody waits for writes."""
    from sglang.srt.mem_cache.pool_host import common

    # By the type of a device, and for some pools by the device itself.
    common.ALLOC_MEMORY_FUNCS.clear()
    common.ALLOC_MEMORY_FUNCS.default_factory = lambda: _allocate
    for name, module in list(sys.modules.items()):
        if name.startswith(_ASKING):
            for function in [each for each in vars(module) if _asks_for_a_kernel(each)]:
                if "write_back" in function:
                    _let_it_compile(vars(module)[function])
                else:
                    setattr(module, function, _no_kernel)
    assembler.HybridCacheController = _NoController


_ASKING = ("sglang.srt.mem_cache", "sglang.kernels.ops.kvcache")
"""Modules that ask for kernels, and where later ones import that from."""


def _asks_for_a_kernel(name: str) -> bool:
    return name.startswith("can_use_") and name.endswith("jit_kernel")


def _no_kernel(*_: Any, **__: Any) -> bool:
    return False


def _let_it_compile(asking: Any) -> None:
    """Whether there is a kernel is then SGLang's rule of sizes alone, as on a GPU whose compiler works.

    For write-back, without whose kernel some pools are refused.
    """
    where = sys.modules[asking.__module__]
    for name in [each for each in vars(where) if each.startswith("_jit_") and each.endswith("_module")]:
        setattr(where, name, _compiled)


def _compiled(*_: Any, **__: Any) -> None:
    """In place of what compiles a kernel and returns it."""


def _allocate(
    dims: tuple[int, ...], dtype: Any, device: str, pin_memory: bool, allocator: Any, **_: Any
) -> Any:
    return allocator.allocate(dims, dtype=dtype, device=device)


class _NoController:
    """In place of the controller that a strategy makes for the pools it built."""

    def __init__(self, _: Any, mem_pool_host: Any, page_size: int, *__: Any, **others: Any) -> None:
        self.layer_done_counter = None
        self.mem_pool_host = mem_pool_host
        self.page_size = page_size
        self.transfer_layer_id_max = others.get("transfer_layer_id_max")

    def set_mtp_draft_pools(self, _: Any) -> None:
        """Up to 0.5.18: those whose layers the host pool was built with."""

    @staticmethod
    def supports_page_envelope_host(storage_backend: str | None) -> bool:
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

        asked: bool = HybridCacheController.supports_page_envelope_host(storage_backend)
        return asked
