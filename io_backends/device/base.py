"""The seam to the device: streams, events, copies and the gather, and nothing else.

Backends and fences reach hardware through this protocol only, so that the same code runs on CUDA, on the
CPU engine, and on a virtual device that reorders work to find missing fences.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..plan.chunks import Chunk, Staged
from ..plan.copies import CopyBatch
from ..plan.geometry import PoolGeometry

Stream = Any
"""A stream of the device's own kind: ``torch.cuda.Stream``, or what the CPU engine uses."""

Event = Any
"""An event of the device's own kind."""


class DeviceUnavailableError(RuntimeError):
    """This process cannot drive the device; the message says what to do."""


class Staging(Protocol):
    """Device memory that a gather writes and a copy drains; free when nothing refers to it any more.

    Attributes:
        address: of its first byte, a multiple of :data:`~..plan.chunks.STAGING_ALIGNMENT`.
        nbytes: its length.
    """

    address: int
    nbytes: int


class SmallReads(Protocol):
    """Reads device tensors while a copy to the host is under way."""

    def serves(self, values: Any) -> bool:
        """Whether :meth:`read` takes this tensor."""
        ...

    def read(self, values: Any) -> Any:
        """Its values in a new tensor on the host, behind the current stream's work; the host waits.

        Raises:
            RuntimeError: the device refuses, or that work has failed.
        """
        ...


class Device(Protocol):
    """One process's device. Every method enqueues and returns, except where it says otherwise."""

    name: str
    """``cuda``, ``cpu`` or ``virtual``."""

    def new_stream(self) -> Stream:
        """A stream for background work, at the lowest priority there is (CUDA's default is the lowest)."""
        ...

    def current_stream(self) -> Stream:
        """The stream on which this thread's work goes unless it says otherwise."""
        ...

    def use_stream(self, stream: Stream) -> AbstractContextManager[object]:
        """Make ``stream`` current inside the block."""
        ...

    def record(self, stream: Stream) -> Event:
        """A new event recorded on ``stream`` now."""
        ...

    def wait(self, stream: Stream, event: Event) -> None:
        """Work enqueued on ``stream`` from now on waits for ``event``. The host does not wait."""
        ...

    def query(self, event: Event) -> bool:
        """Whether the work before ``event`` is done."""
        ...

    def prepare_copies(self, geometry: PoolGeometry, registered: Sequence[tuple[int, int]] = ()) -> None:
        """Check that copies can write the pool's host memory. Once per pool, before its first copy.

        Args:
            geometry: the pool.
            registered: (address, bytes) of each registration of that memory, where it is known.

        Raises:
            DeviceUnavailableError: they cannot.
        """
        ...

    def prepare_gather(self, geometry: PoolGeometry) -> None:
        """Build what gathers of the pool need. Once per pool, before its first gather."""
        ...

    def host_values(self, indices: Any, after: Event | None = None) -> npt.NDArray[np.int64]:
        """Device indices as host values. The host waits for their copy.

        Args:
            indices: integers [n], on the device or the host.
            after: event that the copy waits for; without it, for the current stream's work so far.

        Returns:
            int64 [n], which nothing changes afterwards.
        """
        ...

    def small_reads(self) -> SmallReads | None:
        """What reads small device tensors past the copy engine; None where no copies hold one.

        Makes it anew, and waits for the device: asked before serving.

        Raises:
            Exception: it cannot be made here; all else works without it.
        """
        ...

    def memory_free(self) -> int | None:
        """Bytes of device memory that nobody has allocated; None where that bounds nothing."""
        ...

    def allocate_staging(self, nbytes: int) -> Staging:
        """Device memory of ``nbytes`` bytes, which nothing else uses.

        Raises:
            RuntimeError: there is not so much (``torch.OutOfMemoryError`` is one).
        """
        ...

    def gather(
        self,
        staged: Staged,
        base: int,
        device_slots: Any,
        chunk: Chunk,
        stream: Stream,
        ctas: int,
    ) -> None:
        """SM work: copy the device rows of ``chunk``'s tokens to its slots in staging.

        Args:
            staged: the pool, and the layout of the destination.
            base: address in staging at which that begins, in bytes.
            device_slots: where each token of the transfer is, int64 [n] on the device.
            chunk: which tokens; the first one goes to slot 0 of ``staged``.
            stream: what it is enqueued on.
            ctas: thread blocks to use at most, from 1 up.
        """
        ...

    def copy(self, batch: CopyBatch, stream: Stream) -> None:
        """Copy-engine work: every copy of ``batch``, in any order among themselves.

        The arrays of ``batch`` have been read when this returns. After an error some copies may be under way.

        Args:
            batch: host destinations in pools that :meth:`prepare_copies` has seen; device sources.
            stream: what they are enqueued on.

        Raises:
            RuntimeError: the stream takes no copies, or the driver or the memory refuses them.
        """
        ...
