"""The policy format as JSON Schema (draft 2020-12), for editors and for tools that write policies.

It accepts every file that `load` accepts. It refuses unknown keys, unknown values, missing parts and wrong
options; what needs more than one place of the file or another file (rules that can never match, duplicate
names, what ``extends`` names) is left to ``hicache-io policy validate``, and so is the grammar of versions
beyond their form.
"""

from __future__ import annotations

from typing import Any

from ..backend_spec import Backends, BackendSpec, Option, SmWork
from ..fact_spec import FactKind, FactSpec
from ..fact_table import ANY_ATTENTION, ATTENTION_FACTS, CONDITIONS
from ..gpu_names import GPU_ARCH_PATTERN, name_pattern
from ..names import FORWARDS
from .validators import MATCH, USES

_Schema = dict[str, Any]

_TEXT: _Schema = {"type": "string", "pattern": r"\S"}
_SPECIFIER: _Schema = {"type": "string", "pattern": r"^\s*(===|~=|==|!=|<=|>=|<|>)"}
_COMPARISON = r"\s*(<=|>=|==|!=|<|>)?\s*[0-9]+\s*"
_NUMBER: _Schema = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": f"^{_COMPARISON}(,{_COMPARISON})*$"},
    ]
}
_CONTAINS_USES: _Schema = {"anyOf": [{"const": USES}, {"type": "array", "contains": {"const": USES}}]}
_BECAUSE: _Schema = {
    **_TEXT,
    "description": "What was seen, where (citation), on which hardware and versions.",
}


def policy_json_schema(backends: Backends) -> _Schema:
    """The schema, with these backends and their options."""
    default_use = {
        "allOf": [{"$ref": "#/$defs/use"}, {"properties": {"fence_forward": {"not": _CONTAINS_USES}}}]
    }
    default = _mapping(
        {"use": default_use, "because": _BECAUSE, "unmeasured": _unmeasured("use")}, optional=["unmeasured"]
    )
    file = _mapping(
        {
            "version": {"const": 1},
            "extends": {
                **_TEXT,
                "description": "default, or a policy file beside this one: this file's rules come before "
                "that policy's, and a rule of the same name replaces it.",
            },
            "rules": {
                "type": "array",
                "items": {"$ref": "#/$defs/rule"},
                "description": "First match wins.",
            },
            "default": default,
        },
        optional=["extends", "default"],
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sglang-hicache-io policy, version 1",
        **file,
        "anyOf": [{"required": ["default"]}, {"required": ["extends"]}],
        "$defs": {"rule": _rule(), "when": _when(), "use": _use(backends)},
    }


def _when() -> _Schema:
    conditions = {
        key: {"description": spec.meaning, **_any_of(_value(spec))} for key, spec in CONDITIONS.items()
    }
    return _mapping(conditions, optional=list(conditions))


def _value(spec: FactSpec) -> _Schema:
    """One value of a condition on that fact."""
    match spec.kind:
        case FactKind.NAME:
            return {"enum": list(spec.values)}
        case FactKind.VERSION:
            return _SPECIFIER
        case FactKind.NUMBER:
            return _NUMBER
        case FactKind.FLAG:
            return {"type": "boolean"}
        case FactKind.ARCHITECTURE:
            return {"type": "string", "pattern": f"^({GPU_ARCH_PATTERN})$|{name_pattern()}"}
        case FactKind.TEXT:
            return _TEXT


def _rule() -> _Schema:
    on_server = [key for key, spec in CONDITIONS.items() if not spec.of_write]
    rule = _mapping(
        {
            "name": {**_TEXT, "not": {"const": "default"}},
            "when": {"$ref": "#/$defs/when"},
            "unknown": {
                "anyOf": [
                    {"const": MATCH},
                    {"type": "array", "items": {"enum": [MATCH, *on_server]}, "minItems": 1},
                ],
                "description": "Conditions that an unknown fact satisfies; match: all of this rule. Without "
                "it, an unknown fact satisfies none.",
            },
            "use": {"$ref": "#/$defs/use"},
            "because": _BECAUSE,
            "unmeasured": _unmeasured("when|use"),
        },
        optional=["unknown", "unmeasured"],
    )
    fences_uses = {"properties": {"fence_forward": _CONTAINS_USES}, "required": ["fence_forward"]}
    named = [{"required": [key]} for key in (ANY_ATTENTION.name, *ATTENTION_FACTS)]
    rule["allOf"] = [
        _if({"properties": {"use": fences_uses}}, {"properties": {"when": {"anyOf": named}}}),
        _if(
            {"required": ["unknown"]},
            {"properties": {"when": {"anyOf": [{"required": [key]} for key in on_server]}}},
        ),
    ]
    return rule


def _unmeasured(roots: str) -> _Schema:
    return {
        "type": "object",
        "propertyNames": {"pattern": rf"^({roots})\."},
        "additionalProperties": _TEXT,
        "minProperties": 1,
        "description": "What nobody measured, by its path in this rule, such as when.page_size.",
    }


def _use(backends: Backends) -> _Schema:
    forwards = {"enum": [*FORWARDS, USES]}
    use = _mapping(
        {
            "backend": {"enum": list(backends)},
            "fence_forward": {
                "anyOf": [forwards, {"type": "array", "items": forwards}],
                "description": "Forwards that wait for SM-side D2H work.",
            },
            "options": {"type": "object"},
        },
        optional=["fence_forward", "options"],
    )
    use["allOf"] = [_backend(spec) for spec in backends.values()]
    return use


def _backend(spec: BackendSpec) -> _Schema:
    """What ``use`` must hold besides where it names that backend."""
    required = ["backend"]
    if spec.sm_work is SmWork.TRANSFER:
        required.append("fence_forward")
    then: _Schema = {"required": required}
    if spec.options is not None:
        known = {each.name: _option(each) for each in spec.options}
        then["properties"] = {"options": _mapping(known, optional=list(known))}
    return _if({"properties": {"backend": {"const": spec.name}}, "required": ["backend"]}, then)


def _option(option: Option) -> _Schema:
    if option.flag:
        return {"type": "boolean"}
    number: _Schema = {"type": "integer", "minimum": option.least}
    if option.most is not None:
        number["maximum"] = option.most
    forms: list[_Schema] = [number] if option.numbers else []
    if option.words:
        forms.append({"enum": list(option.words)})
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


def _if(condition: _Schema, then: _Schema) -> _Schema:
    return {"if": condition, "then": then}


def _mapping(properties: _Schema, *, optional: list[str]) -> _Schema:
    """A mapping with no other keys than these."""
    return {
        "type": "object",
        "properties": properties,
        "required": [key for key in properties if key not in optional],
        "additionalProperties": False,
    }


def _any_of(one: _Schema) -> _Schema:
    """A value, or a list of values, of which any may hold."""
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
