"""Choosing per write: what is known of one write, and the ways that a decision leaves open for it.

Facts about the server are matched once, when it starts. What a rule asks of the write itself can only be
answered then; a decision carries such rules on as routes, and each write takes the first one that holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .conditions import Condition, condition
from .fact_spec import FactKind
from .fact_table import CONDITIONS

WriteCondition = tuple[int | str | bool, ...]


@dataclass(frozen=True, slots=True)
class WriteFacts:
    """One write of a pool, as far as the host indices alone tell it (no device index is read, so nothing
    waits).

    Attributes:
        tokens: rows of the pool that move, all layers together counting as one.
        entries: copies that drain the write from staging: host-contiguous runs in the pool's host layout,
            over all layers and K and V.
        nbytes: bytes of the write.
        runs: runs of consecutive host slots.
    """

    tokens: int
    entries: int
    nbytes: int
    runs: int

    @property
    def entry_bytes(self) -> int:
        """Bytes of a copy on average, rounded down; 0 for an empty write."""
        return self.nbytes // self.entries if self.entries else 0

    @property
    def contiguous(self) -> bool:
        """Whether the host slots are one run."""
        return self.runs == 1


@dataclass(frozen=True)
class WriteRoute:
    """One way for a write: what a rule chooses, for the writes that satisfy its write conditions.

    Attributes:
        rule: the rule's name, "default", or the option given by hand.
        layer: which layer the rule comes from, as `Decision.layer`.
        because: the rule's reason.
        backend: who moves the bytes.
        fence_forward: the forwards that wait for its SM-side work, of `FORWARDS`.
        options: the backend's options.
        when: the rule's write conditions as written, by key; empty when every write may take this route.
    """

    rule: str
    layer: str
    because: str
    backend: str
    fence_forward: tuple[str, ...]
    options: Mapping[str, Any]
    when: Mapping[str, WriteCondition]
    _sets: tuple[tuple[str, Condition], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sets = tuple(
            (key.removeprefix("write_"), condition(key, values)) for key, values in self.when.items()
        )
        object.__setattr__(self, "_sets", sets)

    def holds(self, write: WriteFacts) -> bool:
        """Whether `write` may take this route. Pure, and a few microseconds."""
        return all(allowed.holds(getattr(write, name)) for name, allowed in self._sets)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "rule": self.rule,
            "layer": self.layer,
            "because": self.because,
            "backend": self.backend,
            "fence_forward": list(self.fence_forward),
            "options": dict(self.options),
            "when": {key: list(values) for key, values in self.when.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WriteRoute:
        """The inverse of `to_dict`. Raises KeyError or TypeError for anything else."""
        return cls(
            rule=data["rule"],
            layer=data["layer"],
            because=data["because"],
            backend=data["backend"],
            fence_forward=tuple(data["fence_forward"]),
            options=dict(data["options"]),
            when={key: tuple(values) for key, values in data["when"].items()},
        )


def writes_in_words(when: Mapping[str, WriteCondition]) -> str:
    """Which writes satisfy the write conditions `when`; "every write" without any."""
    parts = [_in_words(key, values) for key, values in when.items()]
    return f"writes {' and '.join(parts)}" if parts else "every write"


_SIGNS = {"<": "under ", "<=": "at most ", ">": "over ", ">=": "at least ", "!=": "other than "}


def _in_words(key: str, values: WriteCondition) -> str:
    spec = CONDITIONS[key]
    if spec.kind is FactKind.FLAG:
        if True not in values:
            return "in more than one run of host slots"
        return "in any runs of host slots" if False in values else "in one run of host slots"
    said = " or ".join(" and ".join(_number(part) for part in str(value).split(",")) for value in values)
    return spec.phrase.format(said)


def _number(part: str) -> str:
    """One comparison, such as ``>=32768``, in words."""
    sign = part.strip().rstrip("0123456789").strip()
    return f"{_SIGNS.get(sign, '')}{int(part.strip().removeprefix(sign)):,}"
