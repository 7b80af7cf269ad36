from __future__ import annotations

from dataclasses import replace

import pytest
from engine_fakes import CONFIG, VOCAB, make_call

from omnilmm.engine.admission import check_call
from omnilmm.errors import ContextLengthExceeded, InvalidRequest
from omnilmm.messages import ImageInput, Prompt, Sampling

INF, NAN = float("inf"), float("nan")


def check(call, **changes):
    check_call(call, CONFIG.resolve(**changes), vocab_size=VOCAB)


def test_a_good_call_passes():
    check(make_call(20, pictures=[("a", 0, 4), ("b", 4, 4)], sampling=Sampling(0, temperature=0.7, top_p=0.9)))


def test_the_last_token_needs_no_room_in_the_pool():
    call = make_call(9, max_tokens=8)  # 17 tokens, of which 16 are ever computed
    check(call, num_blocks=4)
    with pytest.raises(ContextLengthExceeded) as caught:
        check(replace(call, sampling=Sampling(9)), num_blocks=4)
    assert caught.value.param == "max_tokens"


def test_prompt_and_answer_fit_the_context_together():
    check(make_call(10, max_tokens=8), max_context=18)
    with pytest.raises(ContextLengthExceeded):
        check(make_call(10, max_tokens=9), max_context=18)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": Prompt((), (), ())}, "prompt"),
        ({"prompt": Prompt((1, VOCAB), (), ())}, "prompt.ids"),
        ({"prompt": Prompt((1, -1), (), ())}, "prompt.ids"),
        ({"prompt": Prompt((1,), (), (VOCAB,))}, "prompt.penalty_ids"),
        ({"emitted": (VOCAB,)}, "emitted"),
        ({"images": (ImageInput("a", 8, 3),)}, "images"),
        ({"images": (ImageInput("a", 0, 3), ImageInput("b", 2, 3))}, "images"),
        ({"images": (ImageInput("a", 4, 3), ImageInput("b", 0, 3))}, "images"),
        ({"images": (ImageInput("a", -1, 3),)}, "images"),
        ({"images": (ImageInput("a", 1, 0),)}, "images"),
        ({"weight": 0.0}, "weight"),
        ({"weight": NAN}, "weight"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"timeout_s": NAN}, "timeout_s"),
    ],
)
def test_impossible_calls_are_refused(fields, param):
    with pytest.raises(InvalidRequest) as caught:
        check(replace(make_call(10), **fields))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("temperature", value) for value in (-0.1, NAN, INF)),
        *(("top_p", value) for value in (0.0, 1.1, NAN)),
        *(("min_p", value) for value in (-0.1, 1.1, NAN)),
        *(("repetition_penalty", value) for value in (0.0, -1.0, NAN, INF)),
        *(("presence_penalty", value) for value in (NAN, INF)),
        *(("frequency_penalty", value) for value in (NAN, -INF)),
        ("top_k", -1),
        ("max_tokens", -1),
        ("logprobs", -1),
        ("logprobs", VOCAB + 1),
        ("stop_ids", (VOCAB,)),
        ("stop_ids", tuple(range(VOCAB))),
        ("logit_bias", ((VOCAB, 1.0),)),
        ("logit_bias", ((1, NAN),)),
    ],
)
def test_impossible_sampling_is_refused(param, value):
    with pytest.raises(InvalidRequest) as caught:
        check(replace(make_call(10), sampling=replace(Sampling(5), **{param: value})))
    assert caught.value.param == f"sampling.{param}"
