"""The body of ``POST /v1/completions``: prompts that the model goes on with as they stand, without a chat template.

Beside the rules of every route (`omnilmm.api.fields`):

- `prompt` is a text, a list of texts, a list of token ids, or a list of lists of ids. A prompt holds no pictures.
- Each prompt gets `n` answers; all answers of a request together are at most MAX_ANSWERS.
- `max_tokens` is 16 if it is left out, as it is with OpenAI.
- `logprobs` is the number of alternatives per token. `echo` can only be false and `suffix` only null; `best_of` is
  not known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Self

from pydantic import Discriminator, Field, Tag, model_validator

from omnilmm.api.completion_responses import CompletionRendering
from omnilmm.api.fields import (
    MAX_CHOICES,
    Caller,
    Files,
    NumTokens,
    NumTop,
    Only,
    SamplingFields,
    StreamOptions,
    Text,
    TokenId,
    disagreement,
)
from omnilmm.api.formats import ResponseFormat
from omnilmm.api.refusals import validate
from omnilmm.api.responses import Heading
from omnilmm.api.strict_json import MAX_MARKS, parse_json
from omnilmm.messages import ChatRequest

MAX_PROMPTS = 64
MAX_ANSWERS = 64
DEFAULT_MAX_TOKENS = 16


def _prompt_shape(value: object) -> str | None:
    """Tag of a prompt, by its first element."""
    if isinstance(value, str):
        return "string"
    if not isinstance(value, (list, tuple)):
        return None
    first = value[0] if value else None
    if isinstance(first, (list, tuple)):
        return "id_lists"
    return "ids" if isinstance(first, int) and not isinstance(first, bool) else "strings"


Ids = Annotated[tuple[TokenId, ...], Field(strict=False, min_length=1, max_length=MAX_MARKS, fail_fast=True)]
Strings = Annotated[tuple[Text, ...], Field(strict=False, min_length=1, max_length=MAX_PROMPTS)]
IdLists = Annotated[tuple[Ids, ...], Field(strict=False, min_length=1, max_length=MAX_PROMPTS)]
PromptField = Annotated[
    Annotated[Text, Tag("string")]
    | Annotated[Strings, Tag("strings")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[IdLists, Tag("id_lists")],
    Discriminator(_prompt_shape),
]

UNIONS = frozenset({("stop",), ("response_format",), ("prompt",)})


class CompletionRequest(SamplingFields):
    prompt: PromptField
    max_tokens: NumTokens | None = None
    logprobs: NumTop | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: Annotated[bool, Only((False,))] | None = None
    suffix: None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        self.check_min_tokens(self.token_limit)
        if self.stream_options is not None and not self.stream:
            raise disagreement("stream_options", "needs 'stream' to be true")
        if len(self.prompts) * self.num_choices > MAX_ANSWERS:
            raise disagreement("n", f"times the number of prompts is more than {MAX_ANSWERS} answers")
        return self

    @property
    def token_limit(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """Every prompt as text or ids."""
        match _prompt_shape(self.prompt):
            case "strings" | "id_lists":
                return self.prompt  # type: ignore[return-value]  # a tuple of prompts, by its shape
            case _:
                return (self.prompt,)  # type: ignore[return-value]  # one prompt, by its shape

    def pictures(self) -> Iterator[tuple[str, str]]:
        return iter(())

    def to_requests(self, caller: Caller, files: Files) -> tuple[ChatRequest, ...]:
        """One request a prompt. The first keeps the caller's request id, others add their number to it."""
        grammar = self.response_format.grammar() if self.response_format is not None else None
        callers = (
            replace(caller, request_id=f"{caller.request_id}.{i}" if i else caller.request_id)
            for i in range(MAX_PROMPTS)
        )
        return tuple(
            self.request(one, raw=prompt, grammar=grammar, max_tokens=self.token_limit, logprobs=self.logprobs)
            for one, prompt in zip(callers, self.prompts, strict=False)
        )

    def rendering(self, heading: Heading) -> CompletionRendering:
        return CompletionRendering(heading, self.include_usage)

    def place(self, param: str | None) -> str | None:
        """The field an error of the flow is about."""
        return "prompt" if param is not None and param.partition("[")[0] == "messages" else param


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Read and check a body; raises as `parse_chat_request` does."""
    return validate(CompletionRequest, parse_json(body), UNIONS)
