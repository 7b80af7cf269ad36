"""What a call must fulfil to enter the engine: refused at the door, nothing can go wrong in the middle of a step.

The API has checked the client's fields already. This is the engine's own border: one impossible number must never
reach a tensor that other sequences share.
"""

from __future__ import annotations

import math

from omnilmm.config import EngineConfig
from omnilmm.errors import ContextLengthExceeded, InvalidRequest
from omnilmm.messages import GenerateCall, Sampling


def check_call(call: GenerateCall, config: EngineConfig, *, vocab_size: int) -> None:
    """Refuse a call that could not be served even by an empty engine.

    Raises:
        ContextLengthExceeded: prompt and max_tokens do not fit the context, or the KV pool.
        InvalidRequest: anything else; `param` names the field of GenerateCall.
    """
    _check_ids(call, vocab_size)
    _check_length(call, config)
    _check_images(call)
    _check_sampling(call.sampling, vocab_size)
    _require(math.isfinite(call.weight) and call.weight > 0, "weight", "The weight must be positive.")
    _require(call.timeout_s > 0, "timeout_s", "The timeout must be positive.")


def _check_ids(call: GenerateCall, vocab_size: int) -> None:
    prompt, sampling = call.prompt, call.sampling
    _require(len(prompt.ids) > 0, "prompt", "The prompt is empty.")
    for param, ids in (
        ("prompt.ids", prompt.ids),
        ("prompt.penalty_ids", prompt.penalty_ids),
        ("emitted", call.emitted),
        ("sampling.stop_ids", sampling.stop_ids),
        ("sampling.logit_bias", tuple(token_id for token_id, _ in sampling.logit_bias)),
    ):
        in_vocabulary = not ids or (min(ids) >= 0 and max(ids) < vocab_size)
        _require(in_vocabulary, param, "A token id is outside the vocabulary.")


def _check_length(call: GenerateCall, config: EngineConfig) -> None:
    num_tokens = len(call.prompt.ids) + call.sampling.max_tokens
    # The last token of an answer is drawn, but never computed.
    room = min(config.max_context, config.num_blocks * config.block_size + 1)
    if num_tokens > room:
        raise ContextLengthExceeded(
            f"The prompt has {len(call.prompt.ids)} tokens and max_tokens is {call.sampling.max_tokens}; together"
            f" they may be at most {room}.",
            param="max_tokens",
        )


def _check_images(call: GenerateCall) -> None:
    end = 0
    for image in call.images:
        is_behind_previous = image.start >= end and image.length > 0
        end = image.start + image.length
        _require(
            is_behind_previous and end <= len(call.prompt.ids), "images", "Image positions overlap or lie outside."
        )


def _check_sampling(sampling: Sampling, vocab_size: int) -> None:
    for param, value, low, high in (
        ("max_tokens", sampling.max_tokens, 0, math.inf),
        ("temperature", sampling.temperature, 0.0, math.inf),
        ("top_k", sampling.top_k, 0, math.inf),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("presence_penalty", sampling.presence_penalty, -math.inf, math.inf),
        ("frequency_penalty", sampling.frequency_penalty, -math.inf, math.inf),
        ("logprobs", sampling.logprobs or 0, 0, vocab_size),
    ):
        _require(math.isfinite(value) and low <= value <= high, f"sampling.{param}", f"{param} is out of range.")
    _require(0.0 < sampling.top_p <= 1.0, "sampling.top_p", "top_p is out of range.")
    penalty = sampling.repetition_penalty
    _require(
        math.isfinite(penalty) and penalty > 0, "sampling.repetition_penalty", "repetition_penalty is out of range."
    )
    biases_are_finite = all(math.isfinite(bias) for _, bias in sampling.logit_bias)
    _require(biases_are_finite, "sampling.logit_bias", "A bias is not a finite number.")
    _require(len(set(sampling.stop_ids)) < vocab_size, "sampling.stop_ids", "Every token is a stop token.")


def _require(is_met: bool, param: str, message: str) -> None:
    if not is_met:
        raise InvalidRequest(message, param=param)
