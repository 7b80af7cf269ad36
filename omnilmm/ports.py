"""The seams of the product: what the flow needs from its neighbours, and nothing else.

Each has a local object, a cluster handle and a small honest fake behind it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from omnilmm.config import ImagePolicy
from omnilmm.messages import Embedding, Encoded, GenerateCall, PixelIdentity, PreparedImage, TokenBatch


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds that never go backwards."""
        ...


class ImagePreparer(Protocol):
    """Turns the bytes of a file into pixels, away from the event loop and under limits."""

    async def prepare(self, data: bytes, *, policy: ImagePolicy, param: str) -> PreparedImage:
        """Decode, make canonical RGB, squash to the policy's square.

        Raises:
            ImageError: the picture is not one we take; `param` is passed through.
        """
        ...


class Encoder(Protocol):
    """The vision pool. Calls that arrive together are batched by the other side."""

    async def encode(
        self, picture: PreparedImage, *, key: str, by_value: bool, timeout_s: float, keep: bool = True
    ) -> Encoded:
        """Vectors of one picture, put into the shared store; in the answer too if that failed or `by_value` asks.
        Without `keep` they are put nowhere, and only in the answer.

        Raises:
            Overloaded: the queue is full.
            ReplicaLost: the replica died; the same call may be sent again.
        """
        ...


class Decoder(Protocol):
    """The language-model pool."""

    def generate(self, call: GenerateCall, *, affinity: str) -> AsyncGenerator[TokenBatch, None]:
        """Stream tokens. Closing the iterator frees everything the call holds.

        `affinity` is a hint: calls with the same value should meet the same replica.

        Raises:
            Overloaded: the queue is full.
            ReplicaLost: the replica died; send the call again with what was emitted.
        """
        ...


@dataclass(frozen=True, slots=True)
class Hit:
    """The store holds the vectors under this key."""


@runtime_checkable
class Lease(Protocol):
    """We are the one who encodes this key. One of the two methods must be called; the first call counts."""

    async def resolve(self, encoded: Encoded) -> None:
        """Tell everyone who waits."""
        ...

    async def abandon(self) -> None:
        """We failed; one of the waiters takes over."""
        ...


@runtime_checkable
class Flight(Protocol):
    """Someone else is encoding this key."""

    async def wait(self, timeout_s: float) -> Encoded | None:
        """Their result, or None when they gave up, died or the time ran out: look the key up again."""
        ...


Lookup = Hit | Lease | Flight


class EmbeddingStore(Protocol):
    """Vectors by key, over however many tiers. An outage is a miss, never an exception."""

    @property
    def is_shared(self) -> bool:
        """Whether a decoder can be expected to find what an encoder puts; false while the shared tier is away."""
        ...

    async def lookup(self, keys: Sequence[str]) -> Mapping[str, Lookup]:
        """Hit, lease or flight for every distinct key, asked all at once."""
        ...

    async def get(self, key: str) -> Embedding | None: ...

    async def put(self, key: str, embedding: Embedding, *, seconds: float = 0.0) -> bool:
        """True if other processes can now find it. `seconds` is what it took to make, which makes it worth keeping."""
        ...

    async def get_identity(self, alias: str) -> PixelIdentity | None:
        """What a file with this digest shows, so that a repeated file need not be decoded to be recognised."""
        ...

    async def put_identity(self, alias: str, identity: PixelIdentity) -> None: ...

    async def erase(self, names: Sequence[str]) -> bool:
        """Forget keys and aliases in every tier; false if one could not be reached."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back, for one model."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Control tokens by their text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text in the middle of it; a control token gives its literal text."""
        ...
