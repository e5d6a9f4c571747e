"""Who owns memory that streams still use, and what happens to it when the last owner lets go.

A GPU does not keep an index tensor alive: the caller must, until the operation is done. So a virtual stream
does not either. It *borrows*: when the last owner lets go while the operation may still run, the race checker
says so, and what the operation then finds there is :data:`POISON`. That happens in memory of our own, so the
process is safe whatever the program does.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import sites
from .ranges import NOTHING, ByteRanges

if TYPE_CHECKING:
    from .races import Checker
    from .shadow import Access

POISON = 0xDD
"""What freed memory is filled with."""


class Block:
    """One piece of memory that has an owner: a tensor's storage, an array's own memory.

    Attributes:
        name: for reports.
        start, nbytes: where it is, or was.
        stream: number of the stream it was allocated on, which alone gets it back (torch's caching
            allocator); None: anybody gets it at once.
        protected: numbers of streams that ``record_stream`` named.
        users: the last operation of each stream that uses it.
    """

    def __init__(self, name: str, start: int, nbytes: int) -> None:
        self.name = name
        self.start = start
        self.nbytes = nbytes
        self.stream: int | None = None
        self.protected: set[int] = set()
        self.users: dict[int, Access] = {}
        self._kept: npt.NDArray[np.uint8] | None = None

    @property
    def shift(self) -> int:
        """What to add to an address in it to find what is there now: 0 as long as it has an owner."""
        return 0 if self._kept is None else int(self._kept.ctypes.data) - self.start

    @property
    def alive(self) -> bool:
        """Whether it has an owner."""
        return self._kept is None

    def keep(self) -> None:
        """Called while the memory is still there: keep what is in it for those who come later."""
        self._kept = np.frombuffer(ctypes.string_at(self.start, self.nbytes), dtype=np.uint8).copy()

    def poison(self) -> None:
        """Overwrite what was kept: whoever still reads it shall see that it was gone."""
        if self._kept is not None:
            self._kept.fill(POISON)


class Borrowed:
    """A tensor or an array, without keeping it alive.

    Attributes:
        block: the memory it is in.
    """

    def __init__(self, block: Block, address: int, like: npt.NDArray[Any]) -> None:
        self.block = block
        self._address = address
        self._shape, self._strides, self._dtype = like.shape, like.strides, like.dtype
        last = sum((size - 1) * step for size, step in zip(like.shape, like.strides, strict=True))
        self._extent = 0 if like.size == 0 else last + like.itemsize

    def values(self) -> npt.NDArray[Any]:
        """What is in it now, in place."""
        if not self._extent:
            return np.empty(self._shape, dtype=self._dtype)
        memory = (ctypes.c_uint8 * self._extent).from_address(self._address + self.block.shift)
        buffer: Any = memory  # numpy's types do not say that ctypes arrays are buffers
        return np.ndarray(self._shape, self._dtype, buffer, strides=self._strides)

    @property
    def bytes(self) -> ByteRanges:
        """Where it is; the whole extent of a strided one."""
        return ByteRanges.at(self._address, self._extent)


class Memory:
    """The blocks that somebody borrowed from."""

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self._blocks: dict[int, Block] = {}
        self._dead: list[tuple[Block, str]] = []

    def block(self, what: Any, name: str = "") -> Block:
        """The memory of a torch tensor or numpy array (or something borrowed), whole, whatever view it is.

        Args:
            what: the tensor, array or borrowed one.
            name: for reports, if the memory has none yet.

        Raises:
            TypeError: it is neither.
        """
        if isinstance(what, Block | Borrowed):
            return what if isinstance(what, Block) else what.block
        owner, start, nbytes = _storage(what)
        block = self._blocks.get(id(owner))
        if block is None:
            block = Block(name or f"{what.dtype} {list(what.shape)}", start, nbytes)
            self._blocks[id(owner)] = block
            # The finalizer must not keep this device alive after a reset.
            weakref.finalize(owner, _freed, weakref.ref(self), id(owner)).atexit = False
        return block

    def borrow(self, what: Any, name: str = "") -> Borrowed:
        """Look at a torch tensor (of a type that numpy has) or numpy array without owning it.

        Raises:
            TypeError: it is neither, or its strides are negative.
        """
        block = self.block(what, name)
        like = what.detach().numpy() if hasattr(what, "untyped_storage") else what
        if any(step < 0 for step in like.strides):
            raise TypeError("memory with negative strides cannot be borrowed")
        return Borrowed(block, int(like.__array_interface__["data"][0]), like)

    def use(self, what: Any, access: Access) -> None:
        """An operation was launched that will touch ``what``."""
        block = self.block(what)
        block.users[access.stream] = access
        if not block.alive:
            self._judge(block, access.issued, [access], NOTHING)

    def settle(self) -> None:
        """Judge what was freed since the last call. Before anything else is told to the checker, or runs."""
        while self._dead:
            block, site = self._dead.pop()
            self._judge(block, site, block.users.values(), ByteRanges.at(block.start, block.nbytes))

    def _judge(self, block: Block, site: str, users: Iterable[Access], freed: ByteRanges) -> None:
        if not self._checker.free(
            block.name, site, users, memory=freed, stream=block.stream, protected=block.protected
        ):
            block.poison()

    def died(self, key: int) -> None:
        """Called by the finalizer of a block's owner, by that one's ``id``."""
        block = self._blocks.pop(key)
        block.keep()
        # The collector may have come in the middle of anything: judged later.
        self._dead.append((block, sites.caller()))


def _freed(memory: Callable[[], Memory | None], key: int) -> None:
    """The owner's memory is still there; it goes when this returns."""
    alive = memory()
    if alive is not None:
        alive.died(key)


def _storage(what: Any) -> tuple[object, int, int]:
    """Whose death frees the memory, where it begins, and its bytes."""
    storage = getattr(what, "untyped_storage", None)
    if storage is not None:
        owner = storage()
        return owner, int(owner.data_ptr()), int(owner.nbytes())
    if not isinstance(what, np.ndarray):
        raise TypeError(f"a {type(what).__name__} cannot be borrowed: give a torch tensor or a numpy array")
    base = what
    while isinstance(base.base, np.ndarray):
        base = base.base
    if hasattr(base.base, "untyped_storage"):  # what a tensor's numpy() gives
        return _storage(base.base)
    return base, int(base.__array_interface__["data"][0]), int(base.nbytes)
