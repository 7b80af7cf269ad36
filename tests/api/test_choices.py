"""Several answers to one prompt, and what they took together."""

from __future__ import annotations

from omnilmm.api.choices import choices_of, derived_seed, usage_of_choices, usage_of_prompts
from omnilmm.messages import ChatRequest, Conversation, ImageSource, ImageUsage, Usage

IMAGE = ImageUsage(ImageSource.ENCODED, 64, 8, 6)


def usage(completion: int, cached: int = 0, images: tuple[ImageUsage, ...] = (IMAGE,)) -> Usage:
    return Usage(70, completion, cached, 64, images, encode_s=1.0, decode_s=2.0, embedding_bytes=10)


def test_seeds_are_distinct_and_never_change():
    assert [derived_seed(7, index) for index in range(3)] == [7, 6439643698161685021, 7334430651429766585]
    seeds = {derived_seed(seed, index) for seed in range(50) for index in range(1, 16)}
    assert len(seeds) == 50 * 15
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_first_choice_is_the_lone_request():
    request = ChatRequest("r", Conversation(()), seed=7, max_tokens=3)
    first, second = choices_of(request, 2)
    assert first == request
    assert second.request_id == "r-1"
    assert second.seed == derived_seed(7, 1)
    assert second.max_tokens == 3
    assert [choice.seed for choice in choices_of(ChatRequest("r", Conversation(())), 3)] == [None] * 3


def test_choices_share_one_prompt():
    whole = usage_of_choices([usage(3), usage(4, cached=60), usage(5, cached=60)])
    assert whole == Usage(70, 12, 0, 64, (IMAGE,), encode_s=3.0, decode_s=6.0, embedding_bytes=30)


def test_prompts_are_added():
    whole = usage_of_prompts([usage(3, images=()), usage(4, cached=5, images=())])
    assert whole == Usage(140, 7, 5, 128, (), encode_s=2.0, decode_s=4.0, embedding_bytes=20)
