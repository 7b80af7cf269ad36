"""``POST /tokenize`` and ``POST /detokenize``, in vLLM's dialect.

A conversation is counted as the model would read it, template and pictures included: a picture takes a number of
tokens that does not depend on what it shows, so none is fetched, decoded or judged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator
from typing_extensions import TypedDict  # pydantic reads the typing module's own only from Python 3.12

from omnilmm.api.fields import Strict, Text, TokenId, disagreement
from omnilmm.api.refusals import validate
from omnilmm.api.requests import MESSAGE_UNIONS, Messages, message_conversation, message_pictures
from omnilmm.api.strict_json import MAX_MARKS, parse_json
from omnilmm.messages import Conversation

ModelName = Annotated[str, Field(min_length=1, max_length=256)]


class TokenizeRequest(Strict):
    """Either a `prompt`, as ``/v1/completions`` would read it, or `messages`, as chat completions would."""

    model: ModelName
    prompt: Text | None = None
    messages: Messages | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise disagreement("prompt", "or 'messages' must be given, and not both")
        return self

    def conversation(self) -> Conversation | None:
        """The messages with empty pictures, None for a prompt."""
        if self.messages is None:
            return None
        return message_conversation(self.messages, {param: b"" for _, param in message_pictures(self.messages)})


class DetokenizeRequest(Strict):
    model: ModelName
    tokens: Annotated[tuple[TokenId, ...], Field(strict=False, max_length=MAX_MARKS)]


class Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    image_tokens: int


class Detokenized(TypedDict):
    prompt: str


def tokenized(
    ids: Sequence[int], *, max_context: int, image_tokens: int, texts: Sequence[str] | None = None
) -> Tokenized:
    """`image_tokens` of the `ids` stand for pictures; `texts` are what the ids spell, if that was asked for."""
    return {
        "count": len(ids),
        "max_model_len": max_context,
        "tokens": list(ids),
        "token_strs": None if texts is None else list(texts),
        "image_tokens": image_tokens,
    }


def parse_tokenize_request(body: bytes) -> TokenizeRequest:
    """Read and check a body; raises as `parse_chat_request` does."""
    return validate(TokenizeRequest, parse_json(body), MESSAGE_UNIONS)


def parse_detokenize_request(body: bytes) -> DetokenizeRequest:
    """Read and check a body; raises as `parse_chat_request` does."""
    return validate(DetokenizeRequest, parse_json(body), frozenset())
