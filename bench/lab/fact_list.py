"""The table of facts in docs/policy.md, from the table that conditions are made of."""

from __future__ import annotations

from ...policy.fact_spec import FactKind, FactSource, FactSpec
from ...policy.fact_table import ANY_ATTENTION, CONDITIONS

_VALUES = {
    FactKind.ARCHITECTURE: "`sm` and a number, or `cpu`",
    FactKind.TEXT: "text",
    FactKind.VERSION: "version",
    FactKind.NUMBER: "number",
    FactKind.FLAG: "`true`, `false`",
}
_SOURCES = {
    FactSource.MACHINE: "machine",
    FactSource.SERVER: "server",
    FactSource.WRITE: "each write",
}


def table() -> str:
    """Markdown: each fact that a condition may ask about, with all that is said of it."""
    lines = [
        "| fact | what it is | values | of the | without a server or a value given |",
        "| --- | --- | --- | --- | --- |",
    ]
    named: dict[tuple[str, ...], str] = {}
    for spec in CONDITIONS.values():
        cells = (
            f"`{spec.name}`",
            spec.meaning,
            _values(spec, named),
            _SOURCES[spec.source],
            _otherwise(spec),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _values(spec: FactSpec, named: dict[tuple[str, ...], str]) -> str:
    """In words; names that a fact before it has too are not listed again."""
    if spec.kind is FactKind.NAME:
        before = named.setdefault(spec.values, spec.name)
        return _code(spec.values) if before == spec.name else f"those of `{before}`"
    example = spec.example if spec.kind in (FactKind.VERSION, FactKind.TEXT) else ""
    return _VALUES[spec.kind] + (f", such as `{example}`" if example else "")


def _otherwise(spec: FactSpec) -> str:
    if spec is ANY_ATTENTION:
        return "as its forwards' own"
    if spec.of_write:
        return "each write tells it"
    if spec.source is FactSource.MACHINE:
        return "looked for on this machine; else unknown"
    if spec.default is not None:
        return f"{_code((str(spec.default).lower(),))}: {spec.default_because}"
    return f"unknown: {spec.unknown.removeprefix('not given; ')}" if spec.unknown else f"by `{spec.follows}`"


def _code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
