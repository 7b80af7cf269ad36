"""The routes that answer prompts, by their path: how a body of each is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

from omnilmm.api import completion_requests, requests, response_requests
from omnilmm.api.completion_requests import CompletionRequest
from omnilmm.api.fields import Caller, Files
from omnilmm.api.refusals import validate
from omnilmm.api.rendering import Rendering
from omnilmm.api.requests import ChatCompletionRequest
from omnilmm.api.response_requests import ResponsesRequest
from omnilmm.api.responses import Heading
from omnilmm.messages import ChatRequest


class Body(Protocol):
    """A body that asks for answers, read and checked."""

    @property
    def model(self) -> str: ...

    @property
    def stream(self) -> bool | None: ...

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        ...

    @property
    def wants_logprobs(self) -> bool: ...

    def pictures(self) -> Iterator[tuple[str, str]]:
        """(URL or file id, param) of every picture, in order of appearance. No two have the same param."""
        ...

    def to_requests(self, caller: Caller, files: Files) -> tuple[ChatRequest, ...]:
        """A request for one answer to each prompt. `files` has the bytes of every picture by param."""
        ...

    def rendering(self, heading: Heading) -> Rendering: ...

    def place(self, param: str | None) -> str | None:
        """The field of this body that an error of the flow is about."""
        ...


ReadDocument = Callable[[Mapping[str, object]], Body]
"""From a parsed JSON object; raises InvalidRequest."""


def _chat(document: Mapping[str, object]) -> Body:
    return validate(ChatCompletionRequest, document, requests.UNIONS)


def _completion(document: Mapping[str, object]) -> Body:
    return validate(CompletionRequest, document, completion_requests.UNIONS)


def _response(document: Mapping[str, object]) -> Body:
    return validate(ResponsesRequest, document, response_requests.UNIONS)


ENDPOINTS: Mapping[str, ReadDocument] = MappingProxyType(
    {"/v1/chat/completions": _chat, "/v1/completions": _completion, "/v1/responses": _response}
)
