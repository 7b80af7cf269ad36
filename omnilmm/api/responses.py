"""What we answer: OpenAI's `chat.completion`, `chat.completion.chunk` and `model` objects as plain dicts.

One extension: `usage.images` has a line per picture of the request, in order, that says where its vectors came from.
Error bodies are made by `OmniError.body()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from typing_extensions import TypedDict  # pydantic reads the typing module's own only from Python 3.12

from omnilmm.messages import Delta, FinishReason, ImageUsage, TextLogprob, Usage

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot spell; OpenAI sends the same number for a token out of reach."""


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TypedDict):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    content: list[TokenLogprobs]
    refusal: None


class PromptTokensDetails(TypedDict):
    cached_tokens: int
    image_tokens: int


class ImageUsageObject(TypedDict):
    source: Literal["encoded", "cache", "flight", "kv"]
    tokens: int
    width: int | None
    height: int | None


class UsageObject(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    images: list[ImageUsageObject]


class MessageObject(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(TypedDict):
    index: int
    message: MessageObject
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[Choice]
    usage: UsageObject


class DeltaObject(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChunkChoice(TypedDict):
    index: int
    delta: DeltaObject
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class _ChunkWithoutUsage(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChunkChoice]


class ChatCompletionChunk(_ChunkWithoutUsage, total=False):
    usage: UsageObject | None


class ModelObject(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelObject]


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorDetail


# -- one answer ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heading:
    """What every object of one response starts with. `created` is a Unix time in whole seconds."""

    request_id: str
    model: str
    created: int
    fingerprint: str | None = None

    @property
    def id(self) -> str:
        return f"chatcmpl-{self.request_id}"


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer. `logprobs` is None where none were asked for."""

    text: str
    finish: FinishReason
    logprobs: tuple[TextLogprob, ...] | None = None

    @classmethod
    def collect(cls, deltas: Iterable[Delta], finish: FinishReason, *, logprobs: bool) -> Self:
        """Join the pieces of a stream."""
        pieces = list(deltas)
        entries = tuple(entry for piece in pieces for entry in piece.logprobs)
        return cls("".join(piece.text for piece in pieces), finish, entries if logprobs else None)


def chat_completion(heading: Heading, answers: Sequence[Answer], usage: Usage) -> ChatCompletion:
    """The whole response to a request that did not ask for a stream."""
    return {
        "id": heading.id,
        "object": "chat.completion",
        "created": heading.created,
        "model": heading.model,
        "system_fingerprint": heading.fingerprint,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None if answer.logprobs is None else logprobs_object(answer.logprobs),
                "finish_reason": answer.finish.value,
            }
            for index, answer in enumerate(answers)
        ],
        "usage": usage_object(usage),
    }


@dataclass(frozen=True, slots=True)
class ChunkWriter:
    """The chunks of a streamed response: `first`, any number of `delta`, `last`, and `usage` if it was asked for.

    As OpenAI does, every chunk but the one with the usage then carries ``"usage": null``.
    """

    heading: Heading
    include_usage: bool = False

    def first(self, index: int = 0) -> ChatCompletionChunk:
        """Says who speaks. Sent as soon as the request is under way."""
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def delta(self, delta: Delta, index: int = 0) -> ChatCompletionChunk:
        logprobs = logprobs_object(delta.logprobs) if delta.logprobs else None
        return self._chunk(index, {"content": delta.text}, logprobs=logprobs)

    def last(self, finish: FinishReason, index: int = 0) -> ChatCompletionChunk:
        """Ends one answer."""
        return self._chunk(index, {}, finish=finish)

    def usage(self, usage: Usage) -> ChatCompletionChunk:
        """Ends the response; has no choices."""
        return {**self._empty(), "usage": usage_object(usage)}

    def _chunk(
        self, index: int, delta: DeltaObject, *, logprobs: Logprobs | None = None, finish: FinishReason | None = None
    ) -> ChatCompletionChunk:
        chunk = self._empty()
        chunk["choices"] = [
            {
                "index": index,
                "delta": delta,
                "logprobs": logprobs,
                "finish_reason": None if finish is None else finish.value,
            }
        ]
        return chunk

    def _empty(self) -> ChatCompletionChunk:
        chunk: ChatCompletionChunk = {
            "id": self.heading.id,
            "object": "chat.completion.chunk",
            "created": self.heading.created,
            "model": self.heading.model,
            "system_fingerprint": self.heading.fingerprint,
            "choices": [],
        }
        if self.include_usage:
            chunk["usage"] = None
        return chunk


def usage_object(usage: Usage) -> UsageObject:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "image_tokens": usage.image_tokens},
        "images": [image_usage(image) for image in usage.images],
    }


def image_usage(image: ImageUsage) -> ImageUsageObject:
    return {"source": image.source.value, "tokens": image.tokens, "width": image.width, "height": image.height}


def logprobs_object(entries: Iterable[TextLogprob]) -> Logprobs:
    return {"content": token_logprobs(entries), "refusal": None}


def token_logprobs(entries: Iterable[TextLogprob]) -> list[TokenLogprobs]:
    return [
        {
            "token": entry.token,
            "logprob": max(entry.logprob, LOWEST_LOGPROB),
            "bytes": list(entry.utf8),
            "top_logprobs": [
                {"token": token, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(utf8)}
                for token, utf8, logprob in entry.top
            ],
        }
        for entry in entries
    ]


# -- models -------------------------------------------------------------------------------------------


def model_object(name: str, *, created: int, owned_by: str = "omnilmm") -> ModelObject:
    """One entry of ``GET /v1/models``. `created` is a Unix time in whole seconds."""
    return {"id": name, "object": "model", "created": created, "owned_by": owned_by}


def model_list(models: Iterable[ModelObject]) -> ModelList:
    return {"object": "list", "data": list(models)}
