"""The rate's course, who decays, and clipping."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from omnilmm.training.config import LoraConfig, OptimiserConfig
from omnilmm.training.learner import Learner
from omnilmm.training.optimise import Optimiser, clip_gradients, rate_at

CONFIG = OptimiserConfig(learning_rate=1.0, warmup_steps=4, final_ratio=0.1)


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    rates = [rate_at(step, 104, CONFIG) for step in range(105)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[4:]))


def test_without_warm_up_it_begins_at_the_top() -> None:
    assert rate_at(0, 10, OptimiserConfig(learning_rate=2.0)) == 2.0


def test_only_matrices_decay_and_parts_have_rates_of_their_own(learner_of: Callable[..., Learner]) -> None:
    learner = learner_of(learn=("vision", "embeddings"), lora=LoraConfig(r=2))
    config = OptimiserConfig(learning_rate=1.0, weight_decay=0.1, part_rates={"vision": 0.5})
    optimiser = Optimiser(learner, config)
    names = {id(parameter): name for _, name, parameter in learner.learning()}
    decaying = set()
    optimiser.step(0.2)
    for group in optimiser.groups:
        group_names = {names.pop(id(parameter)) for parameter in group["params"]}
        is_vision = all(name.startswith("encoder.vision") for name in group_names)
        assert group["lr"] == pytest.approx(0.1 if is_vision else 0.2)
        decaying |= group_names if group["weight_decay"] else set()
    assert not names
    assert "encoder.vision.patch_embed.weight" in decaying
    assert "language.embedding.weight" not in decaying
    assert not any(name.endswith("bias") or ".norm" in name for name in decaying)


def test_the_encoder_can_be_slower_for_a_while(learner_of: Callable[..., Learner]) -> None:
    optimiser = Optimiser(learner_of(), OptimiserConfig(learning_rate=1.0))
    optimiser.step(0.2, encoder_rate=0.5)
    rates = {group["part"]: group["lr"] for group in optimiser.groups}
    assert rates == pytest.approx({"vision": 0.1, "resampler": 0.1, "llm": 0.2, "embeddings": 0.2})


def test_long_gradients_are_cut_and_short_ones_are_not() -> None:
    gradients = [torch.full((2,), 3.0), torch.full((2,), 4.0)]
    norm = clip_gradients(gradients, 1.0)
    assert norm == pytest.approx(50**0.5)
    assert float(torch.cat(gradients).norm()) == pytest.approx(1.0, rel=1e-4)
    before = [gradient.clone() for gradient in gradients]
    clip_gradients(gradients, 5.0)
    assert all(map(torch.equal, gradients, before))


def test_muon_gets_the_inner_matrices_and_nothing_else(learner_of: Callable[..., Learner]) -> None:
    learner = learner_of()
    optimiser = Optimiser(learner, OptimiserConfig(muon=True))
    for _, _, parameter in learner.learning():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step(1e-3)
    turned = {name.partition(".")[2] for name, _ in optimiser.tensors() if name.startswith("momentum_buffer.")}
    assert "language.layers.0.mlp.down.weight" in turned
    assert "encoder.resampler.proj" in turned
    assert not {"language.embedding.weight", "language.head.weight", "encoder.resampler.query"} & turned
    assert all(dict(learner.named_parameters())[name].ndim == 2 for name in turned)
