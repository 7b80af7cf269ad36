from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_fakes import CONFIG, HIDDEN, lone_run, make_call, make_driver, make_model, make_vectors

from omnilmm.engine import runner as module
from omnilmm.engine.plan import Plan
from omnilmm.engine.runner import ModelRunner
from omnilmm.errors import ConfigError, OmniError
from omnilmm.messages import Embedding, Sampling
from omnilmm.models.decoder import LanguageModel

LENGTH = 6
GOOD = make_vectors("a", LENGTH)


def test_a_context_the_model_does_not_have_is_refused(model):
    with pytest.raises(ConfigError, match="max_context"):
        ModelRunner(model, CONFIG.resolve(max_context=129))


def test_an_empty_plan_computes_nothing(model):
    result = ModelRunner(model, CONFIG).run(Plan())
    assert not result.drawn
    assert not result.failures


def broken(index: int, value: float) -> Embedding:
    numbers = np.frombuffer(GOOD.data, dtype=np.float32).copy()
    numbers[index] = value
    return replace(GOOD, data=numbers.tobytes())


@pytest.mark.parametrize(
    "embedding",
    [
        broken(0, float("nan")),
        broken(-1, float("inf")),
        replace(GOOD, dtype="float64"),
        replace(GOOD, dtype="bfloat16"),
        replace(GOOD, shape=(LENGTH + 1, HIDDEN)),
        replace(GOOD, shape=(LENGTH * 2, HIDDEN // 2)),
        replace(GOOD, data=GOOD.data[:-4]),
        replace(GOOD, data=b""),
    ],
    ids=["nan", "inf", "unknown dtype", "other dtype", "longer", "narrower", "cut", "empty"],
)
def test_bad_vectors_fail_their_sequence_only(model, embedding):
    good = make_call(12, pictures=[("a", 2, LENGTH)])
    bad = replace(good, images=(replace(good.images[0], key="bad", embedding=embedding),))
    driver = make_driver(model)
    answers = driver.run(make_call(9, seed=1), bad, good)
    assert isinstance(answers[1].error, OmniError)
    assert "embedding" in str(answers[1].error)  # found before anything was computed with it
    assert answers[1].ids == ()
    assert answers[0].ids == lone_run(model, make_call(9, seed=1))
    assert answers[2].ids == lone_run(model, good)
    assert driver.engine.stats().blocks_used == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_are_understood(model, dtype):
    exact = torch.frombuffer(bytearray(GOOD.data), dtype=torch.float32).to(dtype).view(LENGTH, HIDDEN)
    names = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    half = Embedding(names[dtype], (LENGTH, HIDDEN), exact.view(torch.uint8).numpy().tobytes())
    full = Embedding("float32", (LENGTH, HIDDEN), exact.float().numpy().tobytes())
    call = make_call(12, pictures=[("a", 2, LENGTH)])
    answers = [
        make_driver(model).run(replace(call, images=(replace(call.images[0], embedding=embedding),)))[0].ids
        for embedding in (half, full)
    ]
    assert answers[0] == answers[1]


POISON = 2
NEVER_POISON = Sampling(0, logit_bias=((POISON, -100.0),))


def poisoned_model() -> LanguageModel:
    """A model that computes NaN wherever the poison token has been seen."""
    model = make_model()
    model.embedding.weight[POISON] = torch.nan
    return model


@pytest.mark.parametrize("max_step_tokens", [4, 64])
def test_numbers_that_are_not_finite_fail_their_sequence_only(model, max_step_tokens):
    driver = make_driver(poisoned_model(), max_step_tokens=max_step_tokens)
    goods = [make_call(9, seed=1, sampling=NEVER_POISON), make_call(17, seed=2, sampling=NEVER_POISON)]
    first, failed, second = driver.run(goods[0], make_call((7, 8, 9, POISON, *range(10, 16))), goods[1])
    assert isinstance(failed.error, OmniError)
    assert failed.ids == ()
    assert [first.ids, second.ids] == [lone_run(model, call) for call in goods]


def test_a_failed_sequence_leaves_nothing_to_find(model):
    driver = make_driver(poisoned_model(), max_step_tokens=4)
    ids = (7, 8, 9, 10, 11, 12, 13, 14)
    assert driver.run(make_call((*ids, POISON, 15, 16, 17)))[0].error
    call = make_call((*ids, 20, 21), sampling=NEVER_POISON)
    follower = driver.run(call)[0]
    assert follower.prefill.num_cached_tokens == 0
    assert follower.ids == lone_run(model, call)


def test_poison_left_in_the_pool_does_not_spread(model):
    """Blocks of a failed sequence hold NaN; who gets them next reads only what it wrote."""
    driver = make_driver(poisoned_model(), num_blocks=6)
    for seed in range(4):
        assert driver.run(make_call((POISON, *range(10, 25)), max_tokens=2))[0].error
        goods = [make_call(5 + n, seed=seed + n, max_tokens=4, sampling=NEVER_POISON) for n in (0, 4)]
        assert [answer.ids for answer in driver.run(*goods)] == [lone_run(model, call) for call in goods]


def test_bfloat16_runs_and_batches_alike():
    model = make_model(torch.bfloat16)
    calls = [make_call(5 + 3 * seed, seed=seed, max_tokens=4) for seed in range(4)]
    together = make_driver(model).run(*calls)
    alone = [make_driver(model).run(call)[0] for call in calls]
    assert all(len(answer.ids) == 4 for answer in together)
    # Near-ties may flip in bfloat16; the first token of each rests on nothing but its own prompt.
    assert [a.ids[0] for a in together] == [a.ids[0] for a in alone]


def test_cores_are_owned_from_the_first_step_on(model, monkeypatch):
    pinned = []
    monkeypatch.setattr(module, "pin_threads", lambda: pinned.append(threading.get_ident()))
    runner = ModelRunner(model, CONFIG, owns_cores=True)
    assert not pinned
    with ThreadPoolExecutor(1) as pool:
        thread_id = pool.submit(lambda: (runner.run(Plan()), threading.get_ident())[1]).result()
        pool.submit(runner.run, Plan()).result()
    assert pinned == [thread_id]
    ModelRunner(model, CONFIG).run(Plan())
    assert pinned == [thread_id]
