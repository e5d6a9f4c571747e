"""Memory that streams use and do not own: what is found there once the last owner let go, and who is told."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sglang_hicache.io_backends.virtual import gpu as cuda
from sglang_hicache.io_backends.virtual.gpu import Gpu, Stream
from sglang_hicache.io_backends.virtual.memory import POISON
from sglang_hicache.io_backends.virtual.operations import Operation
from sglang_hicache.io_backends.virtual.ranges import ByteRanges

VALUES = np.arange(100, 110, dtype=np.int64)
FREED = int.from_bytes(bytes([POISON] * 8), "little", signed=True)


def numpy_tensor() -> Any:
    return VALUES.copy()


def torch_tensor() -> Any:
    torch = pytest.importorskip("torch")
    return torch.tensor(VALUES.tolist())


KINDS = pytest.mark.parametrize("make", [numpy_tensor, torch_tensor])


class Reader:
    """A stream that reads index tensors when it gets there. Nothing runs before ``found``."""

    def __init__(self) -> None:
        self.device: Gpu = cuda.reset(0)
        self.stream = Stream()
        self.stream.name = "gather"
        self.stream.held = True
        self._read: list[list[int]] = []

    def launch(self, indices: Any) -> None:
        borrowed = self.device.memory.borrow(indices, "index tensor")

        def read() -> None:
            self._read.append(borrowed.values().tolist())

        self.stream.launch(Operation("gather", (read,), reads=borrowed.bytes, uses=(borrowed,)))

    def found(self) -> list[int]:
        """What the last reader saw."""
        self.stream.held = False
        self.stream.synchronize()
        return self._read[-1]

    def kinds(self) -> list[str]:
        return [race.kind for race in self.device.races()]


@KINDS
def test_memory_that_lives_is_read_late(make: Callable[[], Any]) -> None:
    reader, indices = Reader(), make()
    reader.launch(indices)
    indices[0] = 7
    assert reader.found() == [7, *VALUES[1:]]
    assert reader.kinds() == []


@KINDS
def test_freed_too_early_it_reads_poison_and_is_reported(make: Callable[[], Any]) -> None:
    reader, indices = Reader(), make()
    reader.launch(indices)
    del indices
    (race,) = reader.device.races()
    assert race.kind == "use_after_free"
    assert (race.first.operation, race.second.operation) == ("gather", "free index tensor")
    assert race.second.issued.endswith("in test_freed_too_early_it_reads_poison_and_is_reported")
    assert reader.found() == [FREED] * 10


@KINDS
def test_a_view_keeps_it_alive(make: Callable[[], Any]) -> None:
    reader, indices = Reader(), make()
    view = indices[2:5]
    reader.launch(view)
    del indices
    assert reader.kinds() == []
    del view
    assert reader.kinds() == ["use_after_free"]


@KINDS
def test_the_whole_memory_counts_when_a_view_is_used(make: Callable[[], Any]) -> None:
    reader, indices = Reader(), make()
    reader.launch(indices[2:5])
    assert reader.found() == VALUES[2:5].tolist()
    del indices
    assert reader.kinds() == []


@KINDS
def test_after_the_host_waited_it_may_go(make: Callable[[], Any]) -> None:
    reader, indices = Reader(), make()
    reader.launch(indices)
    assert reader.found() == VALUES.tolist()
    del indices
    assert reader.kinds() == []


@KINDS
def test_that_it_ran_by_chance_is_not_enough(make: Callable[[], Any]) -> None:
    """The host did not wait: in another run the gather could have come later."""
    reader, indices = Reader(), make()
    reader.launch(indices)
    reader.stream.held = False
    reader.device.finish()
    del indices
    assert reader.kinds() == ["use_after_free"]


@KINDS
def test_record_stream_protects_it(make: Callable[[], Any]) -> None:
    reader, indices = Reader(), make()
    reader.launch(indices)
    cuda.record_stream(indices, reader.stream)
    del indices
    assert reader.kinds() == []
    assert reader.found() == VALUES.tolist()


@KINDS
def test_record_stream_protects_on_that_stream_only(make: Callable[[], Any]) -> None:
    reader, indices = Reader(), make()
    reader.launch(indices)
    cuda.record_stream(indices, Stream())
    del indices
    assert reader.kinds() == ["use_after_free"]


@KINDS
@pytest.mark.parametrize("own", [True, False])
def test_torchs_allocator_gives_memory_back_to_its_stream(make: Callable[[], Any], own: bool) -> None:
    reader, indices = Reader(), make()
    cuda.allocated(indices, on=reader.stream if own else Stream())
    reader.launch(indices)
    del indices
    assert reader.kinds() == ([] if own else ["use_after_free"])


@KINDS
def test_used_when_it_is_gone_already(make: Callable[[], Any]) -> None:
    reader, indices = Reader(), make()
    borrowed = reader.device.memory.borrow(indices, "index tensor")
    del indices
    assert reader.kinds() == []
    reader.stream.launch(Operation("gather", uses=(borrowed,)))
    assert reader.kinds() == ["use_after_free"]
    assert borrowed.values().tolist() == [FREED] * 10


def test_an_array_that_is_a_tensors_lives_as_long_as_that() -> None:
    reader, indices = Reader(), torch_tensor()
    reader.launch(indices.numpy())
    assert reader.kinds() == []
    del indices
    assert reader.kinds() == ["use_after_free"]


def test_garbage_that_is_collected_in_the_middle_of_anything() -> None:
    reader = Reader()
    indices: Any = numpy_tensor()
    cycle: list[Any] = [indices]
    cycle.append(cycle)
    reader.launch(indices)
    del indices, cycle
    assert reader.kinds() == []
    gc.collect()
    assert reader.kinds() == ["use_after_free"]


def test_memory_that_comes_back_at_the_same_place_is_other_memory() -> None:
    reader = Reader()
    base = np.zeros(64, dtype=np.uint8)
    address = base.ctypes.data
    cuda.record_stream(base, reader.stream)
    reader.launch(base)
    del base
    Stream().launch(Operation("another owner", writes=ByteRanges.at(address, 64)))
    assert reader.kinds() == []


def test_what_is_borrowed_outlives_no_device() -> None:
    indices = numpy_tensor()
    reader = Reader()
    reader.launch(indices)
    del reader
    cuda.reset(1)
    gc.collect()
    del indices


def test_only_memory_can_be_borrowed() -> None:
    memory = cuda.reset(0).memory
    with pytest.raises(TypeError, match="a list cannot be borrowed"):
        memory.borrow([1, 2])
    with pytest.raises(TypeError, match="negative strides"):
        memory.borrow(VALUES[::-1])
    assert memory.borrow(numpy_tensor()[:0]).values().tolist() == []
    assert memory.borrow(VALUES[::2]).values().tolist() == VALUES[::2].tolist()
