"""The body of ``POST /v1/chat/completions``: OpenAI's fields, vLLM's extras, and a bound on every one of them.

Rules that are ours to choose:

- Every field that is accepted is obeyed. A field we do not have is `unknown_parameter`; a value of a field we do have
  that we cannot obey (`n` of 2, `store` of true, a JSON `response_format`) is `unsupported_value`.
- null for an optional field means that it was left out.
- No coercion: true is not 1, "3" is not 3, 1.0 is not an integer. An integer is a fine decimal number.
- A number outside its range is `integer_...` or `decimal_above_max_value` / `..._below_min_value`.
- `developer` is another name for `system`. Pictures stand in user messages only. `refusal`, `audio`, `tool_calls`
  and `function_call` of an assistant message may be null, because answers sent back to us carry them so.
- `detail` of a picture is accepted and changes nothing: in these models a picture costs the same at every detail.
- `user` and `metadata` travel with the request and change nothing about the answer.
- `seed` is not negative. `top_k` of 0 or -1 means off.
- A text beyond MAX_TEXT_CHARS is `context_length_exceeded`: no model here reads that far, and nothing is tokenised
  to find out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from omnilmm.api.refusals import refusal
from omnilmm.api.strict_json import MAX_BODY_BYTES, MAX_MEMBERS, parse_json
from omnilmm.config import ImageLimits
from omnilmm.errors import InvalidRequest
from omnilmm.messages import ChatRequest, Conversation, ImagePart, Role, TextPart, Turn

MAX_MESSAGES = 2048
MAX_PARTS = 256
MAX_TEXT_CHARS = 1 << 20
MAX_TOKENS = 1 << 20
MAX_TOKEN_ID = 999_999
MAX_SEED = 2**63 - 1

ReadImage = Callable[[str, str], bytes]
"""(url, param) to the bytes of the file; raises ImageError with that param."""


@dataclass(frozen=True, slots=True)
class _Only:
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


def _shape(value: object) -> str | None:
    """Tag of a field that is a string or an array."""
    return "string" if isinstance(value, str) else "array" if isinstance(value, (list, tuple)) else None


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


# -- messages -----------------------------------------------------------------------------------------

Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


class TextContent(_Strict):
    type: Literal["text"]
    text: Text


class ImageUrl(_Strict):
    url: Annotated[str, Field(max_length=MAX_BODY_BYTES)]  # the image room judges it; it cannot outgrow the body
    detail: Literal["auto", "low", "high"] | None = None


class ImageContent(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


UserPart = Annotated[TextContent | ImageContent, Discriminator("type")]
UserParts = Annotated[tuple[UserPart, ...], Field(strict=False, min_length=1, max_length=MAX_PARTS, fail_fast=True)]
TextParts = Annotated[tuple[TextContent, ...], Field(strict=False, min_length=1, max_length=MAX_PARTS, fail_fast=True)]
UserWords = Annotated[Annotated[Text, Tag("string")] | Annotated[UserParts, Tag("array")], Discriminator(_shape)]
Words = Annotated[Annotated[Text, Tag("string")] | Annotated[TextParts, Tag("array")], Discriminator(_shape)]


class SystemMessage(_Strict):
    role: Literal["system"]
    content: Words


class DeveloperMessage(_Strict):
    role: Literal["developer"]
    content: Words


class UserMessage(_Strict):
    role: Literal["user"]
    content: UserWords


class AssistantMessage(_Strict):
    role: Literal["assistant"]
    content: Words
    refusal: None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None


Message = Annotated[SystemMessage | DeveloperMessage | UserMessage | AssistantMessage, Discriminator("role")]


# -- the request --------------------------------------------------------------------------------------


class StreamOptions(_Strict):
    include_usage: bool | None = None


class ResponseFormat(_Strict):
    type: Annotated[Literal["text", "json_object", "json_schema"], _Only(("text",))]


StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[tuple[StopString, ...], Field(strict=False, max_length=4)]
Stop = Annotated[Annotated[StopString, Tag("string")] | Annotated[StopStrings, Tag("array")], Discriminator(_shape)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIdText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,5})$", max_length=6)]
Bias = Annotated[float, Field(ge=-100, le=100)]
NumTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Modality = Literal["text", "audio"]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast"]


class ChatCompletionRequest(_Strict):
    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[tuple[Message, ...], Field(strict=False, min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
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
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    n: Annotated[int, Field(ge=1, le=128), _Only((1,))] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[tuple[Modality, ...], Field(strict=False, max_length=2), _Only((("text",),))] | None = None
    service_tier: Annotated[ServiceTier, _Only(("auto", "default"))] | None = None
    store: Annotated[bool, _Only((False,))] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        limit = self.token_limit
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise _disagreement("max_tokens", "cannot be given together with 'max_completion_tokens'")
        if self.min_tokens is not None and limit is not None and self.min_tokens > limit:
            raise _disagreement("min_tokens", "is more than the largest number of tokens asked for")
        if self.top_logprobs is not None and not self.logprobs:
            raise _disagreement("top_logprobs", "needs 'logprobs' to be true")
        if self.stream_options is not None and not self.stream:
            raise _disagreement("stream_options", "needs 'stream' to be true")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """The client asked for the usage at the end of the stream."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def pictures(self) -> Iterator[tuple[str, str]]:
        """(url, param) of every picture, in order of appearance. No two have the same param."""
        for i, message in enumerate(self.messages):
            for j, part in enumerate(message.content if isinstance(message.content, tuple) else ()):
                if isinstance(part, ImageContent):
                    yield part.image_url.url, f"messages[{i}].content[{j}].image_url.url"


