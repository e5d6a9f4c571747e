"""Which SGLang versions are known, how each differs, and what of them this project relies on.

One :class:`Release` for each version: whoever needs to know how releases differ asks :func:`current` for the
difference by its name, and nobody else compares versions. What an object of SGLang's tells by itself (an
attribute that only newer pools have) is read off the object.

The hook points are checked against the published wheels of every supported version by
``tests/io_backends/sglang/test_hook_points.py``, and against the running SGLang each time one of this
project's backends is asked for: an SGLang that looks different is refused, never patched on a guess.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

_S = "sglang.srt."
SCHEDULER = _S + "managers.scheduler.Scheduler"
ENGINE = _S + "mem_cache.l2_transfer.L2TransferEngine"
CONTROLLER = _S + "managers.cache_controller.HiCacheController"
HYBRID_CONTROLLER = _S + "mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
HOST_POOL = _S + "mem_cache.pool_host.base.HostKVCache"
MHA_POOL = _S + "mem_cache.pool_host.mha.MHATokenToKVPoolHost"
MLA_POOL = _S + "mem_cache.pool_host.mla.MLATokenToKVPoolHost"
ADD_CLI_ARGS = _S + "server_args.ServerArgs.add_cli_args"
FROM_CLI_ARGS = _S + "server_args.ServerArgs.from_cli_args"
FLASHINFER = _S + "layers.attention.flashinfer_backend.FlashInferAttnBackend"
FLASHINFER_MLA = _S + "layers.attention.flashinfer_mla_backend.FlashInferMLAAttnBackend"


@dataclass(frozen=True, slots=True)
class HookPoint:
    """A function of SGLang's that this project wraps or calls.

    Attributes:
        target: dotted path.
        parameters: its leading parameters, by name; more may follow.
    """

    target: str
    parameters: tuple[str, ...]


_COPY = ("self", "device_pool", "host_indices", "device_indices", "io_backend")
_LOAD = ("self", "device_pool", "host_indices", "device_indices", "layer_id", "io_backend")

SCHEDULER_POINTS = (
    HookPoint(SCHEDULER + ".__init__", ("self", "server_args")),
    HookPoint(SCHEDULER + ".run_batch", ("self", "batch")),
    HookPoint(SCHEDULER + ".get_internal_state", ("self", "recv_req")),
    HookPoint(ENGINE + ".submit_device_to_host", ("self", "transfers")),
    HookPoint(CONTROLLER + ".reset", ("self",)),
    HookPoint(CONTROLLER + "._move_write_operation", ("self", "op")),
    HookPoint(HYBRID_CONTROLLER + "._move_write_operation", ("self", "op")),
)
"""Wrapped in a scheduler that runs one of this project's backends, and only there. Alike in all releases."""

PLANNER_POINTS = tuple(
    HookPoint(backend + ".init_forward_metadata", ("self", "forward_batch"))
    for backend in (FLASHINFER, FLASHINFER_MLA)
)
"""Wrapped beside those where they are there, in a server whose attention is flashinfer's: for speed, so that
no server is refused for want of them. Alike in all releases."""


class Arguments:
    """How arguments are resolved from 0.5.19 on: values are declared beside a record of what was given.

    Attributes:
        handle_hicache: resolves the HiCache options.
        resolve: resolves all of them, by steps of which that is one.
    """

    handle_hicache = HookPoint(_S + "arg_groups.hicache_hook.handle_hicache", ("server_args",))
    resolve = HookPoint(_S + "arg_groups.pipeline.run_resolution_pipeline", ("server_args",))

    def view(self, server_args: Any) -> Any:
        """An object whose attributes are the values as resolved so far."""
        from sglang.srt.arg_groups.overrides import resolving_view

        return resolving_view(server_args)

    def declare(self, server_args: Any, source: str, **fields: Any) -> None:
        """Set values, in the name of ``source``."""
        from sglang.srt.arg_groups.overrides import declare_resolution

        declare_resolution(server_args, source, **fields)

    def resolve_now(self, server_args: Any) -> None:
        """Resolve arguments that were made and not used yet."""
        server_args.resolve_once()

    def model_config(self, server_args: Any) -> Any:
        """SGLang's ``ModelConfig`` of the target model."""
        from sglang.srt.arg_groups.overrides import model_config_of

        return model_config_of(server_args)

    def uses_mla(self, server_args: Any) -> bool:
        """Whether the model's KV cache is MLA's."""
        from sglang.srt.arg_groups.overrides import use_mla_backend

        return bool(use_mla_backend(server_args))


class ArgumentsInPlace(Arguments):
    """How arguments are resolved in 0.5.18: by their constructor, in place."""

    handle_hicache = HookPoint(_S + "server_args.ServerArgs._handle_hicache", ("self",))
    resolve = HookPoint(_S + "server_args.ServerArgs._run_resolution_pipeline", ("self",))

    def view(self, server_args: Any) -> Any:
        return server_args

    def declare(self, server_args: Any, source: str, **fields: Any) -> None:
        for field, value in fields.items():
            setattr(server_args, field, value)

    def resolve_now(self, server_args: Any) -> None:
        pass

    def model_config(self, server_args: Any) -> Any:
        return server_args.get_model_config()

    def uses_mla(self, server_args: Any) -> bool:
        return bool(server_args.use_mla_backend())


