"""What a shell completes a value with, of options whose valid names are a list.

Not ``NAME=VALUE``: a shell adds a blank behind the ``=``, and what is typed behind that is another argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .fact_spec import FactKind, FactSpec
from .gpu_names import KNOWN_ARCHITECTURES

Complete = Callable[[str], list[str]]
"""What typer's ``autocompletion`` takes: the values that begin as what was typed."""

ARCHITECTURES = (*KNOWN_ARCHITECTURES, "cpu")


def one_of(names: Iterable[str] | Callable[[], Iterable[str]]) -> Complete:
    """Those of ``names`` that begin so; they may be what finds them, where that takes time or a package."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in (names() if callable(names) else names) if name.startswith(incomplete)]

    return complete


def of_fact(spec: FactSpec) -> Complete | None:
    """For an option that gives one fact; None where its values are no list."""
    names = {
        FactKind.NAME: spec.values,
        FactKind.ARCHITECTURE: ARCHITECTURES,
        FactKind.FLAG: ("true", "false"),
    }
    return one_of(names[spec.kind]) if spec.kind in names else None
