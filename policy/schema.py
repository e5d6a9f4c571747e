"""The policy file's format, version 1, as frozen models that refuse what they do not know.

Errors raised here are `problem` objects, whose text is meant for the user; `load` adds the file, the line and
the column, and words pydantic's own errors itself. `fields` checks the single values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sglang_hicache.policy import fields
from sglang_hicache.policy.conditions import Condition, Names, PageSizes, Versions
from sglang_hicache.policy.fields import USES, problem
from sglang_hicache.policy.reach import never_matches, shadows
from sglang_hicache.policy.vocabulary import (
    ATTENTION_BACKENDS,
    BACKEND_OPTIONS,
    DEVICES,
    KV_KINDS,
    MEM_LAYOUTS,
    NameProblem,
    check_name,
)

_AttentionBackends = Annotated[tuple[str, ...], fields.names("attention backend", ATTENTION_BACKENDS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class When(_Strict):
    """The conditions of a rule; all must hold. One that is left out is an empty tuple, and holds always."""

    attention_backend: _AttentionBackends = ()
    prefill_attention_backend: _AttentionBackends = ()
    decode_attention_backend: _AttentionBackends = ()
    gpu_arch: Annotated[tuple[str, ...], BeforeValidator(fields.gpu_archs)] = ()
    sgl_kernel: Annotated[tuple[str, ...], fields.specifiers("sgl_kernel")] = ()
    sglang: Annotated[tuple[str, ...], fields.specifiers("sglang")] = ()
    kv_kind: Annotated[tuple[str, ...], fields.names("KV kind", KV_KINDS)] = ()
    mem_layout: Annotated[tuple[str, ...], fields.names("memory layout", MEM_LAYOUTS)] = ()
    page_size: Annotated[tuple[int | str, ...], BeforeValidator(fields.page_sizes)] = ()
    device: Annotated[tuple[str, ...], fields.names("device", DEVICES)] = ()

    def written(self) -> dict[str, tuple[int | str, ...]]:
        """The conditions that the rule states, by key, as written."""
        return {key: getattr(self, key) for key in type(self).model_fields if getattr(self, key)}

    def conditions(self) -> dict[str, Condition]:
        """The conditions that the rule states, by key, as sets of accepted values."""
        return {key: _condition(key, values) for key, values in self.written().items()}

    @model_validator(mode="after")
    def _can_match(self) -> Self:
        if found := never_matches(self.conditions()):
            key, why = found
            raise problem(f"this rule can never match: {why}", at=(key,))
        return self


def _condition(key: str, values: tuple[int | str, ...]) -> Condition:
    if key == "page_size":
        return PageSizes.of(values)
    words = [str(value) for value in values]
    return Versions.of(words) if key in ("sgl_kernel", "sglang") else Names.of(key, words)


class Use(_Strict):
    """What a rule chooses: a backend, the forwards that wait for its SM-side work, and its options."""

    backend: Annotated[str, BeforeValidator(fields.backend)]
    fence_forward: Annotated[tuple[str, ...], BeforeValidator(fields.fences)] = ()
    options: Annotated[dict[str, Any], BeforeValidator(fields.options)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_the_backend(self) -> Self:
        if self.backend == "fenced_kernel" and "fence_forward" not in self.model_fields_set:
            raise problem("fenced_kernel needs an explicit fence_forward; [] means the producer fence only")
        known = BACKEND_OPTIONS.get(self.backend)
        if known is None:
            return self
        for name, value in self.options.items():
            try:
                check_name(f"option of {self.backend}", str(name), known)
            except NameProblem as error:
                raise problem(error.message, error.hint, at=("options", name), key=True) from None
            if type(value) is not int or value < 1:
                raise problem(
                    f"{name} must be a whole number above 0, not {fields.shown(value)}", at=("options", name)
                )
        return self


class Rule(_Strict):
    """One rule: when all of ``when`` holds, do ``use``; ``because`` says what was seen and where."""

    name: Annotated[str, fields.text("name")]
    when: When
    use: Use
    because: Annotated[str, fields.text("because")]

    @model_validator(mode="after")
    def _is_clear(self) -> Self:
        if self.name == "default":
            raise problem(
                "'default' is what answers when no rule matches; give the rule another name", at=("name",)
            )
        named = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
        if USES in self.use.fence_forward and not any(getattr(self.when, key) for key in named):
            raise problem("uses needs attention_backend in when", at=("use", "fence_forward"))
        return self


class Default(_Strict):
    """What is done when no rule matches."""

    use: Use
    because: Annotated[str, fields.text("because")]

    @model_validator(mode="after")
    def _names_its_forwards(self) -> Self:
        if USES in self.use.fence_forward:
            raise problem(
                "uses needs attention_backend in when, and default has no when", at=("use", "fence_forward")
            )
        return self


class PolicyFile(_Strict):
    """A whole policy file."""

    version: Annotated[Literal[1], BeforeValidator(fields.version_1)]
    rules: tuple[Rule, ...]
    default: Default

    @model_validator(mode="after")
    def _every_rule_counts(self) -> Self:
        conditions = [rule.when.conditions() for rule in self.rules]
        for index, rule in enumerate(self.rules):
            for before in range(index):
                earlier = self.rules[before].name
                if earlier == rule.name:
                    raise problem(f"a second rule with the name '{rule.name}'", at=("rules", index, "name"))
                if shadows(conditions[before], conditions[index]):
                    why = f"rule '{earlier}' before it matches whenever it does"
                    raise problem(f"rule '{rule.name}' can never match: {why}", at=("rules", index, "name"))
        return self


@dataclass(frozen=True)
class Policy:
    """A policy that passed every check, and where it came from: a file's name, or "shipped default"."""

    file: PolicyFile
    source: str

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self.file.rules

    @property
    def default(self) -> Default:
        return self.file.default
