"""What SGLang answers, as far as a stress test reads it: everything else is refused in a sentence."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError
from pydantic_core import from_json

MAX_POOL_TOKENS = 2**26
"""Capacity of the largest device pool that is believed, in tokens: a load is sized by it, and kept in memory.
At 35 KB a token (DeepSeek-V3 in fp8) that would be 2.3 TB on one GPU."""

Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
"""Exact in every JSON reader."""

_TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
LogProb = tuple[_Number, _TokenId, Any]
"""Nats, token, and its text, which is null without a tokenizer."""

JsonScalar = (
    StrictBool | Annotated[int, Field(strict=True, ge=-(2**53), le=2**53)] | _Number | StrictStr | None
)


class NotUnderstoodError(ValueError):
    """An answer that is none of SGLang's; the message says what is wrong with it, in one line."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class FinishReason(_Model):
    """Why an answer ended: ``length``, ``stop``, ``abort``, with what more is said."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: StrictStr


class Cached(_Model):
    """Tokens of a prompt's prefix by where they were found."""

    device: Count = 0
    host: Count = 0


class Meta(_Model):
    """``meta_info`` of an answer, or of a part of it."""

    completion_tokens: Count = 0
    cached_tokens: Count = 0
    finish_reason: FinishReason | None = None
    cached_tokens_details: Cached | None = None
    input_token_logprobs: list[tuple[_Number | None, _TokenId, Any]] | None = None
    input_top_logprobs: list[list[LogProb] | None] | None = None
    output_top_logprobs: list[list[LogProb] | None] | None = None

    @property
    def cached(self) -> Cached:
        """Without HiCache SGLang may give the number alone."""
        return self.cached_tokens_details or Cached(device=self.cached_tokens)


class StreamEvent(_Model):
    """One event of a stream, or a whole answer."""

    output_ids: list[_TokenId]
    meta_info: Meta


class PluginState(_Model):
    """This plug-in's account of itself in one scheduler."""

    model_config = ConfigDict(frozen=True, extra="allow")

    counters: dict[str, Count | _Number]
    unsafe_fences: StrictStr | None = None


class SchedulerState(_Model):
    """One entry of ``internal_states``."""

    hicache_io: PluginState | None = None


class Info(_Model):
    """``/server_info``."""

    model_config = ConfigDict(frozen=True, extra="allow")

    version: StrictStr
    max_total_num_tokens: Annotated[int, Field(strict=True, gt=0, le=MAX_POOL_TOKENS)]
    context_length: Annotated[int, Field(strict=True, gt=0, le=2**53)] | None = None
    internal_states: list[SchedulerState] = []


_M = TypeVar("_M", bound=BaseModel)


def understood(kind: type[_M], answer: object) -> _M:
    """``answer``, parsed JSON, as a ``kind``. Raises NotUnderstoodError."""
    try:
        return kind.model_validate(answer)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise NotUnderstoodError(f"{where}: {first['msg']}" if where else first["msg"]) from None


def parsed(text: bytes) -> Any:
    """JSON without NaN and infinities. Raises NotUnderstoodError."""
    try:
        return from_json(text, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise NotUnderstoodError(f"no JSON: {error}") from None
