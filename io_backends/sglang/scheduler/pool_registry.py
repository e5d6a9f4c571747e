"""The host pools that writes come from: which backends serve each, and why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ....policy.log import logger_of
from ...device.base import Device
from ...interface import Backend, OptionsError
from ...plan.geometry import PoolGeometry
from ...registry import unsupported
from ..errors import RefusedError
from ..pools.errors import ShortHostRowsError, UnsupportedPoolError
from ..pools.geometry import describe_pool, fingerprint, host_buffers, label_of
from . import kernels

logger = logger_of(__name__)

_REGISTERED_RANGES = "_sglang_cuda_host_registered_ranges"
"""Where SGLang leaves (address, bytes) of each registration of a host buffer."""


@dataclass(frozen=True, slots=True)
class KnownPool:
    """How one pool is served.

    Attributes:
        fingerprint: of its memory when it was looked at.
        geometry: the pool, or None where all of its writes take SGLang's own path.
        reasons: why that is so, or why single backends do not serve it.
        unserved: the last, by the instance: two of one name may differ in their options.
        by_name: of those backends no instance of whose name serves it.
    """

    fingerprint: tuple[int, ...]
    geometry: PoolGeometry | None
    reasons: tuple[str, ...]
    unserved: Mapping[int, str] = field(default_factory=dict)
    by_name: Mapping[str, str] = field(default_factory=dict)

    def reason(self, backend: Backend) -> str | None:
        """Why ``backend`` does not serve it; None if it does."""
        return self.unserved.get(id(backend))

    def reason_of(self, name: str) -> str | None:
        """Why no backend of that name serves it; None if one does."""
        return "; ".join(self.reasons) if self.geometry is None else self.by_name.get(name)


class PoolRegistry:
    """Looks at each pool once, prepares the backends for it, and logs once what SGLang copies itself."""

    def __init__(self, device: Device, backends: Sequence[Backend]) -> None:
        self._device = device
        self._backends = backends
        self._pools: dict[int, KnownPool] = {}
        self.serving = False
        """Set when serving starts: what cannot be served is refused before, and left to SGLang afterwards."""

    def __getitem__(self, host_pool: Any) -> KnownPool:
        known = self._pools.get(id(host_pool))
        memory = fingerprint(host_pool)
        if known is not None and known.fingerprint == memory:
            return known
        try:
            geometry = describe_pool(host_pool)
        except ShortHostRowsError as error:
            raise RefusedError(f"pool {label_of(host_pool)}, {error}: nothing can keep it whole") from error
        except UnsupportedPoolError as error:
            pool = KnownPool(memory, None, (str(error),))
        else:
            pool = self._served(host_pool, geometry, memory)
        self._pools[id(host_pool)] = pool
        if pool.geometry is None:
            for reason in pool.reasons:
                self._say(f"pool {label_of(host_pool)}", reason)
        return pool

    def _served(self, host_pool: Any, geometry: PoolGeometry, memory: tuple[int, ...]) -> KnownPool:
        """A pool that is described: asks and prepares the backends."""
        unserved: dict[int, str] = {}
        prepared = False
        for backend in self._backends:
            reason = unsupported(backend, geometry)
            if reason is None:
                if not prepared:
                    self._device.prepare_copies(geometry, _registered(host_pool))
                    prepared = True
                reason = self._prepare(backend, host_pool, geometry)
            if reason is not None:
                unserved[id(backend)] = reason
        reasons = tuple(dict.fromkeys(unserved.values()))
        if len(unserved) == len(self._backends):
            return KnownPool(memory, None, reasons)
        for backend in self._backends:
            if id(backend) in unserved:
                what = f"what {backend.name} was chosen for in pool {label_of(host_pool)}"
                self._say(what, unserved[id(backend)])
        serving = {backend.name for backend in self._backends if id(backend) not in unserved}
        by_name = {b.name: unserved[id(b)] for b in self._backends if b.name not in serving}
        return KnownPool(memory, geometry, reasons, unserved, by_name)

    @staticmethod
    def _say(what: str, reason: str) -> None:
        logger.warning("sglang-hicache-io: %s goes through SGLang's own path, fenced: %s", what, reason)

    def _prepare(self, backend: Backend, host_pool: Any, geometry: PoolGeometry) -> str | None:
        """Returns why the backend can never serve the pool.

        Raises:
            OptionsError: the same, before serving.
        """
        try:
            backend.prepare(geometry)
        except OptionsError as error:
            if not self.serving:
                raise
            return str(error)
        if backend.upstream_indices:
            kernels.prepare_order(host_pool)
        return None

    def serves(self, host_pool: Any) -> bool:
        """Whether some backend copies this pool."""
        return self[host_pool].geometry is not None

    def serve_alike(self, pools: Sequence[Any]) -> None:
        """These pools share their indices: if one of them takes SGLang's own path, all do."""
        if len({self.serves(pool) for pool in pools}) > 1:
            for pool in pools:
                reason = "it shares its indices with a pool that takes SGLang's own path"
                self._pools[id(pool)] = KnownPool(fingerprint(pool), None, (reason,))

    def fallbacks(self) -> list[str]:
        """Why pools seen so far take SGLang's own path, always or where a certain backend was chosen."""
        return [reason for pool in self._pools.values() for reason in pool.reasons]


def _registered(host_pool: Any) -> list[tuple[int, int]]:
    return [extent for each in host_buffers(host_pool) for extent in getattr(each, _REGISTERED_RANGES, ())]
