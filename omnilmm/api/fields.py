"""What the bodies of several routes share: strictness, a bound on everything, and the fields that say how to sample.

Rules that hold on every route:

- Every field that is accepted is obeyed. A field we do not have is `unknown_parameter`; a value of a field we do have
  that we cannot obey (`store` of true) is `unsupported_value`.
- null for an optional field means that it was left out.
- No coercion: true is not 1, "3" is not 3, 1.0 is not an integer. An integer is a fine decimal number.
- A number outside its range is `integer_...` or `decimal_above_max_value` / `..._below_min_value`.
- `user`, `safety_identifier` and `metadata` travel with the request and change nothing about the answer.
- `prompt_cache_key` keeps requests that share it on one decoder, whose KV cache then knows their beginning. It is a
  wish about speed: no vector and no answer is ever found by it.
- `seed` is not negative. `top_k` of 0 or -1 means off.
- A text beyond MAX_TEXT_CHARS is `context_length_exceeded`: no model here reads that far, and nothing is tokenised
  to find out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from omnilmm.api.strict_json import MAX_MEMBERS
from omnilmm.messages import ChatRequest, Conversation, Grammar, Priority

MAX_TEXT_CHARS = 1 << 20
MAX_TOKENS = 1 << 20
MAX_TOKEN_ID = 999_999
MAX_SEED = 2**63 - 1
MAX_CHOICES = 16
"""Answers to one prompt."""


@dataclass(frozen=True, slots=True)
class Only:
    """Of all values of the right type, those we can obey. The JSON schema shows them as an enum."""

    values: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.values)}

    def _check(self, value: Any) -> Any:
        if value not in self.values:
            supported = " or ".join(json.dumps(value) for value in self.values)
            raise PydanticCustomError("unsupported_value", "can only be {supported} here", {"supported": supported})
        return value


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def shape(value: object) -> str | None:
    """Tag of a field that is a string or an array."""
    return "string" if isinstance(value, str) else "array" if isinstance(value, (list, tuple)) else None


def disagreement(param: str, words: str) -> PydanticCustomError:
    """What a validator of a whole body raises; `words` go on after the name of the field."""
    return PydanticCustomError("invalid_value", words, {"param": param})


Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[tuple[StopString, ...], Field(strict=False, max_length=4)]
Stop = Annotated[Annotated[StopString, Tag("string")] | Annotated[StopStrings, Tag("array")], Discriminator(shape)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIdText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,5})$", max_length=6)]
Bias = Annotated[float, Field(ge=-100, le=100)]
NumTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
NumTop = Annotated[int, Field(ge=0, le=20)]
ServiceTier = Annotated[
    Literal["auto", "default", "flex", "scale", "priority", "fast"],
    Only(("auto", "default")),
]
FileId = Annotated[str, Field(pattern=r"^file-[A-Za-z0-9_-]{1,128}$", max_length=133)]
Label = Annotated[str, Field(max_length=256)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
Detail = Literal["auto", "low", "high", "original"]
"""Of a picture. It changes nothing: in these models a picture costs the same at every detail."""


class StreamOptions(Strict):
    include_usage: bool | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """What the router knows of a request besides its body. `session` is a hint that keeps a conversation together."""

    request_id: str
    tenant: str = "default"
    scope: str = "default"
    weight: float = 1.0
    priority: Priority = Priority.ONLINE
    adapter: str | None = None
    timeout_s: float = 300.0
    session: str | None = None


class SamplingFields(Strict):
    """Who answers, and how the next token is drawn: the same fields on every route that answers."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[TokenIdText, Bias], Field(max_length=MAX_MEMBERS, json_schema_extra={"additionalProperties": False})
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(strict=False, max_length=64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    service_tier: ServiceTier | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    metadata: Metadata | None = None

    def check_min_tokens(self, limit: int | None) -> None:
        """For validators of the whole body. `limit` is the largest number of tokens asked for."""
        if self.min_tokens is not None and limit is not None and self.min_tokens > limit:
            raise disagreement("min_tokens", "is more than the largest number of tokens asked for")

    def request(
        self,
        caller: Caller,
        *,
        conversation: Conversation | None = None,
        raw: str | tuple[int, ...] | None = None,
        grammar: Grammar | None = None,
        max_tokens: int | None,
        logprobs: int | None,
    ) -> ChatRequest:
        """The request for one answer as the flow takes it."""
        return ChatRequest(
            request_id=caller.request_id,
            conversation=conversation or Conversation(()),
            raw=raw,
            grammar=grammar,
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items()),
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else self.stop or (),
            stop_ids=self.stop_token_ids or (),
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            tenant=caller.tenant,
            scope=caller.scope,
            adapter=caller.adapter,
            priority=caller.priority,
            weight=caller.weight,
            timeout_s=caller.timeout_s,
            session=caller.session if caller.session is not None else self.prompt_cache_key,
            metadata=tuple((self.metadata or {}).items()),
        )


Files = Mapping[str, bytes]
"""The pictures of a request by their param, read beforehand."""
