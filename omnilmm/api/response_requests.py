"""The body of ``POST /v1/responses``: one answer to a text or a list of messages, in OpenAI's newer dialect.

Beside the rules of every route (`omnilmm.api.fields`):

- Nothing is stored. `store` can only be false, and is false if it is left out; `previous_response_id`, `conversation`
  and `background` are refused by name. A conversation goes on when the client sends it again: the items of `output`
  are taken back as they were sent.
- `instructions` are a system message in front. A system message that opens `input` goes on after them, behind an
  empty line.
- Items are messages; other kinds have no `role` and are refused for it.
- A picture is an `input_image` part with either `image_url` (also the id of an uploaded file) or `file_id`.
- vLLM's sampling fields are taken here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from omnilmm.api.fields import (
    MAX_TOKENS,
    Caller,
    Detail,
    FileId,
    Files,
    NumTop,
    Only,
    SamplingFields,
    Strict,
    Text,
    disagreement,
    shape,
)
from omnilmm.api.formats import FlatFormat
from omnilmm.api.refusals import validate
from omnilmm.api.requests import MAX_MESSAGES, MAX_PARTS
from omnilmm.api.response_objects import Echo, ResponseRendering
from omnilmm.api.responses import Heading
from omnilmm.api.strict_json import MAX_BODY_BYTES, MAX_MARKS, parse_json
from omnilmm.messages import ChatRequest, Conversation, ImagePart, Role, TextPart, Turn

LOGPROBS = "message.output_text.logprobs"
_MESSAGE_PARAM = re.compile(r"messages\[([0-9]+)\]")

# -- what comes in ------------------------------------------------------------------------------------


class InputText(Strict):
    type: Literal["input_text"]
    text: Text


class InputImage(Strict):
    type: Literal["input_image"]
    image_url: Annotated[str, Field(max_length=MAX_BODY_BYTES)] | None = None
    file_id: FileId | None = None
    detail: Detail | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.image_url is None) == (self.file_id is None):
            raise PydanticCustomError("invalid_value", "must have either 'image_url' or 'file_id'")
        return self

    def reference(self) -> tuple[str, str]:
        return (self.image_url, "image_url") if self.image_url is not None else (self.file_id or "", "file_id")


Byte = Annotated[int, Field(ge=0, le=255)]
TokenText = Annotated[str, Field(max_length=4096)]
TokenBytes = Annotated[tuple[Byte, ...], Field(strict=False, max_length=4096)]
Logprob = Annotated[float, Field(ge=-1e9, le=0)]


class OutputTopLogprob(Strict):
    token: TokenText
    logprob: Logprob
    bytes: TokenBytes | None = None


class OutputLogprob(OutputTopLogprob):
    top_logprobs: Annotated[tuple[OutputTopLogprob, ...], Field(strict=False, max_length=20)] | None = None


class OutputText(Strict):
    """A part of an earlier answer, as we sent it."""

    type: Literal["output_text"]
    text: Text
    annotations: Annotated[tuple[None, ...], Field(strict=False, max_length=0)] | None = None
    logprobs: Annotated[tuple[OutputLogprob, ...], Field(strict=False, max_length=MAX_MARKS)] | None = None


UserPart = Annotated[InputText | InputImage, Discriminator("type")]
AssistantPart = Annotated[OutputText | InputText, Discriminator("type")]
UserParts = Annotated[tuple[UserPart, ...], Field(strict=False, min_length=1, max_length=MAX_PARTS, fail_fast=True)]
TextParts = Annotated[tuple[InputText, ...], Field(strict=False, min_length=1, max_length=MAX_PARTS, fail_fast=True)]
AssistantParts = Annotated[
    tuple[AssistantPart, ...], Field(strict=False, min_length=1, max_length=MAX_PARTS, fail_fast=True)
]
UserWords = Annotated[Annotated[Text, Tag("string")] | Annotated[UserParts, Tag("array")], Discriminator(shape)]
Words = Annotated[Annotated[Text, Tag("string")] | Annotated[TextParts, Tag("array")], Discriminator(shape)]
AssistantWords = Annotated[
    Annotated[Text, Tag("string")] | Annotated[AssistantParts, Tag("array")], Discriminator(shape)
]
ItemId = Annotated[str, Field(max_length=256)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class SystemItem(Strict):
    role: Literal["system"]
    content: Words
    type: Literal["message"] | None = None


class DeveloperItem(Strict):
    role: Literal["developer"]
    content: Words
    type: Literal["message"] | None = None


class UserItem(Strict):
    role: Literal["user"]
    content: UserWords
    type: Literal["message"] | None = None


class AssistantItem(Strict):
    """Also an item of an earlier `output`, whose `id` and `status` say nothing new."""

    role: Literal["assistant"]
    content: AssistantWords
    type: Literal["message"] | None = None
    id: ItemId | None = None
    status: ItemStatus | None = None
    phase: None = None


Item = Annotated[SystemItem | DeveloperItem | UserItem | AssistantItem, Discriminator("role")]
Items = Annotated[tuple[Item, ...], Field(strict=False, min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Input = Annotated[Annotated[Text, Tag("string")] | Annotated[Items, Tag("array")], Discriminator(shape)]


class TextOptions(Strict):
    format: FlatFormat | None = None
    verbosity: Annotated[Literal["low", "medium", "high"], Only(("medium",))] | None = None


class ResponseStreamOptions(Strict):
    include_obfuscation: Annotated[bool, Only((False,))] | None = None


Include = Annotated[Literal["message.output_text.logprobs"], Field()]
UNIONS = frozenset(
    {
        ("stop",),
        ("text", "format"),
        ("input",),
        ("input", "array", "*"),
        *(("input", "array", "*", role, "content") for role in ("system", "developer", "user", "assistant")),
        *(("input", "array", "*", role, "content", "array", "*") for role in ("user", "assistant")),
    }
)


class ResponsesRequest(SamplingFields):
    input: Input
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    top_logprobs: NumTop | None = None
    include: Annotated[tuple[Include, ...], Field(strict=False, max_length=1)] | None = None
    text: TextOptions | None = None
    stream_options: ResponseStreamOptions | None = None
    truncation: Annotated[Literal["auto", "disabled"], Only(("disabled",))] | None = None
    store: Annotated[bool, Only((False,))] | None = None
    background: Annotated[bool, Only((False,))] | None = None
    previous_response_id: None = None
    conversation: None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        self.check_min_tokens(self.max_output_tokens)
        if self.top_logprobs is not None and not self.wants_logprobs:
            raise disagreement("top_logprobs", f"needs '{LOGPROBS}' in 'include'")
        if self.stream_options is not None and not self.stream:
            raise disagreement("stream_options", "needs 'stream' to be true")
        return self

    @property
    def num_choices(self) -> int:
        return 1

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def pictures(self) -> Iterator[tuple[str, str]]:
        """(URL or file id, param) of every picture, in order of appearance."""
        for i, item in enumerate(self.input if isinstance(self.input, tuple) else ()):
            for j, part in enumerate(item.content if isinstance(item.content, tuple) else ()):
                if isinstance(part, InputImage):
                    reference, field = part.reference()
                    yield reference, f"input[{i}].content[{j}].{field}"

    def to_requests(self, caller: Caller, files: Files) -> tuple[ChatRequest, ...]:
        """One prompt, so one request."""
        grammar = self.text.format.grammar() if self.text is not None and self.text.format is not None else None
        logprobs = (self.top_logprobs or 0) if self.wants_logprobs else None
        one = self.request(
            caller,
            conversation=self._conversation(files),
            grammar=grammar,
            max_tokens=self.max_output_tokens,
            logprobs=logprobs,
        )
        return (one,)

    def rendering(self, heading: Heading) -> ResponseRendering:
        form = self.text.format if self.text is not None else None
        return ResponseRendering(
            heading,
            Echo(
                instructions=self.instructions,
                max_output_tokens=self.max_output_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_logprobs=self.top_logprobs or 0,
                user=self.user,
                metadata=self.metadata or {},
                format={"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True),
            ),
        )

    def place(self, param: str | None) -> str | None:
        """The field an error of the flow is about, which counts messages as `_conversation` made them."""
        match = _MESSAGE_PARAM.match(param or "")
        if match and isinstance(self.input, tuple):
            position = int(match[1]) - self._num_added
            return f"input[{position}]{(param or '')[match.end() :]}" if position >= 0 else "instructions"
        if match or param == "messages":
            return "input"
        return {"response_format": "text.format", "max_tokens": "max_output_tokens"}.get(param or "", param)

    @property
    def _num_added(self) -> int:
        """Turns in front of those of `input`: one for the instructions, unless a system message continues them."""
        opens_with_system = isinstance(self.input, tuple) and self.input[0].role in ("system", "developer")
        return 0 if self.instructions is None or opens_with_system else 1

    def _conversation(self, files: Files) -> Conversation:
        parts = iter([ImagePart(data=files[param], param=param) for _, param in self.pictures()])
        if isinstance(self.input, str):
            turns = [Turn("user", (TextPart(self.input),))]
        else:
            turns = [_turn(item, parts) for item in self.input]
        if self.instructions is not None:
            if self._num_added:
                turns.insert(0, Turn("system", (TextPart(self.instructions),)))
            else:
                turns[0] = Turn("system", (TextPart(f"{self.instructions}\n\n"), *turns[0].parts))
        return Conversation(tuple(turns))


def parse_responses_request(body: bytes) -> ResponsesRequest:
    """Read and check a body; raises as `parse_chat_request` does."""
    return validate(ResponsesRequest, parse_json(body), UNIONS)


def _turn(item: Item, pictures: Iterator[ImagePart]) -> Turn:
    role: Role = "system" if item.role == "developer" else item.role
    if isinstance(item.content, str):
        return Turn(role, (TextPart(item.content),))
    return Turn(
        role, tuple(next(pictures) if isinstance(part, InputImage) else TextPart(part.text) for part in item.content)
    )