UNIONS = frozenset(
    {
        ("stop",),
        ("messages", "*"),
        *(("messages", "*", role, "content") for role in ("system", "developer", "user", "assistant")),
        ("messages", "*", "user", "content", "array", "*"),
    }
)


def _disagreement(param: str, words: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", words, {"param": param})


def parse_chat_request(body: bytes) -> ChatCompletionRequest:
    """Read and check a body.

    Raises:
        InvalidRequest: with the `code` OpenAI uses and the exact place as `param`.
        PayloadTooLarge: the body is over MAX_BODY_BYTES.
    """
    document = parse_json(body)
    try:
        return ChatCompletionRequest.model_validate(document)
    except ValidationError as error:
        raise refusal(error, document, UNIONS) from None


# -- on to the flow -----------------------------------------------------------------------------------


def to_chat_request(
    parsed: ChatCompletionRequest,
    *,
    request_id: str,
    read_image: ReadImage,
    limits: ImageLimits,
    tenant: str = "default",
    scope: str = "default",
    timeout_s: float = 300.0,
) -> ChatRequest:
    """The request as the flow takes it, pictures read.

    Pictures that must be awaited (a download, a stored file) can be fetched beforehand from `parsed.pictures()`;
    `read_image` then only looks them up by param.

    Raises:
        InvalidRequest: more pictures than `limits.max_images`; `param` is the first one too many.
        ImageError: from `read_image`.
    """
    pictures = list(parsed.pictures())
    if len(pictures) > limits.max_images:
        raise InvalidRequest(
            f"A request holds at most {limits.max_images} pictures.",
            param=pictures[limits.max_images][1],
            code="array_above_max_length",
        )
    files = iter([ImagePart(data=read_image(url, param), param=param) for url, param in pictures])
    return ChatRequest(
        request_id=request_id,
        conversation=Conversation(tuple(_turn(message, files) for message in parsed.messages)),
        max_tokens=parsed.token_limit,
        temperature=parsed.temperature,
        top_p=parsed.top_p,
        top_k=None if parsed.top_k is None else max(parsed.top_k, 0),
        min_p=parsed.min_p,
        repetition_penalty=parsed.repetition_penalty,
        presence_penalty=parsed.presence_penalty or 0.0,
        frequency_penalty=parsed.frequency_penalty or 0.0,
        logit_bias=tuple((int(token_id), bias) for token_id, bias in (parsed.logit_bias or {}).items()),
        seed=parsed.seed,
        stop=(parsed.stop,) if isinstance(parsed.stop, str) else parsed.stop or (),
        stop_ids=parsed.stop_token_ids or (),
        min_tokens=parsed.min_tokens or 0,
        ignore_eos=bool(parsed.ignore_eos),
        logprobs=(parsed.top_logprobs or 0) if parsed.logprobs else None,
        tenant=tenant,
        scope=scope,
        timeout_s=timeout_s,
        metadata=tuple((parsed.metadata or {}).items()),
    )


def _turn(message: Message, files: Iterator[ImagePart]) -> Turn:
    role: Role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Turn(role, (TextPart(message.content),))
    return Turn(
        role,
        tuple(TextPart(part.text) if isinstance(part, TextContent) else next(files) for part in message.content),
    )
