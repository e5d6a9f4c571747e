"""The GPU: streams and events are torch's, copies the driver's, the gather Triton's.

Nothing here makes a CUDA context before the first stream, staging buffer or pool: when SGLang opens the
device its process has not chosen a GPU yet.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from ...policy.log import logger_of
from ..plan.chunks import STAGING_ALIGNMENT, Chunk, Staged
from ..plan.copies import CopyBatch
from ..plan.geometry import PoolGeometry
from .base import DeviceUnavailableError, Event, Stream
from .copy_interleaving import QUANTUM_BYTES, InterleavedCopies, quantum_of
from .driver import MAX_COPIES_PER_CALL, Driver
from .gather import Gather
from .gather_plan import UNITS_PER_THREAD, WARPS
from .host_memory import HostRange, HostRanges, host_extents
from .small_reads import MOST_BYTES, KernelReads

logger = logger_of(__name__)

_INDEX_TYPES = {4: np.int32, 8: np.int64}
_PROBE_BYTES = 16 * 2**20
"""Of the copies that the link is measured with: 0.3 ms each at 55 GB/s."""
_PROBES = 5

_INDEX_BYTES = 2**20
"""131,072 indices, more than the tokens of most writes; a longer one makes the buffer grow."""


class CudaStaging:
    """Device memory of this process's GPU, aligned to 256 bytes, as long as this object lives.

    Attributes:
        address: of its first byte.
        nbytes: its length.
    """

    def __init__(self, torch: Any, nbytes: int) -> None:
        # torch's allocator aligns to 512 bytes, but it can be replaced by one that does not.
        self._memory = torch.empty(nbytes + STAGING_ALIGNMENT - 1, dtype=torch.uint8, device="cuda")
        # The memory may have been another tensor's until now, in work still queued on this stream; gather and
        # drain run on others. Staging is made before serving, so the wait costs nobody.
        torch.cuda.current_stream().synchronize()
        start = int(self._memory.data_ptr())
        self.address = -(-start // STAGING_ALIGNMENT) * STAGING_ALIGNMENT
        self.nbytes = nbytes


class IndexReader:
    """Copies index tensors to the host through a pinned buffer that is reused, on a stream of its own.

    Reused, because allocating pinned memory may wait for the whole device.
    """

    def __init__(self, torch: Any, driver: Driver, stream: Stream) -> None:
        self._torch, self._driver, self._stream = torch, driver, stream
        self._make_buffer(_INDEX_BYTES)

    def read(self, indices: Any, after: Event | None) -> npt.NDArray[np.int64]:
        """See :meth:`CudaDevice.host_values`."""
        nbytes = indices.numel() * indices.element_size()
        if nbytes > len(self._values):
            self._make_buffer(2 * nbytes)
        if after is None:
            self._stream.wait_stream(self._torch.cuda.current_stream())
        else:
            self._stream.wait_event(after)
        if not indices.is_contiguous():
            with self._torch.cuda.stream(self._stream):
                indices = indices.contiguous()
        if nbytes:
            # Not by torch's copy_: with its code out of the CPU's caches, it took longer than all the rest.
            self._driver.copy_one(self._address, indices.data_ptr(), nbytes, self._stream.cuda_stream)
            # Nothing else is on this stream; and until the copy is done the caller holds the indices.
            self._stream.synchronize()
        return np.array(self._values[:nbytes].view(_INDEX_TYPES[indices.element_size()]), dtype=np.int64)

    def _make_buffer(self, nbytes: int) -> None:
        self._buffer = self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=True)
        self._address = int(self._buffer.data_ptr())
        self._values: npt.NDArray[np.uint8] = self._buffer.numpy()


class CudaDevice:
    """:class:`~sglang_hicache.io_backends.device.base.Device` on this process's NVIDIA GPU.

    Beyond the seam's methods it wants to be told of each pool once, before serving:
    :meth:`prepare_copies` for host memory that copies may write, :meth:`prepare_gather` for device rows.

    Args:
        max_copies_per_call: copies in one driver call at most.
        quantum_bytes: copied before others get the copy engine, see :mod:`~.copy_interleaving`; without it
            the link is measured with the first pool.
        prefer_overlap: of copies with forwards, see :class:`~.driver.Driver`; for measurements.
        gather_warps, gather_units_per_thread: shape of the gather's thread blocks, for measurements.

    Raises:
        DeviceUnavailableError: no NVIDIA GPU that torch can use, or cuda-python or the driver is missing.
    """

    name = "cuda"

    def __init__(
        self,
        *,
        max_copies_per_call: int = MAX_COPIES_PER_CALL,
        quantum_bytes: int | None = None,
        prefer_overlap: bool = True,
        gather_warps: int = WARPS,
        gather_units_per_thread: int = UNITS_PER_THREAD,
    ) -> None:
        try:
            self._torch: Any = importlib.import_module("torch")
        except ImportError as error:
            raise DeviceUnavailableError(f"device cuda needs PyTorch: {error}") from error
        if self._torch.version.cuda is None:
            raise DeviceUnavailableError("this PyTorch is not built for CUDA: only NVIDIA GPUs are supported")
        if not self._torch.cuda.is_available():
            raise DeviceUnavailableError(
                "PyTorch finds no CUDA device: check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
            )
        self._driver = Driver(max_copies_per_call, prefer_overlap=prefer_overlap)
        self._copies = InterleavedCopies(
            self._torch.cuda.Event, self._driver, self.new_stream, quantum_bytes or QUANTUM_BYTES
        )
        self._measures_link = quantum_bytes is None
        self._host = HostRanges()
        self._gather = Gather(warps=gather_warps, units_per_thread=gather_units_per_thread)
        self._indices: IndexReader | None = None

    def prepare_copies(self, geometry: PoolGeometry, registered: Sequence[tuple[int, int]] = ()) -> None:
        """Check the pool's host memory and remember how to write it. Once a pool, before its first copy.

        Args:
            geometry: the pool.
            registered: (address, bytes) of each registration of its host buffer, as SGLang leaves them on
                the buffer (``_sglang_cuda_host_registered_ranges``). Without it, one registration is assumed.

        Raises:
            DeviceUnavailableError: the memory is pageable, or not all of it is in ``registered``.
        """
        extents = host_extents(geometry)
        direct = self._driver.host_addresses_work(self._torch.cuda.current_device())
        ranges: list[HostRange] = []
        for start, nbytes in registered or extents:
            for address in (start, start + nbytes - 1):
                if not self._driver.is_pinned(address):
                    raise DeviceUnavailableError(
                        f"host memory of pool {geometry.label} at {address:#x} is pageable: the GPU can only "
                        "write memory that was registered with CUDA (is the locked-memory limit, ulimit -l, "
                        "too small?)"
                    )
            shift = 0 if direct else self._driver.device_address(start) - start
            ranges.append(HostRange(start, nbytes, shift))
        told = HostRanges()
        told.add(ranges)
        if not told.covers(extents):
            raise DeviceUnavailableError(
                f"host memory of pool {geometry.label} is only partly registered with CUDA: "
                f"{_extents_text(extents)} against registrations {_extents_text(registered)}"
            )
        self._host.add(ranges)
        self._index_reader()
        if self._measures_link:
            self._measures_link = False
            self._copies.quantum_bytes = self._quantum_of_the_link()

    def prepare_gather(self, geometry: PoolGeometry) -> None:
        """Upload the pool's row addresses and compile its gather; waits for the upload.

        A pool that was not prepared is at its first gather, where both stall the caller.
        """
        torch = self._torch
        self._gather.prepare(geometry, torch.device("cuda", torch.cuda.current_device()))

    @property
    def quantum_bytes(self) -> int:
        """Copied before others get the copy engine."""
        return self._copies.quantum_bytes

    def new_stream(self) -> Stream:
        """One that nobody else has, as long as the process lives.

        torch's own come from a pool of 32 that it hands out in turn, to SGLang too: where two meet, one waits
        for the other's work.
        """
        least, _ = self._torch.cuda.Stream.priority_range()
        return self._own_stream(least)

    def current_stream(self) -> Stream:
        return self._torch.cuda.current_stream()

    def use_stream(self, stream: Stream) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = self._torch.cuda.stream(stream)
        return context

    def record(self, stream: Stream) -> Event:
        event = self._torch.cuda.Event()
        event.record(stream)
        return event

    def record_timed(self, stream: Stream) -> Event:
        """As :meth:`record`, with an event for :meth:`seconds_between`."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def seconds_between(self, start: Event, end: Event) -> float:
        """GPU time from ``start`` to ``end``, both complete."""
        return float(start.elapsed_time(end)) / 1e3

    def wait(self, stream: Stream, event: Event) -> None:
        stream.wait_event(event)

    def query(self, event: Event) -> bool:
        return bool(event.query())

    def host_values(self, indices: Any, after: Event | None = None) -> npt.NDArray[np.int64]:
        """Device indices as host values; **the host waits** for their copy.

        The copy runs on a stream of its own, behind ``after``, or behind what is queued on the current
        stream when that is not given, and behind whatever occupies the copy engine. It never waits for
        a forward on another stream; but a current stream that waits for the forward makes the host wait for
        the forward too. So ask with the event that follows the work which made the indices.

        Args:
            indices: integer tensor [n], on the device or the host.
            after: event to wait for instead of the current stream.

        Returns:
            int64 [n].
        """
        if not indices.is_cuda:
            return np.asarray(indices.numpy(), dtype=np.int64)
        return self._index_reader().read(indices, after)

    def small_reads(self) -> KernelReads:
        """See :class:`~.small_reads.KernelReads`; compiles its kernel."""
        torch = self._torch
        buffer = torch.empty(MOST_BYTES, dtype=torch.uint8, pin_memory=True)
        device = torch.device("cuda", torch.cuda.current_device())
        return KernelReads(torch, device, buffer, self._driver.device_address(int(buffer.data_ptr())))

    def memory_free(self) -> int:
        """Bytes, as the driver counts: what torch keeps for its next tensors is not free."""
        return int(self._torch.cuda.mem_get_info()[0])

    def allocate_staging(self, nbytes: int) -> CudaStaging:
        return CudaStaging(self._torch, nbytes)

    def gather(
        self,
        staged: Staged,
        base: int,
        device_slots: Any,
        chunk: Chunk,
        stream: Stream,
        ctas: int,
    ) -> None:
        """SM work, as the seam says. ``device_slots`` (int64 or int32) stays on the GPU.

        Raises:
            CopyRefusedError: a graph is being captured on ``stream``.
            ValueError, TypeError: see :meth:`~.gather.Gather.launch`.
        """
        self._driver.refuse_capture(stream.cuda_stream)
        self._gather.launch(staged, base, device_slots, chunk, min(ctas, self._multiprocessors), stream)
        if not chunk.start:
            # Once a transfer: torch's allocator looks at the stream when the tensor is freed, which is after
            # the last chunk was asked for.
            device_slots.record_stream(stream)

    @functools.cached_property
    def _multiprocessors(self) -> int:
        """SMs. More thread blocks of a gather are not faster, and a few more are slower, as some SMs get two:
        1.2 GB take 0.68 ms with 132 on the 132 SMs of an H200, 0.74 with 192, 0.69 with 264
        (bench/results/2026-11-27-h200-alone/gather.json), and likewise on an H100.
        """
        properties = self._torch.cuda.get_device_properties(self._torch.cuda.current_device())
        return int(properties.multi_processor_count)

    def copy(self, batch: CopyBatch, stream: Stream) -> None:
        """Copy-engine work, as the seam says; what is behind it on ``stream`` waits for it.

        Raises:
            UnknownHostMemoryError: a copy writes memory that :meth:`prepare_copies` has not seen.
            CopyRefusedError: the legacy NULL stream, or a graph is being captured.
            DriverError: the driver refused.
        """
        self._copies.copy(self._host.place(batch), stream)

    def _index_reader(self) -> IndexReader:
        if self._indices is None:
            # The host waits for these copies, so nothing in the background should go first.
            _, greatest = self._torch.cuda.Stream.priority_range()
            self._indices = IndexReader(self._torch, self._driver, self._own_stream(greatest))
        return self._indices

    def _quantum_of_the_link(self) -> int:
        """By the fastest of some copies to pinned memory, for which the host waits."""
        torch = self._torch
        seconds = []
        try:
            source = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device="cuda")
            target = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
            stream = self.new_stream()
            for _ in range(_PROBES):
                begin = self.record_timed(stream)
                self._driver.copy_one(target.data_ptr(), source.data_ptr(), _PROBE_BYTES, stream.cuda_stream)
                end = self.record_timed(stream)
                end.synchronize()
                seconds.append(self.seconds_between(begin, end))
        except RuntimeError as error:  # torch.OutOfMemoryError and DriverError are such
            logger.info("hicache-io: the link's rate is not measured: %s", error)
            return QUANTUM_BYTES
        rate = _PROBE_BYTES / max(min(seconds), 1e-6)
        quantum = quantum_of(rate)
        logger.info(
            "hicache-io: the link moves %.1f GB/s to the host; copies of others get it every %.0f MiB",
            rate / 1e9,
            quantum / 2**20,
        )
        return quantum

    def _own_stream(self, priority: int) -> Stream:
        # The driver makes it in the thread's current context, which the first question to the device sets.
        self._torch.cuda.current_stream().query()
        return self._torch.cuda.ExternalStream(self._driver.new_stream(priority))


def _extents_text(extents: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{start:#x}+{nbytes:#x}" for start, nbytes in extents)
