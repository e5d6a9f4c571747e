"""The policy file's format, version 1, as frozen models that refuse what they do not know.

Errors raised here are `problem` objects, whose text is meant for the user; `load` adds the file, the line and
the column, and `validation_errors` words pydantic's own. `validators` checks the single values, `layers` what
several rules and files mean together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    model_validator,
)

from ..backend_spec import SmWork
from ..conditions import Condition, condition
from ..fact_table import ANY_ATTENTION, ATTENTION_FACTS, CONDITIONS
from ..names import NameProblem, nearest
from . import validators
from .reachability import never_matches
from .validators import USES, problem

#: Each rule is compared with every one before it, when it is read and when a server starts.
MOST_RULES = 500

#: What a condition's values are, as written: a number may be a comparison.
_VALUES = {str: tuple[str, ...], int: tuple[int | str, ...], bool: tuple[bool, ...]}
_Unmeasured = Annotated[dict[str, str], BeforeValidator(validators.unmeasured)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Conditions(_Strict):
    """The conditions of a rule; all must hold. One that is left out is an empty tuple, and holds always.

    Those about one write are answered when it happens; the others are about the server, and are answered
    once.
    """

    def written(self) -> dict[str, tuple[int | str | bool, ...]]:
        """The conditions that the rule states, by key, as written."""
        return {key: getattr(self, key) for key in type(self).model_fields if getattr(self, key)}

    def on_writes(self) -> dict[str, tuple[int | str | bool, ...]]:
        """Those of `written` that are about a write."""
        return {key: values for key, values in self.written().items() if CONDITIONS[key].of_write}

    def conditions(self) -> dict[str, Condition]:
        """The conditions that the rule states, by key, as sets of accepted values."""
        return {key: condition(key, values) for key, values in self.written().items()}

    def server_conditions(self) -> dict[str, Condition]:
        """Those of `conditions` that are about the server."""
        return {key: each for key, each in self.conditions().items() if not CONDITIONS[key].of_write}


if TYPE_CHECKING:
    When = _Conditions
else:
    #: A field for each of `CONDITIONS`.
    When = create_model(
        "When",
        __base__=_Conditions,
        **{
            key: (Annotated[_VALUES[spec.python_type], validators.condition_on(spec)], ())
            for key, spec in CONDITIONS.items()
        },
    )


class Use(_Strict):
    """What a rule chooses: a backend, the forwards that wait for its SM-side work, and its options."""

    backend: Annotated[str, BeforeValidator(validators.backend)]
    fence_forward: Annotated[tuple[str, ...], BeforeValidator(validators.fences)] = ()
    options: Annotated[dict[str, Any], BeforeValidator(validators.options)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_the_backend(self, info: ValidationInfo) -> Self:
        spec = validators.backends_of(info)[self.backend]
        if spec.sm_work is SmWork.TRANSFER and "fence_forward" not in self.model_fields_set:
            raise problem(f"{self.backend} needs an explicit fence_forward; [] means the producer fence only")
        for name, value in self.options.items():
            try:
                spec.check_option(str(name), value)
            except NameProblem as error:
                is_key = error.message.startswith("unknown option")
                raise problem(error.message, error.hint, at=("options", name), key=is_key) from None
        return self


class Rule(_Strict):
    """One rule: when all of ``when`` holds, do ``use``; ``because`` says what was seen and where.

    ``unknown`` lists the conditions that an unknown fact satisfies (``match`` in the file: all of them), and
    ``unmeasured`` the parts of the rule that rest on no measurement, by path.
    """

    name: Annotated[str, validators.text("name", most=validators.MOST_CHARACTERS)]
    when: When
    unknown: Annotated[tuple[str, ...], BeforeValidator(validators.unknown)] = ()
    use: Use
    because: Annotated[str, validators.text("because")]
    unmeasured: Annotated[dict[str, str], BeforeValidator(validators.unmeasured)] = Field(
        default_factory=dict
    )

    def unknown_matches(self) -> frozenset[str]:
        """The conditions, by key, that an unknown fact satisfies."""
        if validators.MATCH in self.unknown:
            return frozenset(self.when.server_conditions())
        return frozenset(self.unknown)

    @model_validator(mode="after")
    def _is_clear(self) -> Self:
        if self.name == "default":
            raise problem(
                "'default' is what answers when no rule matches; give the rule another name", at=("name",)
            )
        stated = self.when.written()
        if USES in self.use.fence_forward and not {ANY_ATTENTION.name, *ATTENTION_FACTS} & stated.keys():
            raise problem("uses needs attention_backend in when", at=("use", "fence_forward"))
        on_server = [key for key in stated if not CONDITIONS[key].of_write]
        for key in self.unknown:
            if key == validators.MATCH and not on_server:
                raise problem(
                    "unknown says nothing here: when has no condition on the server", at=("unknown",)
                )
            if key != validators.MATCH and key not in on_server:
                hint = nearest(key, on_server)
                message = f"unknown names '{key}', but when has no condition on such a fact of the server"
                raise problem(message, hint, at=("unknown",))
        if found := never_matches(self.when.conditions(), self.unknown_matches()):
            key, why = found
            raise problem(f"this rule can never match: {why}", at=("when", key))
        _check_unmeasured(self.unmeasured, self.use, stated)
        return self


class Default(_Strict):
    """What is done when no rule matches."""

    use: Use
    because: Annotated[str, validators.text("because")]
    unmeasured: Annotated[dict[str, str], BeforeValidator(validators.unmeasured)] = Field(
        default_factory=dict
    )

    @model_validator(mode="after")
    def _names_its_forwards(self) -> Self:
        if USES in self.use.fence_forward:
            raise problem(
                "uses needs attention_backend in when, and default has no when", at=("use", "fence_forward")
            )
        _check_unmeasured(self.unmeasured, self.use, {})
        return self


class PolicyFile(_Strict):
    """A whole policy file. ``default`` may only be left out where ``extends`` names a policy that has one."""

    version: Annotated[Literal[1], BeforeValidator(validators.version_1)]
    extends: Annotated[str | None, BeforeValidator(validators.extends)] = None
    rules: tuple[Rule, ...]
    default: Default | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.default is None and self.extends is None:
            raise problem(
                "'default' is missing; 'extends: default' takes the shipped rules for all the rest",
                at=("default",),
            )
        seen: set[str] = set()
        for index, rule in enumerate(self.rules):
            if index == MOST_RULES:
                raise problem(f"a policy has at most {MOST_RULES} rules", at=("rules", index))
            if rule.name in seen:
                raise problem(f"a second rule with the name '{rule.name}'", at=("rules", index, "name"))
            seen.add(rule.name)
        return self


def _check_unmeasured(unmeasured: dict[str, str], use: Use, stated: dict[str, Any]) -> None:
    """Every path must lead to something that the rule says."""
    paths = [*(f"when.{key}" for key in stated), "use.backend", "use.fence_forward"]
    paths += [f"use.options.{name}" for name in use.options]
    for path in unmeasured:
        if path not in paths:
            message = f"unmeasured names '{path}', which the rule does not have"
            raise problem(message, nearest(path, paths), at=("unmeasured", path), key=True)
