"""Whether a rule can be reached at all: contradictions within its ``when``, and rules before it that cover
it.

Both answers are sound: a rule is only refused when no facts, known or not, and no write exist for which it
would be the first match. What cannot be decided (pre-release specifiers, several earlier rules that cover one
only together) is let through.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from ..conditions import Condition, Names
from ..fact_table import ANY_ATTENTION, ATTENTION_FACTS, SERVER_FACTS
from ..names import NO_SPECULATION

_EITHER = ANY_ATTENTION.name
_ALWAYS = tuple(name for name in ATTENTION_FACTS if not SERVER_FACTS[name].speculative_only)
_SPECULATIVE = tuple(name for name in ATTENTION_FACTS if SERVER_FACTS[name].speculative_only)


@dataclass(frozen=True)
class Reach:
    """What a rule accepts: its conditions by key, and which of them an unknown fact satisfies."""

    conditions: Mapping[str, Condition]
    unknown: Set[str] = frozenset()


def never_matches(
    conditions: Mapping[str, Condition], unknown: Set[str] = frozenset()
) -> tuple[str, str] | None:
    """The key of a condition that keeps the rule from ever matching, and why; None when there is none."""
    for key, condition in conditions.items():
        if key not in unknown and condition.is_empty():
            return key, f"no value satisfies {key}"
    if found := _attention_excluded(conditions, unknown):
        return found
    archs, devices = _names(conditions, "gpu_arch"), _names(conditions, "device")
    surely_known = not {"gpu_arch", "device"} & unknown
    if surely_known and archs and devices and not devices & {_device_of(arch) for arch in archs}:
        return "device", "no gpu_arch that it lists is on such a device"
    return None


def shadows(earlier: Reach, later: Reach) -> bool:
    """Whether all facts and writes that `later` matches are matched by `earlier` too, key by key."""
    return all(
        _implies(later, key, wanted, key in earlier.unknown) for key, wanted in earlier.conditions.items()
    )


def _attention_excluded(conditions: Mapping[str, Condition], unknown: Set[str]) -> tuple[str, str] | None:
    """Whether no attention backend that may run can be one that ``attention_backend`` names."""
    running = [*_ALWAYS]
    if _names(conditions, "speculative") != {NO_SPECULATION} or "speculative" in unknown:
        running += _SPECULATIVE
    either = _names(conditions, _EITHER)
    stated = [_names(conditions, key) for key in running]
    if not either or not all(stated) or {_EITHER, *running} & unknown or either & frozenset().union(*stated):
        return None
    return _EITHER, f"neither {', '.join(running[:-1])} nor {running[-1]} allows a backend of {_EITHER}"


def _implies(later: Reach, key: str, wanted: Condition, wants_unknown: bool) -> bool:
    """Whether `later` leaves `key` no value outside `wanted`, unknown included."""
    # The attention backends of prefill and decode always run, so a condition on one of them alone ensures
    # "any backend that runs"; one on verification or drafts does not, without speculative decoding.
    keys: tuple[str, ...] = (key,)
    if key == _EITHER:
        keys = (_EITHER, *_ALWAYS, *(_SPECULATIVE if _speculates(later) else ()))
    return any(
        each in later.conditions
        and later.conditions[each].within(wanted)
        and (wants_unknown or each not in later.unknown)
        for each in keys
    )


def _speculates(reach: Reach) -> bool:
    """Whether a rule only matches servers that surely use speculative decoding."""
    names = _names(reach.conditions, "speculative")
    return bool(names) and NO_SPECULATION not in names and "speculative" not in reach.unknown


def _device_of(arch: str) -> str:
    return "cpu" if arch == "cpu" else "cuda"


def _names(conditions: Mapping[str, Condition], key: str) -> frozenset[str]:
    condition = conditions.get(key)
    return condition.values if isinstance(condition, Names) else frozenset()
