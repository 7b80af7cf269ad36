"""What ``POST /v1/completions`` answers: OpenAI's `text_completion` objects as plain dicts.

Choice ``p * n + i`` is answer i to prompt p.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import TypedDict  # pydantic reads the typing module's own only from Python 3.12

from omnilmm.api.responses import LOWEST_LOGPROB, Answer, Heading, UsageObject, usage_object
from omnilmm.api.sse import DONE, encode_error, encode_event
from omnilmm.errors import OmniError
from omnilmm.messages import Delta, FinishReason, TextLogprob, Usage


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: UsageObject


def completion_logprobs(entries: Iterable[TextLogprob], offset: int = 0) -> CompletionLogprobs:
    """`offset` is the number of characters of the answer in front of the first entry."""
    found: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        found["tokens"].append(entry.token)
        found["token_logprobs"].append(max(entry.logprob, LOWEST_LOGPROB))
        found["top_logprobs"].append({token: max(logprob, LOWEST_LOGPROB) for token, _, logprob in reversed(entry.top)})
        found["text_offset"].append(offset)
        offset += len(entry.token)
    return found


@dataclass(slots=True)
class CompletionRendering:
    """`omnilmm.api.rendering.Rendering` of completions."""

    heading: Heading
    include_usage: bool
    _offsets: dict[int, int] = field(default_factory=dict)  # characters of tokens told so far, by choice

    def whole(self, answers: Sequence[Answer], usage: Usage) -> Completion:
        return {
            "id": f"cmpl-{self.heading.request_id}",
            "object": "text_completion",
            "created": self.heading.created,
            "model": self.heading.model,
            "system_fingerprint": self.heading.fingerprint,
            "choices": [
                {
                    "index": index,
                    "text": answer.text,
                    "logprobs": None if answer.logprobs is None else completion_logprobs(answer.logprobs),
                    "finish_reason": answer.finish.value,
                }
                for index, answer in enumerate(answers)
            ],
            "usage": usage_object(usage),
        }

    def begin(self) -> Iterator[bytes]:
        return iter(())

    def delta(self, index: int, delta: Delta) -> Iterator[bytes]:
        logprobs = None
        if delta.logprobs:
            offset = self._offsets.get(index, 0)
            logprobs = completion_logprobs(delta.logprobs, offset)
            self._offsets[index] = offset + sum(len(entry.token) for entry in delta.logprobs)
        yield self._chunk([{"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": None}])

    def finish(self, index: int, finish: FinishReason) -> Iterator[bytes]:
        yield self._chunk([{"index": index, "text": "", "logprobs": None, "finish_reason": finish.value}])

    def end(self, usage: Usage) -> Iterator[bytes]:
        if self.include_usage:
            yield self._chunk([], usage)
        yield DONE

    def fail(self, error: OmniError) -> Iterator[bytes]:
        yield encode_error(error)

    def _chunk(self, choices: list[dict[str, object]], usage: Usage | None = None) -> bytes:
        chunk: dict[str, object] = {
            "id": f"cmpl-{self.heading.request_id}",
            "object": "text_completion",
            "created": self.heading.created,
            "model": self.heading.model,
            "system_fingerprint": self.heading.fingerprint,
            "choices": choices,
        }
        if self.include_usage:
            chunk["usage"] = None if usage is None else usage_object(usage)
        return encode_event(chunk)
