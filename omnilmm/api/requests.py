"""The body of ``POST /v1/chat/completions``: OpenAI's fields, vLLM's extras, and a bound on every one of them.

Beside the rules of every route (`omnilmm.api.fields`):

- `developer` is another name for `system`. Pictures stand in user messages only. `refusal`, `audio`, `tool_calls`
  and `function_call` of an assistant message may be null, because answers sent back to us carry them so.
- A picture is an `image_url` part, whose URL may also be the id of an uploaded file, or a `file` part with a `file_id`.
- `n` answers to one prompt have seeds of their own, derived from `seed`: the first is the answer `n` of 1 would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from omnilmm.api.fields import (
    MAX_CHOICES,
    Caller,
    Detail,
    FileId,
    Files,
    NumTokens,
    NumTop,
    Only,
    SamplingFields,
    StreamOptions,
    Strict,
    Text,
    disagreement,
    shape,
)
from omnilmm.api.formats import ResponseFormat
from omnilmm.api.refusals import validate
from omnilmm.api.rendering import ChatRendering
from omnilmm.api.responses import Heading
from omnilmm.api.strict_json import MAX_BODY_BYTES, parse_json
from omnilmm.messages import ChatRequest, Conversation, ImagePart, Role, TextPart, Turn

MAX_MESSAGES = 2048
MAX_PARTS = 256


class TextContent(Strict):
    type: Literal["text"]
    text: Text


class ImageUrl(Strict):
    url: Annotated[str, Field(max_length=MAX_BODY_BYTES)]  # the image room judges it; it cannot outgrow the body
    detail: Detail | None = None


class ImageContent(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl

    def reference(self) -> tuple[str, str]:
        return self.image_url.url, "image_url.url"


class FileObject(Strict):
    file_id: FileId


class FileContent(Strict):
    type: Literal["file"]
    file: FileObject

    def reference(self) -> tuple[str, str]:
        return self.file.file_id, "file.file_id"


UserPart = Annotated[TextContent | ImageContent | FileContent, Discriminator("type")]
UserParts = Annotated[tuple[UserPart, ...], Field(strict=False, min_length=1, max_length=MAX_PARTS, fail_fast=True)]
TextParts = Annotated[tuple[TextContent, ...], Field(strict=False, min_length=1, max_length=MAX_PARTS, fail_fast=True)]
UserWords = Annotated[Annotated[Text, Tag("string")] | Annotated[UserParts, Tag("array")], Discriminator(shape)]
Words = Annotated[Annotated[Text, Tag("string")] | Annotated[TextParts, Tag("array")], Discriminator(shape)]


class SystemMessage(Strict):
    role: Literal["system"]
    content: Words


class DeveloperMessage(Strict):
    role: Literal["developer"]
    content: Words


class UserMessage(Strict):
    role: Literal["user"]
    content: UserWords


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Words
    refusal: None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None


Message = Annotated[SystemMessage | DeveloperMessage | UserMessage | AssistantMessage, Discriminator("role")]
Messages = Annotated[tuple[Message, ...], Field(strict=False, min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Modality = Literal["text", "audio"]

MESSAGE_UNIONS = frozenset(
    {
        ("messages", "*"),
        *(("messages", "*", role, "content") for role in ("system", "developer", "user", "assistant")),
        ("messages", "*", "user", "content", "array", "*"),
    }
)
UNIONS = MESSAGE_UNIONS | {("stop",), ("response_format",)}


class ChatCompletionRequest(SamplingFields):
    messages: Messages
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: NumTop | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[tuple[Modality, ...], Field(strict=False, max_length=2), Only((("text",),))] | None = None
    store: Annotated[bool, Only((False,))] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise disagreement("max_tokens", "cannot be given together with 'max_completion_tokens'")
        self.check_min_tokens(self.token_limit)
        if self.top_logprobs is not None and not self.logprobs:
            raise disagreement("top_logprobs", "needs 'logprobs' to be true")
        if self.stream_options is not None and not self.stream:
            raise disagreement("stream_options", "needs 'stream' to be true")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """The client asked for the usage at the end of the stream."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    def pictures(self) -> Iterator[tuple[str, str]]:
        """(URL or file id, param) of every picture, in order of appearance. No two have the same param."""
        return message_pictures(self.messages)

    def to_requests(self, caller: Caller, files: Files) -> tuple[ChatRequest, ...]:
        """One prompt, so one request. `files` has the bytes of every picture of `pictures()` by param."""
        conversation = message_conversation(self.messages, files)
        grammar = self.response_format.grammar() if self.response_format is not None else None
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        one = self.request(
            caller, conversation=conversation, grammar=grammar, max_tokens=self.token_limit, logprobs=logprobs
        )
        return (one,)

    def rendering(self, heading: Heading) -> ChatRendering:
        return ChatRendering(heading, self.num_choices, self.include_usage)

    def place(self, param: str | None) -> str | None:
        """The field an error of the flow is about; the flow speaks of chat completions, so it is the same."""
        return param


def parse_chat_request(body: bytes) -> ChatCompletionRequest:
    """Read and check a body.

    Raises:
        InvalidRequest: with the `code` OpenAI uses and the exact place as `param`.
        PayloadTooLarge: the body is over MAX_BODY_BYTES.
    """
    return validate(ChatCompletionRequest, parse_json(body), UNIONS)


# -- on to the flow -----------------------------------------------------------------------------------


def message_pictures(messages: tuple[Message, ...]) -> Iterator[tuple[str, str]]:
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content if isinstance(message.content, tuple) else ()):
            if not isinstance(part, TextContent):
                reference, field = part.reference()
                yield reference, f"messages[{i}].content[{j}].{field}"


def message_conversation(messages: tuple[Message, ...], files: Mapping[str, bytes]) -> Conversation:
    """The messages as turns, with the bytes of their pictures."""
    parts = iter([ImagePart(data=files[param], param=param) for _, param in message_pictures(messages)])
    return Conversation(tuple(_turn(message, parts) for message in messages))


def _turn(message: Message, pictures: Iterator[ImagePart]) -> Turn:
    role: Role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Turn(role, (TextPart(message.content),))
    return Turn(
        role,
        tuple(TextPart(part.text) if isinstance(part, TextContent) else next(pictures) for part in message.content),
    )
