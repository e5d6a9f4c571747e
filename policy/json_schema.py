"""The policy format as JSON Schema (draft 2020-12), for editors and for tools that write policies.

It accepts every file that `load` accepts. It refuses unknown keys, unknown values, missing parts and wrong
options; what needs more than one place of the file (rules that can never match, duplicate names) is left to
``hicache-io policy validate``, and so is the grammar of versions beyond their form.
"""

from __future__ import annotations

from typing import Any

from sglang_hicache.io_backends.registry import available_backends
from sglang_hicache.policy.fields import USES
from sglang_hicache.policy.schema import When
from sglang_hicache.policy.vocabulary import (
    ATTENTION_BACKENDS,
    BACKEND_OPTIONS,
    DEVICES,
    FORWARDS,
    GPU_ARCH_PATTERN,
    KV_KINDS,
    MEM_LAYOUTS,
)

_Schema = dict[str, Any]

_TEXT: _Schema = {"type": "string", "pattern": r"\S"}
_SPECIFIER: _Schema = {"type": "string", "pattern": r"^\s*(===|~=|==|!=|<=|>=|<|>)"}
_COMPARISON = r"\s*(<=|>=|==|!=|<|>)?\s*[0-9]+\s*"
_PAGE_SIZE: _Schema = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": f"^{_COMPARISON}(,{_COMPARISON})*$"},
    ]
}


def policy_json_schema() -> _Schema:
    """The schema, with the backends that are registered in this process."""
    when = {
        "attention_backend": _any_of({"enum": list(ATTENTION_BACKENDS)}),
        "prefill_attention_backend": _any_of({"enum": list(ATTENTION_BACKENDS)}),
        "decode_attention_backend": _any_of({"enum": list(ATTENTION_BACKENDS)}),
        "gpu_arch": _any_of({"type": "string", "pattern": f"^({GPU_ARCH_PATTERN})$"}),
        "sgl_kernel": _any_of(_SPECIFIER),
        "sglang": _any_of(_SPECIFIER),
        "kv_kind": _any_of({"enum": list(KV_KINDS)}),
        "mem_layout": _any_of({"enum": list(MEM_LAYOUTS)}),
        "page_size": _any_of(_PAGE_SIZE),
        "device": _any_of({"enum": list(DEVICES)}),
    }
    assert set(when) == set(When.model_fields), "the format and its JSON Schema name the same conditions"
    because = {**_TEXT, "description": "What was seen, where (citation), on which hardware and versions."}
    rule = _mapping(
        {
            "name": {**_TEXT, "not": {"const": "default"}},
            "when": {"$ref": "#/$defs/when"},
            "use": {"$ref": "#/$defs/use"},
            "because": because,
        }
    )
    rule["if"] = {
        "properties": {
            "use": {"properties": {"fence_forward": _CONTAINS_USES}, "required": ["fence_forward"]}
        }
    }
    rule["then"] = {
        "properties": {"when": {"anyOf": [{"required": [key]} for key in when if "attention" in key]}}
    }
    default_use = {
        "allOf": [{"$ref": "#/$defs/use"}, {"properties": {"fence_forward": {"not": _CONTAINS_USES}}}]
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sglang-hicache-io policy, version 1",
        **_mapping(
            {
                "version": {"const": 1},
                "rules": {
                    "type": "array",
                    "items": {"$ref": "#/$defs/rule"},
                    "description": "First match wins.",
                },
                "default": _mapping({"use": default_use, "because": because}),
            }
        ),
        "$defs": {"rule": rule, "when": {**_mapping(when), "required": []}, "use": _use()},
    }


_CONTAINS_USES: _Schema = {"anyOf": [{"const": USES}, {"type": "array", "contains": {"const": USES}}]}


def _use() -> _Schema:
    forwards = {"enum": [*FORWARDS, USES]}
    use = _mapping(
        {
            "backend": {"enum": list(available_backends())},
            "fence_forward": {
                "anyOf": [forwards, {"type": "array", "items": forwards}],
                "description": "Forwards that wait for SM-side D2H work.",
            },
            "options": {"type": "object"},
        }
    )
    use["required"] = ["backend"]
    positive = {"type": "integer", "minimum": 1}
    use["allOf"] = [
        {
            "if": {"properties": {"backend": {"const": backend}}, "required": ["backend"]},
            "then": {
                "properties": {"options": _mapping(dict.fromkeys(names, positive)) | {"required": []}},
                "required": ["backend", "fence_forward"] if backend == "fenced_kernel" else ["backend"],
            },
        }
        for backend, names in BACKEND_OPTIONS.items()
    ]
    return use


def _mapping(properties: _Schema) -> _Schema:
    """A mapping with exactly these keys."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _any_of(one: _Schema) -> _Schema:
    """A value, or a list of values, of which any may hold."""
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