_ARGUMENTS = Arguments()


@dataclass(frozen=True, slots=True)
class Release:
    """One published SGLang, by what differs between releases. The defaults are the newest one's.

    Attributes:
        version: its number.
        arguments: how it resolves a server's arguments.
        own_drafts: attention backends of a draft model with a worker of its own: their names, or where SGLang
            lists them.
        pool_copy: the method of host pools that ``submit_device_to_host`` calls.
        one_radix_cache: ``UnifiedRadixCache`` serves all models; ``hicache-io race`` simulates no other.
        host_memory_shared: a host pool is compared with its rank's part of what is free, not with all of it.
        host_memory_in_cgroups: limits of cgroups count for what is free.
        widths_of_groups: how large parallel groups are is known once there are groups, and not before.
        index_pools: host pools of pages and keys beside the rows, by class, whose copies are those of the
            release that ours were compared with on a GPU (0.5.23).
        index_steps: pools of which several indices stand for one row (DeepSeek-V4, context-parallel decode)
            are given to backends: only where that was compared with SGLang's own copies on a GPU, release by
            release (bench/results/2026-11-27-h200-index-steps).
        states_held: a state (Mamba, linear attention) that a write was given is not given away or written
            before SGLang takes the write as done. Before 0.5.22 a forward that verifies drafts may write a
            state that the cache holds: the request that handed it over still counts in the batch, and
            ``set_mamba_track_indices_from_reqs`` then names the first of its slots (docs/coverage.md).
        windows_held: so are rows of sliding layers. Before 0.5.20 a decode server of PD disaggregation
            releases locks without saying which it took, and so those of writes as well; of the trees in Rust
            of 0.5.20 and 0.5.21 it is not shown (docs/coverage.md).
    """

    version: str
    arguments: Arguments = _ARGUMENTS
    own_drafts: str | tuple[str, ...] = _S + "arg_groups.choices:DRAFT_ATTENTION_BACKEND_CHOICES"
    pool_copy: str = "backup_from_device_all_layer_physical"
    one_radix_cache: bool = True
    host_memory_shared: bool = True
    host_memory_in_cgroups: bool = True
    widths_of_groups: bool = False
    index_pools: frozenset[str] = frozenset(
        {"DSAIndexerPoolHost", "QSAIndexerPoolHost", "MHATokenToKOnlyPoolHost"}
    )
    index_steps: bool = True
    states_held: bool = True
    windows_held: bool = True

    @property
    def launcher_points(self) -> tuple[HookPoint, ...]:
        """Wrapped in every process that loads plug-ins."""
        return (
            HookPoint(ADD_CLI_ARGS, ("parser",)),
            HookPoint(FROM_CLI_ARGS, ("cls", "args")),
            self.arguments.handle_hicache,
            self.arguments.resolve,
        )

    @property
    def scheduler_points(self) -> tuple[HookPoint, ...]:
        """Wrapped or called in a scheduler that runs one of this project's backends."""
        return (
            *SCHEDULER_POINTS,
            HookPoint(CONTROLLER + ".move_indices", ("self", "host_indices", "device_indices")),
            HookPoint(f"{HOST_POOL}.{self.pool_copy}", _COPY),
            HookPoint(MHA_POOL + ".backup_from_device_all_layer", _COPY),
            HookPoint(MHA_POOL + ".load_to_device_per_layer", _LOAD),
            HookPoint(MLA_POOL + ".backup_from_device_all_layer", _COPY),
            HookPoint(MLA_POOL + ".load_to_device_per_layer", _LOAD),
        )

    @property
    def points(self) -> tuple[HookPoint, ...]:
        """All that this project relies on."""
        return self.launcher_points + self.scheduler_points

    def own_draft_backends(self) -> tuple[str, ...]:
        """Attention backends that ``own_drafts`` names."""
        if isinstance(self.own_drafts, tuple):
            return self.own_drafts
        return tuple(pkgutil.resolve_name(self.own_drafts))


_LOGICAL_COPY = "backup_from_device_all_layer"

