"""The frozen records that travel between stages, and between processes in the cluster.

They hold plain Python values only (str, int, float, bytes, tuples), so that a record means the same on
both sides of a wire and can be compared in a test. What later capabilities need is already here: tenant
scope, adapter, priority, and the tokens already emitted, from which another replica can resume.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Literal

Role = Literal["system", "user", "assistant"]


# -- a conversation, as the client sent it ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextPart:
    """Words of one message, exactly as typed."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture in a message: the bytes of the file and where in the request it stood."""

    data: bytes
    param: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: who speaks, and its parts in order."""

    role: Role
    parts: tuple[TextPart | ImagePart, ...]

    @property
    def text(self) -> str:
        """The words of the message, its text parts joined without a separator."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ImagePart))


@dataclass(frozen=True, slots=True)
class Conversation:
    turns: tuple[Turn, ...]

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """Every picture, in order of appearance: picture i of the request is images[i]."""
        return tuple(image for turn in self.turns for image in turn.images)


# -- a prompt, as the language model sees it ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """`length` token positions from `start` that picture `image` (index into Conversation.images) fills."""

    start: int
    length: int
    image: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with BOS, and the spans whose embeddings are replaced by picture vectors.

    `penalty_ids` are the ids that count as already seen for the repetition penalty before anything is
    generated: the lone BOS in the two OmniLMM families, whose originals generate from embeddings; the whole
    prompt in a text-only model.
    """

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    penalty_ids: tuple[int, ...]


# -- pictures and their vectors -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PixelIdentity:
    """What a picture shows, independent of its file: SHA-256 of the canonical RGB bytes, and its size."""

    digest: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """A decoded picture squashed to the square the vision tower takes.

    `square` is uint8 RGB, C order, shape (side, side, 3), after resizing and before normalisation.
    """

    identity: PixelIdentity
    side: int
    square: bytes


@dataclass(frozen=True, slots=True)
class Embedding:
    """The picture as the language model reads it: `shape` is (num_query, hidden).

    `data` holds little-endian numbers of `dtype` ("float32", "bfloat16" or "float16") in C order.
    """

    dtype: str
    shape: tuple[int, int]
    data: bytes


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoder hands back: the vectors, or only the news that the shared store now holds them.

    `kept_bytes` are those of the vectors it gave the cache to keep, whether or not the cache had room.
    """

    embedding: Embedding | None
    stored: bool
    seconds: float
    kept_bytes: int = 0


class ImageSource(StrEnum):
    """Where the vectors of a picture came from, as told in `usage.images`."""

    ENCODED = "encoded"  # this request had it encoded
    CACHE = "cache"  # found in the store
    FLIGHT = "flight"  # another request was encoding it; this one waited
    KV = "kv"  # its keys and values were still in the decoder: no vector was needed


# -- a call to the decoder and what comes back --------------------------------------------------------


class Priority(IntEnum):
    """Lower runs first."""

    ONLINE = 0
    BATCH = 1


class GrammarKind(StrEnum):
    JSON_OBJECT = "json_object"  # any JSON object
    JSON_SCHEMA = "json_schema"  # JSON that fits a schema


@dataclass(frozen=True, slots=True)
class Grammar:
    """A form the answer must have. `source` is the JSON text of the schema, empty for JSON_OBJECT."""

    kind: GrammarKind
    source: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Defaults are greedy with nothing switched on.

    Order of the filters, as in the originals: repetition penalty, presence and frequency penalty, bias,
    temperature, top_k, top_p, min_p. `temperature == 0` means greedy: penalties and bias still apply.
    `top_k == 0` and `top_p == 1.0` mean off. `seed` is always set by the time a call reaches a decoder.
    `logprobs` is the number of alternatives to report per token, None for no log-probabilities at all.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class ImageInput:
    """A picture of a call: where its vectors go, the key that names them, and the vectors if they travel along."""

    key: str
    start: int
    length: int
    embedding: Embedding | None = None


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """Everything a decoder needs. The same call with longer `emitted` continues where another replica stopped.

    `scope` separates tenants in every cache; `adapter` names a LoRA adapter or is None. `weight` is the
    tenant's share. `timeout_s` is what is left of the request's time when the call is sent.
    """

    request_id: str
    prompt: Prompt
    images: tuple[ImageInput, ...]
    sampling: Sampling
    emitted: tuple[int, ...] = ()
    tenant: str = "default"
    scope: str = "default"
    adapter: str | None = None
    priority: Priority = Priority.ONLINE
    weight: float = 1.0
    timeout_s: float = 300.0


class FinishReason(StrEnum):
    STOP = "stop"  # a stop id was drawn (it is the last id of the stream) or a stop string was seen
    LENGTH = "length"  # max_tokens or the context is used up


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of the drawn token under the model's own distribution (before any filter), with the best few."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (id, log-probability), best first


@dataclass(frozen=True, slots=True)
class Prefill:
    """How the prompt was paid for: told once, with the first batch of a stream."""

    num_prompt_tokens: int
    num_cached_tokens: int
    kv_images: tuple[int, ...]  # indices into GenerateCall.images found entirely in the KV cache
    queue_s: float
    fetched_bytes: int = 0  # of picture vectors that the decoder took from the store


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One or more tokens of a stream. The last batch has `finish`, or `missing` and no tokens.

    `missing` names embedding keys the decoder could not find anywhere: the caller must send the call again
    with those vectors in it.
    """

    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prefill: Prefill | None = None
    finish: FinishReason | None = None
    missing: tuple[str, ...] = ()


# -- what the flow tells its caller -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageUsage:
    """One picture's line in `usage.images`."""

    source: ImageSource
    tokens: int
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answer took.

    `encode_s` is the vision pool's time for pictures this request had encoded, waiting there included; `decode_s` is
    the time between the first and the last token; both in seconds. `embedding_bytes` are the bytes of picture vectors
    that reached a decoder for it, by value or from the store; `kept_bytes` those it added to the cache.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    image_tokens: int
    images: tuple[ImageUsage, ...] = ()
    encode_s: float = 0.0
    decode_s: float = 0.0
    embedding_bytes: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TextLogprob:
    """A token of the answer as text, with its log-probability and the best alternatives as (text, bytes, logprob)."""

    token: str
    utf8: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer. Text never ends inside a character or inside a possible stop string."""

    text: str
    logprobs: tuple[TextLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer."""

    finish: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A validated request for one answer, ready for the flow.

    `sampling` fields left None take the model family's own defaults. `stop` are strings cut from the answer.
    `raw` is a prompt to continue as it stands, text or token ids, in place of a conversation (which is then empty).
    `may_cache` False: nothing new is remembered of its pictures. `is_further`: one more answer to a prompt that another
    request asks already, so that prompt and pictures count there.
    """

    request_id: str
    conversation: Conversation
    raw: str | tuple[int, ...] | None = None
    grammar: Grammar | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    tenant: str = "default"
    scope: str = "default"
    adapter: str | None = None
    priority: Priority = Priority.ONLINE
    weight: float = 1.0
    timeout_s: float = 300.0
    session: str | None = None
    metadata: tuple[tuple[str, str], ...] = field(default=())
    may_cache: bool = True
    is_further: bool = False
