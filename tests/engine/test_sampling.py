"""Filters against transformers' own processors, and draws against the distribution they claim to follow."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from omnilmm.engine import sampling as module
from omnilmm.engine.plan import Draw, Drawn
from omnilmm.engine.sampling import distribution, draw_tokens
from omnilmm.messages import Sampling

VOCAB = 3000  # larger than the widest shortcut
GREEDY = Sampling(max_tokens=8)


def make_logits(num_rows: int = 1, *, seed: int = 0, spread: float = 3.0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def draw(sampling: Sampling, position: int = 0, **fields: tuple[int, ...]) -> Draw:
    return Draw(sampling, position, **fields)


def ids_of(drawn: list[Drawn]) -> list[int]:
    return [token.id for token in drawn]


def by_transformers(logits: Tensor, sampling: Sampling, seen: tuple[int, ...]) -> Tensor:
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    input_ids = torch.tensor([seen or (0,)])
    return processors(input_ids, logits.clone()).softmax(dim=-1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 2 * VOCAB},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 0.6, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.1},
        {"temperature": 1.2, "top_k": 500, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_distribution_is_that_of_transformers(settings, seed):
    sampling = replace(GREEDY, **{"temperature": 1.0, **settings})
    seen = (5, 7, 7, 2999) if sampling.repetition_penalty != 1.0 else ()
    logits = make_logits(seed=seed)
    ours = distribution(logits, [draw(sampling, seen=seen)])
    theirs = by_transformers(logits, sampling, seen)
    assert torch.equal(ours > 0, theirs > 0)
    assert_close(ours.float(), theirs, atol=1e-6, rtol=1e-4)


def test_equals_of_the_kth_survive_with_it():
    logits = torch.full((1, VOCAB), -1.0)
    logits[0, [4, 9, 700]] = 2.0
    logits[0, 11] = 3.0
    sampling = replace(GREEDY, temperature=1.0, top_k=2)
    expected = by_transformers(logits, sampling, ())
    assert_close(distribution(logits, [draw(sampling)]).float(), expected)
    assert set(expected[0].nonzero().flatten().tolist()) == {4, 9, 11, 700}


def test_rows_do_not_touch_one_another():
    logits = make_logits(4)
    settings = [
        replace(GREEDY, temperature=0.8, top_p=0.9),
        GREEDY,
        replace(GREEDY, temperature=1.3, top_k=20, repetition_penalty=1.5),
        replace(GREEDY, temperature=0.9, frequency_penalty=1.0, min_p=0.1, logprobs=3),
    ]
    draws = [draw(s, position, generated=(1, 2), seen=(3,)) for position, s in enumerate(settings)]
    together = draw_tokens(logits, draws)
    assert together == [draw_tokens(logits[row : row + 1], [draws[row]])[0] for row in range(4)]


def test_logits_are_left_as_they_are():
    logits = make_logits(2)
    before = logits.clone()
    everything = Sampling(
        8, temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=1.2, presence_penalty=1.0,
        logit_bias=((3, 5.0),), min_tokens=4, stop_ids=(9,), logprobs=2,
    )  # fmt: skip
    draw_tokens(logits, [draw(everything, seen=(1,), generated=(1,))] * 2)
    assert torch.equal(logits, before)


def test_greedy_takes_the_best_and_of_equals_the_lowest_id():
    logits = make_logits()
    best = int(logits.argmax())
    assert ids_of(draw_tokens(logits, [draw(GREEDY)])) == [best]
    logits[0, [40, 1500]] = 99.0
    assert ids_of(draw_tokens(logits, [draw(GREEDY)])) == [40]


def test_a_greedy_batch_is_one_argmax(monkeypatch):
    def refuse(*args):
        raise AssertionError("work that no row asked for")

    names = (
        "_penalise_repetition",
        "_penalise_counts",
        "_add_bias",
        "_forbid_stopping",
        "_keep_allowed",
        "_draw_random",
    )
    for name in names:
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch.Tensor, "clone", refuse)
    monkeypatch.setattr(torch.Tensor, "log_softmax", refuse)
    logits = make_logits(16)
    assert ids_of(draw_tokens(logits, [draw(GREEDY)] * 16)) == logits.argmax(-1).tolist()


def test_penalties_apply_to_greedy_too():
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8] = 2.0, 1.9
    assert ids_of(draw_tokens(logits, [draw(replace(GREEDY, repetition_penalty=1.2), seen=(7, 7))])) == [8]
    logits -= 5.0  # a negative score is multiplied: less likely again
    assert ids_of(draw_tokens(logits, [draw(replace(GREEDY, repetition_penalty=1.2), seen=(7,))])) == [8]


def test_presence_counts_once_and_frequency_each_time():
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8], logits[0, 9] = 5.0, 4.0, 3.0
    sampling = replace(GREEDY, temperature=1.0, presence_penalty=0.25, frequency_penalty=0.5)
    probs = distribution(logits, [draw(sampling, generated=(7, 7, 7, 8))])
    expected = logits.clone()
    expected[0, 7] -= 0.25 + 3 * 0.5
    expected[0, 8] -= 0.25 + 0.5
    assert_close(probs.float(), expected.softmax(-1))


def test_bias_is_added_and_may_decide():
    logits = make_logits()
    assert ids_of(draw_tokens(logits, [draw(replace(GREEDY, logit_bias=((17, 100.0),)))])) == [17]
    best = int(logits.argmax())
    assert ids_of(draw_tokens(logits, [draw(replace(GREEDY, logit_bias=((best, -100.0),)))])) != [best]


def test_order_is_penalty_then_bias():
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 4.0
    sampling = replace(GREEDY, temperature=1.0, repetition_penalty=2.0, logit_bias=((7, 1.0),))
    expected = torch.zeros(1, VOCAB)
    expected[0, 7] = 4.0 / 2.0 + 1.0
    assert_close(distribution(logits, [draw(sampling, seen=(7,))]).float(), expected.softmax(-1))


def test_min_tokens_forbids_the_stop_ids_as_transformers_does():
    logits = make_logits()
    best, second = logits[0].topk(2).indices.tolist()
    sampling = replace(GREEDY, min_tokens=2, stop_ids=(best,))
    assert [ids_of(draw_tokens(logits, [draw(sampling, n)]))[0] for n in range(3)] == [second, second, best]
    random = replace(sampling, temperature=1.0)
    theirs = MinLengthLogitsProcessor(5, [best])(torch.tensor([[0]]), logits.clone()).softmax(-1)
    assert_close(distribution(logits, [draw(random)]).float(), theirs)
    drawn = {ids_of(draw_tokens(logits, [draw(replace(random, seed=seed))]))[0] for seed in range(200)}
    assert best not in drawn


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 2.0, "top_k": 8, "min_p": 0.02}],
)
def test_draws_follow_the_distribution(settings):
    sampling = replace(GREEDY, **settings)
    logits = make_logits(spread=2.0, vocab=40)
    num_draws = 4000
    draws = [draw(replace(sampling, seed=9), position) for position in range(num_draws)]
    counts = Counter(ids_of(draw_tokens(logits.expand(num_draws, -1), draws)))
    expected = distribution(logits, [draws[0]])[0] * num_draws
    frequent = [token_id for token_id in range(40) if expected[token_id] >= 5]
    chi_square = sum((counts[i] - expected[i].item()) ** 2 / expected[i].item() for i in frequent)
    assert chi_square < len(frequent) + 4 * (2 * len(frequent)) ** 0.5  # four deviations
    assert all(expected[token_id] > 0 for token_id in counts)


def test_a_draw_inverts_the_distribution_from_the_best_token_down(monkeypatch):
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    probs = logits.softmax(-1)[0].double()
    sampling = replace(GREEDY, temperature=1.0)
    edges = [0.0, probs[1], probs[1] + probs[3], probs[1] + probs[3] + probs[2], 1.0]  # 1 and 3 are equal: by id
    for expected, low, high in zip((1, 3, 2, 0), edges, edges[1:], strict=False):
        for number in (float(low) + 1e-6, float(high) - 1e-6):
            monkeypatch.setattr(module, "uniform", lambda seed, position, number=number: number)
            assert ids_of(draw_tokens(logits, [draw(sampling)])) == [expected]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"top_k": 40},
        {"top_k": 900},
        {"min_p": 0.3},
        {"min_p": 1e-6},
        {"top_k": 900, "top_p": 0.4},
    ],
)
@pytest.mark.parametrize("logits", [make_logits(60, spread=s) for s in (0.01, 1.0, 4.0)], ids=["flat", "even", "steep"])
def test_looking_at_few_tokens_gives_the_same_draw(settings, logits, monkeypatch):
    draws = [draw(replace(GREEDY, temperature=1.0, seed=3, **settings), row) for row in range(len(logits))]
    quick = ids_of(draw_tokens(logits, draws))
    rounded = (logits * 4).round() / 4  # runs of equals, as in bfloat16
    quick_rounded = ids_of(draw_tokens(rounded, draws))
    monkeypatch.setattr(module, "WIDTHS", ())
    assert quick == ids_of(draw_tokens(logits, draws))
    assert quick_rounded == ids_of(draw_tokens(rounded, draws))


def test_the_end_of_the_interval_still_draws_a_survivor(monkeypatch):
    monkeypatch.setattr(module, "uniform", lambda seed, position: 1.0 - 2.0**-53)
    logits = make_logits(8)
    for settings in ({}, {"top_p": 0.5}, {"top_k": 7}, {"min_p": 0.1}, {"min_tokens": 5, "stop_ids": (1, 2)}):
        draws = [draw(replace(GREEDY, temperature=1.0, **settings))] * 8
        ids = torch.tensor(ids_of(draw_tokens(logits, draws)))
        assert (distribution(logits, draws).gather(-1, ids[:, None]) > 0).all()


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = make_logits(4)
    draws = [draw(replace(GREEDY, temperature=temperature, top_p=0.9, seed=seed)) for seed in range(4)]
    assert ids_of(draw_tokens(logits, draws)) == logits.argmax(-1).tolist()


def test_seed_and_position_decide_and_nothing_else():
    logits = make_logits(spread=0.5)
    sampling = replace(GREEDY, temperature=1.0, seed=4)
    one = ids_of(draw_tokens(logits, [draw(sampling, 2)]))
    assert ids_of(draw_tokens(logits, [draw(replace(sampling, max_tokens=99), 2)])) == one
    others = {
        *ids_of(draw_tokens(logits, [draw(sampling, 3)])),
        *ids_of(draw_tokens(logits, [draw(replace(sampling, seed=5), 2)])),
    }
    assert one[0] not in others


def test_logprobs_are_the_models_own():
    logits = make_logits(3)
    plain, few, none = 2, 0, None
    settings = [
        replace(GREEDY, logprobs=n, temperature=1.0, top_k=5, logit_bias=((7, 50.0),)) for n in (plain, few, none)
    ]
    drawn = draw_tokens(logits, [draw(s) for s in settings])
    expected = logits.log_softmax(-1)
    assert drawn[0].id == 7  # the bias decided, and does not show
    assert drawn[0].logprob.logprob == pytest.approx(expected[0, 7].item(), abs=1e-5)
    best = expected[0].topk(2)
    assert [token_id for token_id, _ in drawn[0].logprob.top] == best.indices.tolist()
    assert [value for _, value in drawn[0].logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert drawn[1].logprob.top == ()
    assert drawn[2].logprob is None
