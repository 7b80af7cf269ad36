"""What a request asks for, in a model's own terms: the prompt as ids, every sampling setting filled in, and with which
other requests it should meet."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from typing import TypeVar

from omnilmm.card import ModelCard
from omnilmm.errors import ContextLengthExceeded, InvalidRequest
from omnilmm.messages import ChatRequest, Prompt, Sampling

T = TypeVar("T")

NUM_OPENING_IDS = 64
"""The opening of a raw prompt, in tokens: prompts that share it should meet the same decoder."""


def compose(card: ModelCard, request: ChatRequest) -> tuple[Prompt, Sampling]:
    """The prompt, and how the answer is drawn.

    Raises:
        ContextLengthExceeded: prompt and answer do not fit the model's context.
        InvalidRequest: the conversation breaks a rule, or an id is not one of this model.
    """
    _check_ids(card, "logit_bias", [token_id for token_id, _ in request.logit_bias])
    _check_ids(card, "stop_token_ids", request.stop_ids)
    prompt = compose_prompt(card, request)
    return prompt, _sampling(card, request, max_tokens=_max_tokens(card, request, len(prompt.ids)))


def compose_prompt(card: ModelCard, request: ChatRequest) -> Prompt:
    """The conversation in the model's chat format, or the raw prompt as it stands.

    Raises:
        ContextLengthExceeded: it does not fit the model's context.
        InvalidRequest: the conversation breaks a rule, or the raw prompt is empty or no text or ids of this model.
    """
    if request.raw is None:
        return card.template.render(request.conversation, card.handling, max_tokens=card.max_context)
    ids = _tokenize(card, request.raw) if isinstance(request.raw, str) else request.raw
    if not ids:
        raise InvalidRequest("The prompt is empty.", param="prompt")
    _check_ids(card, "prompt", ids)
    if len(ids) > card.max_context:
        raise _too_long(card)
    return Prompt(ids, (), penalty_ids=ids)


def affinity(request: ChatRequest, prompt: Prompt, picture_keys: Sequence[str]) -> str:
    """Same conversation, same value: its session if named, else its opening (first pictures and first words).

    Args:
        prompt: the request's.
        picture_keys: the embedding keys of its pictures, in order.
    """
    if request.session is not None:
        opening = f"session/{request.session}"
    elif request.raw is not None:
        opening = f"raw/{prompt.ids[:NUM_OPENING_IDS]}"
    else:
        first = next((turn for turn in request.conversation.turns if turn.role == "user"), None)
        num_first = len(first.images) if first else 0
        opening = "/".join([*picture_keys[:num_first], first.text if first else ""])
    return hashlib.sha256(f"{request.scope}/{opening}".encode()).hexdigest()


def _tokenize(card: ModelCard, text: str) -> tuple[int, ...]:
    """Ids of a text, control tokens parsed as the tokenizer does by itself, behind BOS where it puts one."""
    tokenizer = card.template.tokenizer
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("The text holds a lone surrogate.", param="prompt") from None
    longest = tokenizer.max_token_bytes
    if longest is not None and num_bytes > card.max_context * longest:  # too long whatever its ids are
        raise _too_long(card)
    leading = [tokenizer.bos_id] if tokenizer.adds_bos else []
    return tuple(leading + tokenizer.encode_parsed(text))


def _max_tokens(card: ModelCard, request: ChatRequest, num_prompt: int) -> int:
    room = card.max_context - num_prompt
    wanted = request.max_tokens
    if wanted is None:
        wanted = min(card.template.defaults.max_tokens, max(room, 1))
    if wanted > room:
        what = "messages (with their pictures) take" if request.raw is None else "prompt takes"
        raise ContextLengthExceeded(
            f"This model's context is {card.max_context} tokens; the {what} {num_prompt} and {wanted} were asked for "
            "the answer.",
            param="messages" if request.raw is None else "prompt",
        )
    return wanted


def _sampling(card: ModelCard, request: ChatRequest, *, max_tokens: int) -> Sampling:
    defaults = card.template.defaults
    eos = () if request.ignore_eos else card.template.eos_ids
    return Sampling(
        max_tokens=max_tokens,
        temperature=_or(request.temperature, defaults.temperature),
        top_k=_or(request.top_k, defaults.top_k),
        top_p=_or(request.top_p, defaults.top_p),
        min_p=_or(request.min_p, 0.0),
        repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        seed=_or(request.seed, secrets.randbits(63)),
        stop_ids=tuple(dict.fromkeys((*eos, *request.stop_ids))),
        min_tokens=request.min_tokens,
        logprobs=request.logprobs,
        grammar=request.grammar,
    )


def _check_ids(card: ModelCard, param: str, ids: Sequence[int]) -> None:
    if any(not 0 <= token_id < card.vocab_size for token_id in ids):
        raise InvalidRequest(f"Token ids of this model are below {card.vocab_size}.", param=param)


def _too_long(card: ModelCard) -> ContextLengthExceeded:
    return ContextLengthExceeded(f"The prompt takes more than the {card.max_context} tokens there are.", param="prompt")


def _or(asked: T | None, default: T) -> T:
    return default if asked is None else asked