RELEASES = (
    Release(
        "0.5.18",
        arguments=ArgumentsInPlace(),
        # _SUPPORTED_DRAFT_BACKENDS of its draft_worker_common, which only a scheduler can import.
        own_drafts=("flashinfer", "fa3", "fa4", "triton", "ascend", "trtllm_mha"),
        pool_copy=_LOGICAL_COPY,
        one_radix_cache=False,
        host_memory_shared=False,
        host_memory_in_cgroups=False,
        widths_of_groups=True,
        index_pools=frozenset(),
        index_steps=False,
        states_held=False,
        windows_held=False,
    ),
    Release(
        "0.5.19",
        own_drafts=_S + "server_args:DRAFT_ATTENTION_BACKEND_CHOICES",
        pool_copy=_LOGICAL_COPY,
        one_radix_cache=False,
        host_memory_in_cgroups=False,
        widths_of_groups=True,
        index_pools=frozenset(),
        index_steps=False,
        states_held=False,
        windows_held=False,
    ),
    Release(
        "0.5.20",
        pool_copy=_LOGICAL_COPY,
        one_radix_cache=False,
        host_memory_in_cgroups=False,
        widths_of_groups=True,
        index_pools=frozenset({"DSAIndexerPoolHost"}),
        index_steps=False,
        states_held=False,
        windows_held=False,
    ),
    Release("0.5.21", one_radix_cache=False, index_steps=False, states_held=False, windows_held=False),
    Release("0.5.22", index_steps=False),
    Release("0.5.23"),
)
"""Oldest first."""

SUPPORTED = tuple(release.version for release in RELEASES)
INSTALL = f"pip install sglang=={SUPPORTED[-1]}"
"""For who has no SGLang. This project is on no package index, so that no extra of it can be asked for."""
POOL_COPIES = frozenset(release.pool_copy for release in RELEASES)


def installed() -> str:
    """Version of the SGLang that this process imports.

    Raises:
        ImportError: there is none.
    """
    from sglang.version import __version__

    return str(__version__)


def release_of(version: str) -> Release:
    """The release of that number, whatever is behind it (``0.5.23+cu130``).

    One that is not known is looked at as the newest one is; nothing of it is wrapped (:func:`problem_with`).
    """
    try:
        base = Version(version).base_version
    except InvalidVersion:
        base = ""
    return next((release for release in RELEASES if release.version == base), RELEASES[-1])


def current() -> Release:
    """The release that this process imports. Raises ImportError where there is none."""
    return release_of(installed())


def arguments() -> Arguments:
    """How the SGLang that this process imports resolves a server's arguments."""
    return current().arguments


def view(server_args: Any) -> Any:
    """An object whose attributes are the values of these arguments, as resolved so far."""
    return arguments().view(server_args)


def attention_dp(config: Any) -> int:
    """Groups that attention is data-parallel over, within the tensor-parallel ranks.

    From 0.5.22 on they have a field of their own, and ``dp_size`` counts replicas only.
    """
    return int(config.dp_size if config.enable_dp_attention else getattr(config, "attn_dp_size", 1) or 1)


def rank_labels(scheduler: Any) -> dict[str, int]:
    """The ranks that tell a scheduler from the others of its server, as SGLang's scheduler metrics name them.

    ``dp_rank`` is the replica's (``--dp-size``), or the attention-DP group's; 0 where there is one of each.
    """
    state = getattr(scheduler, "ps", None)  # up to 0.5.20
    if state is None:
        from sglang.srt.runtime_context import get_parallel

        state = get_parallel()
    dp_rank = state.attn_dp_rank if state.dp_rank is None else state.dp_rank
    return {"tp_rank": state.tp_rank, "pp_rank": state.pp_rank, "dp_rank": dp_rank}


def problem_with(version: str) -> str | None:
    """Why ``version`` cannot be used, with what to do; None if it is supported.

    A local part (``0.5.23+cu130``) is ignored; pre, post and development releases are not known.
    """
    try:
        parsed = Version(version)
    except InvalidVersion:
        parsed = None
    if parsed is not None and parsed.public in SUPPORTED:
        return None
    return (
        f"SGLang {version} is not known to sglang-hicache-io (known: {SUPPORTED[0]} to {SUPPORTED[-1]}). "
        "Install one of these, or a newer sglang-hicache-io, or start without its backends: "
        "--hicache-io-backend kernel"
    )


def check_points(points: Iterable[HookPoint], version: str) -> str | None:
    """Compare ``points`` with the imported SGLang. None if all are there as expected, else what differs."""
    for point in points:
        owner_path, _, name = point.target.rpartition(".")
        try:
            owner = pkgutil.resolve_name(owner_path)
            function = inspect.unwrap(getattr(owner, name))
            found = tuple(inspect.signature(function).parameters)
        except (ImportError, AttributeError, ValueError) as error:
            return _differs(version, f"{point.target} is not there ({error})")
        # A classmethod seen through its class has lost `cls`, or not, when it is wrapped.
        expected = tuple(name for name in point.parameters if name != "cls")
        if tuple(name for name in found if name != "cls")[: len(expected)] != expected:
            return _differs(version, f"{point.target} takes {found}, expected {point.parameters}")
    return None


def _differs(version: str, what: str) -> str:
    return (
        f"SGLang {version} differs from the published one: {what}. sglang-hicache-io does not run "
        "on a guess: reinstall sglang, remove what patches it, or start with --hicache-io-backend kernel"
    )
