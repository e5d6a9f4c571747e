"""What a D2H backend says of itself before there is an instance: what it serves, options, work on the SMs.

A policy file is checked against these, and ``explain``, ``doctor`` and the benchmarks read them. The registry
of backends hands them over (`Backends`); nothing else knows a backend by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from .names import MEM_LAYOUTS, POOL_KINDS, NameProblem, check_name, shown


class SmWork(Enum):
    """What of a transfer runs on the GPU's SMs, beside which a forward may have to wait."""

    NONE = "nothing: no forward waits for it"
    GATHER = "a gather within GPU memory; what writes host memory is not on the SMs"
    TRANSFER = "every byte, on its way to host memory"
    UNKNOWN = "nobody has said"


@dataclass(frozen=True)
class Option:
    """One option of a backend: a whole number from ``least`` to ``most``, or one of ``words``.

    Attributes:
        name: as a policy's ``use.options`` spells it.
        default: without it; None where that is no one value.
        least, most: the smallest and the largest number that can work; None: no number is too large.
        because: where ``most`` comes from.
        words: valid besides numbers. With ``numbers`` false, nothing else is.
        numbers: whether it takes numbers.
        flag: it takes true or false instead.
        ample: a number above it works and may not be meant; ``policy validate`` then says ``ample_because``.
    """

    name: str
    default: int | str | bool | None = None
    least: int = 1
    most: int | None = None
    because: str = ""
    words: tuple[str, ...] = ()
    numbers: bool = True
    flag: bool = False
    ample: int | None = None
    ample_because: str = ""

    def __post_init__(self) -> None:
        if self.default is not None:
            self.check(self.default)

    def check(self, value: object) -> None:
        """Raises NameProblem unless `value` can work."""
        if self.flag:
            if not isinstance(value, bool):
                raise NameProblem(f"{self.name} must be true or false, not {shown(value)}")
            return
        if value in self.words:
            return
        if not self.numbers:
            raise NameProblem(f"{self.name} must be one of {', '.join(self.words)}, not {shown(value)}")
        if type(value) is not int or value < self.least:
            upto = "on" if self.most is None else f"to {self.most:,}"
            number = f"a whole number from {self.least:,} {upto}"
            raise NameProblem(f"{self.name} must be {' or '.join((number, *self.words))}, not {shown(value)}")
        if self.most is not None and value > self.most:
            because = f": {self.because}" if self.because else ""
            raise NameProblem(f"{self.name} must be at most {self.most:,}, not {value:,}{because}")


@dataclass(frozen=True)
class BackendSpec:
    """One backend. With its name alone, nothing is known and everything is let through.

    Attributes:
        name: by which it is asked for.
        layouts: host layouts that it can serve (it may still refuse a pool); None: it says so for each pool.
        kv_kinds: kinds of KV cache likewise: ``mha`` and ``mla``, as the fact `kv_kind`; for pools beside
            that one also ``index`` and ``state``. None: it says so for each pool.
        options: which there are; None: any, unchecked.
        sm_work: what of a transfer runs on the SMs. Of ``TRANSFER`` every forward waits when the backend is
            given by hand, and a rule must say which ones do.
        index_steps: it serves pools of which several indices stand for one row (pages of DeepSeek-V4, rows
            that the ranks of decode context parallelism share). Without it, it is given none.
        upstream_copy: it calls SGLang's own copy of the pool, on a GPU.
        staging: how much GPU memory it stages rows in, in words, from its options and whether any forward
            waits; None: none.
    """

    name: str
    layouts: frozenset[str] | None = None
    kv_kinds: frozenset[str] | None = None
    options: tuple[Option, ...] | None = None
    sm_work: SmWork = SmWork.UNKNOWN
    index_steps: bool = False
    upstream_copy: bool = False
    staging: Callable[[Mapping[str, Any], bool], str] | None = None

    def __post_init__(self) -> None:
        """Raises NameProblem for a layout or a kind that no pool has."""
        for what, names, known in (
            ("memory layout", self.layouts, MEM_LAYOUTS),
            ("KV kind", self.kv_kinds, POOL_KINDS),
        ):
            for name in sorted(names or ()):
                check_name(f"{what} of backend {self.name}", name, known)

    def option(self, name: str) -> Option:
        """Its option of that name. Raises KeyError where it has none."""
        return {each.name: each for each in self.options or ()}[name]

    def check_option(self, name: str, value: object) -> None:
        """Raises NameProblem if there is no such option, or it cannot work with `value`."""
        if self.options is not None:
            check_name(f"option of {self.name}", name, [each.name for each in self.options])
            self.option(name).check(value)

    def cannot_serve(self, layout: object, kv_kind: object, index_step: int = 1) -> str | None:
        """Why it cannot serve a pool; None if it can, or nothing is known.

        Args:
            layout: of the pool's host memory; None: unknown.
            kv_kind: what the pool holds; None: unknown.
            index_step: indices of it that stand for one row together.
        """
        if index_step > 1 and not self.index_steps:
            return f"cannot serve pools of which {index_step} indices stand for one row"
        for what, value, can in (
            ("--hicache-mem-layout", layout, self.layouts),
            ("KV cache of kind", kv_kind, self.kv_kinds),
        ):
            if can is not None and value is not None and value not in can:
                return f"cannot serve {what} {value} (it can: {', '.join(sorted(can))})"
        return None


#: The backends that there are, by name, this project's first. A registry may grow while it is used.
Backends = Mapping[str, BackendSpec]


def spec_of(backends: Backends, name: str) -> BackendSpec:
    """What `backends` know of the backend of that name; nothing, where it is not one of them."""
    return backends.get(name) or BackendSpec(name)
