"""Frozen settings of the library's parts. Values are checked where they are made; nothing edits them later."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self


class Family(StrEnum):
    """The model families we serve, by the `model_type` of their official config.json."""

    OMNILMM_12B = "omnilmm"  # EVA02-E + resampler + Zephyr-7B-beta
    OMNILMM_3B = "minicpmv"  # SigLIP-400M + resampler + MiniCPM-2.4B
    TEXT = "text"  # a plain Llama-type language model, no pictures


class InputHandling(StrEnum):
    """How faithful the edges are to the original programs.

    ORIGINAL does what they do bit for bit, flaws included: special-token strings in a user's text are parsed as
    such, EXIF orientation is ignored, alpha is dropped, 16-bit pictures are clipped. SAFE mends these.
    """

    SAFE = "safe"
    ORIGINAL = "original"


class _Resolvable:
    def resolve(self, **changes: Any) -> Self:
        """A copy with `changes` applied; the original stays as it is."""
        return replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class ImagePolicy(_Resolvable):
    """How a picture becomes a tensor: `side` in pixels, mean and deviation per RGB channel on the 0..1 scale."""

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    handling: InputHandling = InputHandling.SAFE

    @property
    def version(self) -> str:
        """Names everything that turns a file into pixels; part of every cache key."""
        return f"1/{self.handling}/{self.side}"


@dataclass(frozen=True, slots=True)
class ImageLimits(_Resolvable):
    """Caps on pictures. Sides in pixels, memory in bytes, time in seconds of the decode worker."""

    max_file_bytes: int = 20 * 1024 * 1024
    max_side: int = 8192
    max_pixels: int = 36_000_000
    max_request_pixels: int = 64_000_000
    max_images: int = 16
    decode_timeout_s: float = 10.0
    decode_memory_bytes: int = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class EncoderConfig(_Resolvable):
    """`cuda_graphs` None means on CUDA; true anywhere else is refused."""

    max_batch: int = 8
    max_queue: int = 256
    cuda_graphs: bool | None = None


@dataclass(frozen=True, slots=True)
class EngineConfig(_Resolvable):
    """The decode engine's room. `num_blocks * block_size` token positions of KV, shared by all sequences.

    `batch_beside_online` is how many tokens of class BATCH a step may compute beside those of class ONLINE: few, as
    everything in a step takes as long as all of it. Steps of BATCH alone take `max_step_tokens`.

    `enough_step_tokens` is how many tokens of prompts a step of class ONLINE reads before it starts no further prompt:
    where a step takes as long as its tokens are many, two prompts one after the other have their first tokens sooner,
    on average, than both together. None means no such limit; `pipeline.start_engine` sets one on CPU.

    `attention` is "gathered" (any device), "paged" (CUDA) or "auto", which is paged on CUDA if blocks and heads allow
    it. `cuda_graphs` None means wherever attention is paged; true without it is refused.
    """

    num_blocks: int = 1024
    block_size: int = 16
    max_step_tokens: int = 512
    enough_step_tokens: int | None = None
    batch_beside_online: int = 8
    max_sequences: int = 64
    max_waiting: int = 256
    max_context: int = 4096
    attention: str = "auto"
    cuda_graphs: bool | None = None


@dataclass(frozen=True, slots=True)
class CacheConfig(_Resolvable):
    """The embedding store. `redis_url` None means memory only. Times in seconds."""

    redis_url: str | None = None
    memory_bytes: int = 256 * 1024 * 1024
    timeout_s: float = 0.05
    ttl_s: float = 7 * 24 * 3600.0
    lease_s: float = 10.0
    breaker_failures: int = 2
    breaker_open_s: float = 1.0
