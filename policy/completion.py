"""What a shell completes a value with, of options whose valid names are a list."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .fact_spec import FactKind, FactSpec
from .fact_table import ANY_ATTENTION, FACT_NAMES
from .gpu_names import KNOWN_ARCHITECTURES

Complete = Callable[[str], list[str]]
"""What typer's ``autocompletion`` takes: the values that begin as what was typed."""

ARCHITECTURES = (*KNOWN_ARCHITECTURES, "cpu")


def one_of(names: Iterable[str] | Callable[[], Iterable[str]]) -> Complete:
    """Args:
    names: the valid values, or what finds them, where that takes time or a package.
    """

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


facts = one_of([f"{name}=" for name in (ANY_ATTENTION.name, *FACT_NAMES)])
"""For an option that takes ``NAME=VALUE``."""
