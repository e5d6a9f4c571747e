"""What a server says of itself in ``/server_info``, as far as a stress test needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .answers import Info, JsonScalar, understood

BF16_TIE_NATS = 0.25
"""Two logits between 16 and 32, each rounded to bfloat16 (8 significant bits: steps of 1/8), may change their
difference by this much. By arithmetic, unmeasured; larger logits have coarser steps."""

_SHOWN = (
    *("model_path", "device", "dtype", "tp_size", "attention_backend", "prefill_attention_backend"),
    *("decode_attention_backend", "page_size", "mem_fraction_static", "chunked_prefill_size"),
    *("disable_overlap_schedule", "enable_deterministic_inference", "enable_hierarchical_cache"),
    *("hicache_ratio", "hicache_size", "hicache_write_policy", "hicache_io_backend", "hicache_mem_layout"),
)


@dataclass(frozen=True)
class ServerFacts:
    """A server's own account.

    Attributes:
        version: of SGLang.
        pool_tokens: capacity of the device pool of one replica.
        context_tokens: the longest prompt and answer together, or None where it does not say.
        settings: its options, as far as they matter here.
        plugin: this plug-in's account, counters summed over schedulers; None where it does not run.
    """

    version: str
    pool_tokens: int
    context_tokens: int | None
    settings: Mapping[str, Any]
    plugin: Mapping[str, Any] | None

    @classmethod
    def of(cls, answer: object) -> ServerFacts:
        """From the answer of ``/server_info``, as parsed.

        Raises:
            NotUnderstoodError: it is none of SGLang's.
        """
        info = understood(Info, answer)
        said = info.model_extra or {}
        return cls(
            version=info.version,
            pool_tokens=info.max_total_num_tokens,
            context_tokens=info.context_length,
            settings={name: said[name] for name in _SHOWN if name in said and _is_setting(said[name])},
            plugin=_plugin(info),
        )

    @property
    def unsafe_fences(self) -> str | None:
        """Which fences an experiment left in place (``--hicache-io-unsafe-fences``); None without one."""
        return self.plugin.get("unsafe_fences") if self.plugin else None

    @property
    def hicache(self) -> bool:
        """Whether it has a host tier."""
        return bool(self.settings.get("enable_hierarchical_cache"))

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on SGLang's CPU engine."""
        return self.settings.get("device") == "cpu"

    def tie_nats(self) -> float:
        """How close the two likeliest tokens must be for rounding to swap them, as far as is known here."""
        exact = self.settings.get("enable_deterministic_inference") or (
            self.on_cpu and self.settings.get("dtype") == "float32"
        )
        return 0.0 if exact else BF16_TIE_NATS

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "sglang": self.version,
            "pool_tokens": self.pool_tokens,
            "context_tokens": self.context_tokens,
            **self.settings,
            "plugin": self.plugin,
        }


_SETTING: TypeAdapter[JsonScalar] = TypeAdapter(JsonScalar)


def _is_setting(value: object) -> bool:
    try:
        _SETTING.validate_python(value)
    except ValidationError:
        return False
    return True


def _plugin(info: Info) -> dict[str, Any] | None:
    states = [state.hicache_io for state in info.internal_states if state.hicache_io is not None]
    if not states:
        return None
    counters = {name: sum(state.counters.get(name, 0) for state in states) for name in states[0].counters}
    return {**states[0].model_dump(), "counters": counters}
