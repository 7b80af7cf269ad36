"""Several answers to one prompt, and one account of what they took together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from omnilmm.api.fields import MAX_SEED
from omnilmm.messages import ChatRequest, Usage


def derived_seed(seed: int, index: int) -> int:
    """The seed of answer `index`; that of the first is the seed itself. The same on every machine, for ever."""
    if index == 0:
        return seed
    digest = hashlib.sha256(f"omnilmm choice {seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & MAX_SEED


def choices_of(request: ChatRequest, num_choices: int) -> tuple[ChatRequest, ...]:
    """The request asked `num_choices` times. Without a seed each draws one of its own, as a lone request does."""
    return tuple(
        replace(
            request,
            request_id=f"{request.request_id}-{index}" if index else request.request_id,
            seed=None if request.seed is None else derived_seed(request.seed, index),
            is_further=index > 0,
        )
        for index in range(num_choices)
    )


def usage_of_choices(answers: Sequence[Usage]) -> Usage:
    """What the answers to one prompt took together: the prompt and its pictures count once, as the first met them."""
    return replace(
        answers[0],
        completion_tokens=sum(usage.completion_tokens for usage in answers),
        encode_s=sum(usage.encode_s for usage in answers),
        decode_s=sum(usage.decode_s for usage in answers),
        embedding_bytes=sum(usage.embedding_bytes for usage in answers),
        kept_bytes=sum(usage.kept_bytes for usage in answers),
    )


def usage_of_prompts(prompts: Sequence[Usage]) -> Usage:
    """What independent prompts took together."""
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
        completion_tokens=sum(usage.completion_tokens for usage in prompts),
        cached_tokens=sum(usage.cached_tokens for usage in prompts),
        image_tokens=sum(usage.image_tokens for usage in prompts),
        images=tuple(image for usage in prompts for image in usage.images),
        encode_s=sum(usage.encode_s for usage in prompts),
        decode_s=sum(usage.decode_s for usage in prompts),
        embedding_bytes=sum(usage.embedding_bytes for usage in prompts),
        kept_bytes=sum(usage.kept_bytes for usage in prompts),
    )
