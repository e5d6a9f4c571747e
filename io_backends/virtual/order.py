"""In which order a device does what no fence orders: seeded, so that a seed is one order."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .gpu import Gpu, Stream
    from .operations import Queued


class Order(Protocol):
    """Decides which stream goes on, and when. All of it is called on the host's thread."""

    def new_stream(self, stream: Stream) -> None:
        """``stream`` was made."""
        ...

    def step(self, gpu: Gpu) -> bool:
        """Let one stream go on; False if none can."""
        ...

    def enqueued(self, gpu: Gpu, queued: Queued) -> None:
        """The host has enqueued this. Some time passed."""
        ...

    def looked(self, gpu: Gpu) -> None:
        """The host looks whether something is done. Some time passed."""
        ...

    def waited(self, gpu: Gpu, queued: Queued, site: str) -> None:
        """The host waits for this, which has run."""
        ...

    def busy(self, gpu: Gpu, name: str, ms: float) -> None:
        """The host works on something else."""
        ...


class SeededOrder:
    """Any order that streams and events allow, chosen by a seed.

    Streams differ in speed by up to ten thousand times (:attr:`~.gpu.Stream.pace`), so that some seeds starve
    one of them, and in some nothing runs while the host is still enqueuing.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._eager = self._random.choice((0.0, 0.0, 0.5, 1.0))

    def new_stream(self, stream: Stream) -> None:
        stream.pace = 10 ** self._random.uniform(-2, 2)

    def step(self, gpu: Gpu) -> bool:
        able = [stream for stream in gpu.streams.values() if stream.able()]
        if not able:
            return False
        (stream,) = self._random.choices(able, [stream.pace for stream in able])
        gpu.counts["steps"] += 1
        gpu.clock += 1.0
        stream.run_piece()
        return True

    def enqueued(self, gpu: Gpu, queued: Queued) -> None:
        while self._random.random() < self._eager and self.step(gpu):
            pass

    def looked(self, gpu: Gpu) -> None:
        for _ in range(self._random.choice((0, 1, 2, 8))):
            self.step(gpu)

    def waited(self, gpu: Gpu, queued: Queued, site: str) -> None:
        """Time passed step by step."""

    def busy(self, gpu: Gpu, name: str, ms: float) -> None:
        self.looked(gpu)
