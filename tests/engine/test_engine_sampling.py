"""Every wish about sampling, through the engine: it does something, and gives the same tokens whatever happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_fakes import all_ids, lone_run, make_call, make_driver
from grammar_fakes import ANY_OBJECT, EOS

from omnilmm.messages import FinishReason, GenerateCall, Sampling

RANDOM = Sampling(0, temperature=1.0, seed=11)
WISHES = {
    "greedy": Sampling(0),
    "temperature": replace(RANDOM, temperature=0.6),
    "top_k": replace(RANDOM, top_k=3),
    "top_p": replace(RANDOM, top_p=0.5),
    "min_p": replace(RANDOM, min_p=0.4),
    "repetition_penalty": Sampling(0, repetition_penalty=1.8),
    "presence_penalty": Sampling(0, presence_penalty=2.0),
    "frequency_penalty": Sampling(0, frequency_penalty=1.5),
    "logit_bias": Sampling(0, logit_bias=((9, 6.0), (17, -3.0))),
    "min_tokens": Sampling(0, stop_ids=tuple(range(5, 61, 2)), min_tokens=5),
    "stop_ids": Sampling(0, stop_ids=tuple(range(5, 61, 2))),
    "seed": replace(RANDOM, seed=12),
    "grammar": Sampling(0, grammar=ANY_OBJECT, stop_ids=(EOS,)),
    "everything": Sampling(
        0, temperature=0.9, top_k=30, top_p=0.9, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.2, logit_bias=((9, 1.0),), min_tokens=3, stop_ids=(7, 19), seed=13, logprobs=2,
    ),
}  # fmt: skip
PLAIN = {"temperature": RANDOM, "top_k": RANDOM, "top_p": RANDOM, "min_p": RANDOM, "seed": RANDOM}
PLAIN["min_tokens"] = WISHES["stop_ids"]


def ask(sampling: Sampling, seed: int = 0) -> GenerateCall:
    return make_call(9 + seed, seed=seed, max_tokens=14, sampling=sampling)


@pytest.mark.parametrize("name", [name for name in WISHES if name != "greedy"])
def test_a_wish_is_heard(model, name):
    """Each changes the answer to at least one of a few prompts; an option that did nothing would not."""
    prompts = range(6)
    plain = PLAIN.get(name, Sampling(0))
    assert [lone_run(model, ask(WISHES[name], n)) for n in prompts] != [lone_run(model, ask(plain, n)) for n in prompts]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_sequences": 1},
        {"max_sequences": 14, "max_step_tokens": 64},
        {"max_sequences": 14, "max_step_tokens": 5},
        {"max_sequences": 14, "num_blocks": 18, "block_size": 3, "max_step_tokens": 17},
    ],
    ids=["alone", "batched", "chunked", "preempted"],
)
def test_company_chunks_and_preemption_change_nothing(model, settings):
    calls = [ask(sampling, n % 4) for n, sampling in enumerate(WISHES.values())]
    driver = make_driver(model, **settings)
    answers = driver.run(*calls)
    assert all_ids(answers) == [lone_run(model, call) for call in calls]
    assert driver.engine.stats().num_preemptions >= (3 if "num_blocks" in settings else 0)


@pytest.mark.parametrize("name", WISHES)
def test_another_engine_goes_on_from_any_token(model, name):
    call = ask(WISHES[name])
    whole = lone_run(model, call)
    calls = [replace(call, emitted=whole[:k]) for k in range(len(whole) + 1)]
    answers = make_driver(model, max_step_tokens=20, max_sequences=16).run(*calls)
    assert all_ids(answers) == [whole[k:] for k in range(len(whole) + 1)]


def test_ignoring_the_end_token_is_having_no_stop_id(model):
    ids = lone_run(model, ask(Sampling(0)))
    (ended,) = make_driver(model).run(ask(Sampling(0, stop_ids=(ids[2],))))
    (ignored,) = make_driver(model).run(ask(Sampling(0)))
    assert ended.finish is FinishReason.STOP
    assert len(ended.ids) <= 3
    assert (ignored.ids, ignored.finish) == (ids, FinishReason.LENGTH)


def test_logprobs_are_told_for_the_tokens_as_they_come(model):
    call = ask(replace(WISHES["everything"], stop_ids=()))
    (alone,) = make_driver(model).run(call)
    (chunked,) = make_driver(model, max_step_tokens=4).run(call)
    assert len(alone.logprobs) == len(chunked.logprobs) == 14
    for one, other in zip(alone.logprobs, chunked.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [i for i, _ in one.top] == [i for i, _ in other.top]
