"""Answers with a form, through the whole engine: valid, and the same tokens whatever happens to their sequence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import test_engine_goldens as pictures
from engine_fakes import VOCAB, Driver, all_ids, lone_run, make_call, make_driver, make_ids
from grammar_fakes import (
    ANY_OBJECT,
    EOS,
    NUMBERS,
    NUMBERS_SCHEMA,
    RECORD,
    RECORD_SCHEMA,
    PieceTokenizer,
    formed,
    grammar,
    start_matcher,
    text_of,
)
from jsonschema import validate

from omnilmm.engine.engine import Engine
from omnilmm.engine.grammar import GrammarCompiler
from omnilmm.engine.runner import ModelRunner
from omnilmm.errors import InvalidRequest
from omnilmm.messages import FinishReason, GenerateCall, Sampling
from omnilmm.prompt.tokens import load_tokenizer

PICTURE = {"pictures": [("a", 2, 8)]}
SAMPLED = {"temperature": 1.0, "top_p": 0.95}
SCHEMAS = ((RECORD, RECORD_SCHEMA), (NUMBERS, NUMBERS_SCHEMA), (ANY_OBJECT, {"type": "object"}))


def mixed_calls(max_tokens: int = 24) -> list[GenerateCall]:
    """Forms of every kind, greedy and sampled, with and without a picture, and plain calls in between."""
    samplings = [
        formed(RECORD),
        formed(NUMBERS, **SAMPLED, seed=1),
        Sampling(0),
        formed(ANY_OBJECT, **SAMPLED, seed=2, top_k=10),
        formed(RECORD, **SAMPLED, seed=3, repetition_penalty=1.3, frequency_penalty=0.4),
        Sampling(0, **SAMPLED, seed=4),
        formed(ANY_OBJECT, presence_penalty=0.5, min_tokens=6),
        formed(NUMBERS, **SAMPLED, seed=5, min_p=0.02, min_tokens=4),
    ]
    calls = [make_call(5 + 2 * n, seed=n, max_tokens=max_tokens, sampling=s) for n, s in enumerate(samplings)]
    return [*calls, make_call(20, max_tokens=max_tokens, sampling=formed(RECORD, **SAMPLED, seed=7), **PICTURE)]


def test_the_vocabulary_is_the_models():
    assert PieceTokenizer.vocab_size == VOCAB


@pytest.mark.parametrize("form", SCHEMAS, ids=["record", "numbers", "any"])
def test_every_finished_answer_is_valid(model, form):
    form, schema = form
    calls = [make_call(6, seed=n, max_tokens=60, sampling=formed(form, **SAMPLED, seed=n)) for n in range(12)]
    finished = [a for a in make_driver(model).run(*calls) if a.finish is FinishReason.STOP]
    assert finished
    for answer in finished:
        assert answer.ids[-1] == EOS
        assert EOS not in answer.ids[:-1]
        validate(json.loads(text_of(answer.ids)), schema)


def test_an_answer_that_is_cut_is_told_so(model):
    (answer,) = make_driver(model).run(make_call(6, max_tokens=3, sampling=formed(RECORD)))
    assert answer.finish is FinishReason.LENGTH
    assert '{"a":"ab","b":false}'.startswith(text_of(answer.ids).replace(" ", "").replace("\n", "")[:4])


@pytest.mark.parametrize("max_step_tokens", [1, 3, 64])
def test_company_and_chunks_change_nothing(model, max_step_tokens):
    calls = mixed_calls()
    answers = make_driver(model, max_step_tokens=max_step_tokens, max_sequences=9).run(*calls)
    assert all_ids(answers) == [lone_run(model, call) for call in calls]


def test_preemption_changes_nothing(model):
    calls = mixed_calls()
    driver = make_driver(model, num_blocks=16, block_size=3)
    answers = driver.run(*calls)
    assert driver.engine.stats().num_preemptions >= 3
    assert all_ids(answers) == [lone_run(model, call) for call in calls]


@pytest.mark.parametrize("sampling", [formed(RECORD), formed(ANY_OBJECT, **SAMPLED, seed=9)], ids=["greedy", "sampled"])
def test_another_engine_goes_on_from_any_token(model, sampling):
    call = make_call(12, max_tokens=20, sampling=sampling, **PICTURE)
    whole = lone_run(model, call)
    assert len(whole) > 8
    for k in range(len(whole) + 1):
        (answer,) = make_driver(model, max_step_tokens=5).run(replace(call, emitted=whole[:k]))
        assert answer.ids == whole[k:]
        assert answer.finish is (FinishReason.STOP if whole[-1] == EOS else FinishReason.LENGTH)


def test_a_second_turn_shares_the_prefix_of_the_first(model):
    driver = make_driver(model)
    first = make_call(22, max_tokens=7, sampling=formed(NUMBERS))
    (answer,) = driver.run(first)
    second = make_call((*first.prompt.ids, *answer.ids, *make_ids(5, seed=3)), sampling=formed(RECORD, seed=1))
    (again,) = driver.run(second)
    assert again.prefill.num_cached_tokens >= 20
    assert again.ids == lone_run(model, second)


def test_a_value_that_is_complete_ends_before_min_tokens(model):
    (answer,) = make_driver(model).run(
        make_call(6, max_tokens=30, sampling=formed(grammar({"const": "ab"}), min_tokens=20))
    )
    assert text_of(answer.ids) == '"ab"'
    assert answer.finish is FinishReason.STOP


def test_a_value_that_could_end_goes_on_to_min_tokens(model):
    digits, wants_to_stop = grammar({"type": "integer", "minimum": 1}), ((EOS, 50.0),)
    short, long = make_driver(model).run(
        *(make_call(6, max_tokens=30, sampling=formed(digits, min_tokens=n, logit_bias=wants_to_stop)) for n in (0, 8))
    )
    assert (len(short.ids), short.ids[-1]) == (2, EOS)  # not before the first digit
    assert (len(long.ids), long.ids[-1]) == (9, EOS)


def test_logprobs_are_those_of_the_model_itself(model):
    plain = make_call(9, max_tokens=1, sampling=Sampling(0, logprobs=3))
    kept = make_call(9, max_tokens=1, sampling=formed(RECORD, logprobs=3))
    (plain,), (kept,) = make_driver(model).run(plain), make_driver(model).run(kept)
    assert plain.ids != kept.ids
    assert kept.logprobs[0].top == plain.logprobs[0].top
    assert kept.logprobs[0].logprob < plain.logprobs[0].logprob


def test_a_grammar_that_gives_up_takes_nobody_with_it(model):
    class GivesUp:
        def __init__(self, call: GenerateCall) -> None:
            self._matcher = start_matcher(call)
            self._num_tokens = 0

        def mask(self, *, may_stop: bool) -> bytes:
            return self._matcher.mask(may_stop=may_stop)

        def advance(self, token_ids) -> None:
            self._num_tokens += 1
            if self._num_tokens == 4:
                raise InvalidRequest("too hard", param="response_format")
            self._matcher.advance(token_ids)

    driver: Driver = make_driver(model)
    others = mixed_calls()[:4]
    doomed = make_call(7, max_tokens=20, sampling=formed(ANY_OBJECT, **SAMPLED, seed=8))
    ids = [driver.submit(call) for call in others]
    answer = driver.answers[driver.add(driver.engine.submit(doomed, matcher=GivesUp(doomed)))]
    driver.finish()
    assert answer.error.param == "response_format"
    assert driver.engine.stats().num_failed == 1
    assert answer.ids == lone_run(model, doomed)[:3]
    assert [driver.answers[i].ids for i in ids] == [lone_run(model, call) for call in others]
    assert driver.engine.stats().blocks_used == 0


# -- the picture models -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", pictures.FAMILIES)
def test_pictures_are_answered_in_form(family):
    """Both checkpoints with their own vocabularies: valid, and the same alone, in company and resumed."""
    language, goldens, tensors = pictures.load(family)
    tokenizer = load_tokenizer(pictures.DATA / family)
    compiler = GrammarCompiler(tokenizer, vocab_size=language.config.vocab_size)
    stop_ids = (tokenizer.eos_id,)
    samplings = [Sampling(60, grammar=RECORD, stop_ids=stop_ids), Sampling(60, temperature=1.0, seed=3)]
    samplings += [replace(samplings[0], temperature=1.5, top_p=0.9, seed=n) for n in range(3)]
    case = next(case for case in goldens["cases"] if case.get("greedy"))
    calls = [pictures.make_call(case, goldens, tensors, sampling) for sampling in samplings]

    def answers(calls: list[GenerateCall], **changes: int) -> list[tuple[int, ...]]:
        config = pictures.CONFIG.resolve(**changes)
        driver = Driver(Engine(ModelRunner(language, config), config))
        ids = []
        for call in calls:
            form = call.sampling.grammar
            matcher = form and compiler.start(form, stop_ids=stop_ids, emitted=call.emitted)
            ids.append(driver.add(driver.engine.submit(call, matcher=matcher)))
        driver.finish()
        return [driver.answers[sequence_id].ids for sequence_id in ids]

    together = answers(calls)
    assert together == [answers([call])[0] for call in calls]
    assert together == answers(calls, num_blocks=24, max_step_tokens=33)
    resumed = [
        replace(call, emitted=ids[: 2 + 3 * n]) for n, (call, ids) in enumerate(zip(calls, together, strict=True))
    ]
    assert [(*call.emitted, *ids) for call, ids in zip(resumed, answers(resumed), strict=True)] == together
    finished = [ids for ids in (together[0], *together[2:]) if ids[-1] == tokenizer.eos_id]
    assert finished
    for ids in finished:
        validate(json.loads(b"".join(map(tokenizer.token_bytes, ids[:-1]))), RECORD_SCHEMA)
