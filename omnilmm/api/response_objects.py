"""What ``POST /v1/responses`` answers: OpenAI's `response` object and its semantic events, as plain dicts.

Fields of OpenAI's object that mean nothing here (tools, reasoning, stored conversations) have the values that say so.
`usage.images` is the same extension as on chat completions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic reads the typing module's own only from Python 3.12

from omnilmm.api.responses import Answer, Heading, ImageUsageObject, TokenLogprobs, image_usage, token_logprobs
from omnilmm.api.sse import encode_event
from omnilmm.errors import IMAGE_CODES, OmniError, RateLimited
from omnilmm.messages import Delta, FinishReason, TextLogprob, Usage

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputTextObject(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[TokenLogprobs]


class OutputMessage(TypedDict):
    type: Literal["message"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputTextObject]


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseErrorObject(TypedDict):
    code: str
    message: str


class InputTokensDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int
    image_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    images: list[ImageUsageObject]


class TextObject(TypedDict):
    format: dict[str, Any]


class ResponseObject(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    background: Literal[False]
    error: ResponseErrorObject | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: Literal[False]
    previous_response_id: None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float | None
    text: TextObject
    tool_choice: Literal["none"]
    tools: list[None]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


@dataclass(frozen=True, slots=True)
class Echo:
    """What a response repeats of its request."""

    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int = 0
    user: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: Mapping[str, Any] = field(default_factory=lambda: {"type": "text"})


@dataclass(slots=True)
class ResponseRendering:
    """`omnilmm.api.rendering.Rendering` of responses. There is one choice."""

    heading: Heading
    echo: Echo
    _sequence: int = 0
    _text: list[str] = field(default_factory=list)
    _logprobs: list[TextLogprob] = field(default_factory=list)
    _finish: FinishReason | None = None

    def whole(self, answers: Sequence[Answer], usage: Usage) -> ResponseObject:
        (answer,) = answers
        return self._response(_status(answer.finish), [self._message(answer)], usage)

    def begin(self) -> Iterator[bytes]:
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._response("in_progress", []))
        item = {**self._message(Answer("", FinishReason.STOP)), "status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._part_event("response.content_part.added", part=_output_text("", ()))

    def delta(self, index: int, delta: Delta) -> Iterator[bytes]:
        self._text.append(delta.text)
        self._logprobs += delta.logprobs
        logprobs = token_logprobs(delta.logprobs)
        yield self._part_event("response.output_text.delta", delta=delta.text, logprobs=logprobs)

    def finish(self, index: int, finish: FinishReason) -> Iterator[bytes]:
        self._finish = finish
        part = _output_text(*self._so_far())
        yield self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._part_event("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=self._message(self._answer(finish)))

    def end(self, usage: Usage) -> Iterator[bytes]:
        assert self._finish is not None
        status = _status(self._finish)
        response = self._response(status, [self._message(self._answer(self._finish))], usage)
        yield self._event(f"response.{status}", response=response)

    def fail(self, error: OmniError) -> Iterator[bytes]:
        """The event `error`, at which the official client raises nothing by itself, and `response.failed`."""
        body = error.body()["error"]
        yield self._event("error", code=body["code"], message=body["message"], param=body["param"])
        response = self._response("failed", [])
        response["error"] = {"code": _response_code(error), "message": body["message"]}
        yield self._event("response.failed", response=response)

    def _so_far(self) -> tuple[str, tuple[TextLogprob, ...]]:
        return "".join(self._text), tuple(self._logprobs)

    def _answer(self, finish: FinishReason) -> Answer:
        text, logprobs = self._so_far()
        return Answer(text, finish, logprobs)

    def _event(self, name: str, **members: object) -> bytes:
        event = encode_event({"type": name, "sequence_number": self._sequence, **members}, name=name)
        self._sequence += 1
        return event

    def _part_event(self, name: str, **members: object) -> bytes:
        return self._event(name, item_id=self._message_id, output_index=0, content_index=0, **members)

    @property
    def _message_id(self) -> str:
        return f"msg_{self.heading.request_id}"

    def _message(self, answer: Answer) -> OutputMessage:
        return {
            "type": "message",
            "id": self._message_id,
            "status": _status(answer.finish),
            "role": "assistant",
            "content": [_output_text(answer.text, answer.logprobs or ())],
        }

    def _response(self, status: Status, output: list[OutputMessage], usage: Usage | None = None) -> ResponseObject:
        echo = self.echo
        return {
            "id": f"resp_{self.heading.request_id}",
            "object": "response",
            "created_at": self.heading.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": echo.instructions,
            "max_output_tokens": echo.max_output_tokens,
            "metadata": dict(echo.metadata),
            "model": self.heading.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "temperature": echo.temperature,
            "text": {"format": dict(echo.format)},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": echo.top_logprobs,
            "top_p": echo.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else response_usage(usage),
            "user": echo.user,
        }


def response_usage(usage: Usage) -> ResponseUsage:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "image_tokens": usage.image_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "images": [image_usage(image) for image in usage.images],
    }


def _output_text(text: str, logprobs: Sequence[TextLogprob]) -> OutputTextObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": token_logprobs(logprobs)}


def _status(finish: FinishReason) -> Literal["completed", "incomplete"]:
    return "completed" if finish is FinishReason.STOP else "incomplete"


def _response_code(error: OmniError) -> str:
    """One of the codes OpenAI's `response.error` may have."""
    if error.code in IMAGE_CODES:
        return str(error.code)
    if isinstance(error, RateLimited):
        return "rate_limit_exceeded"
    return "invalid_prompt" if error.status < 500 else "server_error"
