"""Which SGLang versions are known, and what of them this project relies on.

The table is checked against the published wheels of every supported version by
``tests/sglang/test_hook_points.py``, and against the running SGLang each time one of this project's
backends is asked for: an SGLang that looks different is refused, never patched on a guess.
"""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

SUPPORTED = ("0.5.18", "0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23")

_S = "sglang.srt."
SCHEDULER = _S + "managers.scheduler.Scheduler"
ENGINE = _S + "mem_cache.l2_transfer.L2TransferEngine"
CONTROLLER = _S + "managers.cache_controller.HiCacheController"
HYBRID_CONTROLLER = _S + "mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
MHA_POOL = _S + "mem_cache.pool_host.mha.MHATokenToKVPoolHost"
MLA_POOL = _S + "mem_cache.pool_host.mla.MLATokenToKVPoolHost"


@dataclass(frozen=True, slots=True)
class HookPoint:
    """A function of SGLang's that this project wraps or calls.

    Attributes:
        target: dotted path.
        parameters: its leading parameters, by name; more may follow.
        since, until: first and last supported version it exists in (inclusive).
    """

    target: str
    parameters: tuple[str, ...]
    since: str = SUPPORTED[0]
    until: str = SUPPORTED[-1]

    def applies_to(self, version: str) -> bool:
        return Version(self.since) <= Version(version) <= Version(self.until)


ADD_CLI_ARGS = _S + "server_args.ServerArgs.add_cli_args"
FROM_CLI_ARGS = _S + "server_args.ServerArgs.from_cli_args"
HANDLE_HICACHE = _S + "arg_groups.hicache_hook.handle_hicache"
HANDLE_HICACHE_0_5_18 = _S + "server_args.ServerArgs._handle_hicache"
RESOLVE = _S + "arg_groups.pipeline.run_resolution_pipeline"
RESOLVE_0_5_18 = _S + "server_args.ServerArgs._run_resolution_pipeline"

LAUNCHER_POINTS = (
    HookPoint(ADD_CLI_ARGS, ("parser",)),
    HookPoint(FROM_CLI_ARGS, ("cls", "args")),
    HookPoint(HANDLE_HICACHE, ("server_args",), since="0.5.19"),
    HookPoint(HANDLE_HICACHE_0_5_18, ("self",), until="0.5.18"),
    HookPoint(RESOLVE, ("server_args",), since="0.5.19"),
    HookPoint(RESOLVE_0_5_18, ("self",), until="0.5.18"),
)
"""Wrapped in every process that loads plug-ins."""

SCHEDULER_POINTS = (
    HookPoint(SCHEDULER + ".__init__", ("self", "server_args")),
    HookPoint(SCHEDULER + ".run_batch", ("self", "batch")),
    HookPoint(SCHEDULER + ".get_internal_state", ("self", "recv_req")),
    HookPoint(ENGINE + ".submit_device_to_host", ("self", "transfers")),
    HookPoint(CONTROLLER + ".reset", ("self",)),
    HookPoint(CONTROLLER + "._move_write_operation", ("self", "op")),
    HookPoint(HYBRID_CONTROLLER + "._move_write_operation", ("self", "op")),
)
"""Wrapped in a scheduler that runs one of this project's backends, and only there."""

CALLED_POINTS = (
    HookPoint(CONTROLLER + ".move_indices", ("self", "host_indices", "device_indices")),
    HookPoint(
        MHA_POOL + ".backup_from_device_all_layer",
        ("self", "device_pool", "host_indices", "device_indices", "io_backend"),
    ),
    HookPoint(
        MHA_POOL + ".load_to_device_per_layer",
        ("self", "device_pool", "host_indices", "device_indices", "layer_id", "io_backend"),
    ),
    HookPoint(
        MLA_POOL + ".backup_from_device_all_layer",
        ("self", "device_pool", "host_indices", "device_indices", "io_backend"),
    ),
    HookPoint(
        MLA_POOL + ".load_to_device_per_layer",
        ("self", "device_pool", "host_indices", "device_indices", "layer_id", "io_backend"),
    ),
)
"""Called, or wrapped on the CPU engine only."""


def installed() -> str:
    """Version of the SGLang that this process imports.

    Raises:
        ImportError: there is none.
    """
    from sglang.version import __version__

    return str(__version__)


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


def check_points(points: tuple[HookPoint, ...], version: str) -> str | None:
    """Compare ``points`` with the imported SGLang. None if all are there as expected, else what differs."""
    public = Version(version).public
    for point in points:
        if not point.applies_to(public):
            continue
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
