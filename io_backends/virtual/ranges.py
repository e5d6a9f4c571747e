"""Sets of bytes in memory, as sorted half-open ranges of addresses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Spans = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ByteRanges:
    """Bytes that an operation reads or writes.

    Attributes:
        spans: int64 [n, 2]; ``[start, stop)`` addresses, sorted, none empty, none touching the next.
    """

    spans: Spans

    @classmethod
    def of(cls, pairs: npt.ArrayLike) -> ByteRanges:
        """From ``(start, stop)`` pairs in any order; empty ones are left out, others may overlap."""
        given = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        given = given[given[:, 0] < given[:, 1]]
        if len(given) < 2:
            return cls(given)
        given = given[np.argsort(given[:, 0], kind="stable")]
        reach = np.maximum.accumulate(given[:, 1])
        apart = np.empty(len(given), dtype=np.bool_)
        apart[0] = True
        np.greater(given[1:, 0], reach[:-1], out=apart[1:])
        first = np.flatnonzero(apart)
        last = np.append(first[1:], len(given)) - 1
        return cls(np.stack([given[first, 0], reach[last]], axis=1))

    @classmethod
    def at(cls, start: int, nbytes: int) -> ByteRanges:
        """One piece of memory."""
        return cls.of([(start, start + nbytes)])

    @classmethod
    def rows(cls, base: int, stride: int, nbytes: int, slots: npt.ArrayLike) -> ByteRanges:
        """``nbytes`` bytes at ``base + slot * stride`` for each slot (integers [n], any order)."""
        starts = base + np.asarray(slots, dtype=np.int64).reshape(-1) * stride
        return cls.of(np.stack([starts, starts + nbytes], axis=1))

    @classmethod
    def union(cls, parts: Iterable[ByteRanges]) -> ByteRanges:
        """The bytes of all of them."""
        spans = [part.spans for part in parts if len(part.spans)]
        return cls.of(np.concatenate(spans)) if spans else NOTHING

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def nbytes(self) -> int:
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


NOTHING = ByteRanges(np.empty((0, 2), dtype=np.int64))
"""No bytes."""
