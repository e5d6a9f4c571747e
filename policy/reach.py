"""Whether a rule can be reached at all: contradictions within its ``when``, and rules before it that cover
it.

Both answers are sound: a rule is only refused when no facts exist for which it would be the first match. What
cannot be decided (pre-release specifiers, several earlier rules that cover one only together) is let through.
"""

from __future__ import annotations

from collections.abc import Mapping

from sglang_hicache.policy.conditions import Condition, Names

_PREFILL, _DECODE, _EITHER = "prefill_attention_backend", "decode_attention_backend", "attention_backend"


def never_matches(conditions: Mapping[str, Condition]) -> tuple[str, str] | None:
    """The key of a condition that keeps the rule from ever matching, and why; None when there is none."""
    for key, condition in conditions.items():
        if condition.is_empty():
            return key, f"no value satisfies {key}"
    either, prefill, decode = (_names(conditions, key) for key in (_EITHER, _PREFILL, _DECODE))
    if either and prefill and decode and not either & (prefill | decode):
        return _EITHER, f"neither {_PREFILL} nor {_DECODE} allows a backend of {_EITHER}"
    archs, devices = _names(conditions, "gpu_arch"), _names(conditions, "device")
    if archs and devices and not devices & {"cpu" if arch == "cpu" else "cuda" for arch in archs}:
        return "device", "no gpu_arch that it lists is on such a device"
    return None


def shadows(earlier: Mapping[str, Condition], later: Mapping[str, Condition]) -> bool:
    """Whether every facts that `later` matches are matched by `earlier` too, key by key."""
    return all(_implies(later, key, condition) for key, condition in earlier.items())


def _implies(conditions: Mapping[str, Condition], key: str, wanted: Condition) -> bool:
    """Whether `conditions` leave `key` no value outside `wanted`."""
    # "Effective prefill or decode backend" also holds when a condition on one of the two alone ensures it.
    keys = (_EITHER, _PREFILL, _DECODE) if key == _EITHER else (key,)
    return any(key in conditions and conditions[key].within(wanted) for key in keys)


def _names(conditions: Mapping[str, Condition], key: str) -> frozenset[str]:
    condition = conditions.get(key)
    return condition.values if isinstance(condition, Names) else frozenset()
