"""Pixels as in serving, and exactly the chosen parts learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_cases import row_about, square, talk

from omnilmm.config import Family
from omnilmm.image.transform import normalise
from omnilmm.training.attend import RowAttend
from omnilmm.training.config import Learning, LoraConfig, OptimiserConfig
from omnilmm.training.learner import Learner, normalised, part_of
from omnilmm.training.optimise import Optimiser
from omnilmm.training.rows import collate
from omnilmm.training.sequences import SequenceMaker

TALK = talk("What is it?", "A red circle.")


def test_pixels_are_those_of_serving(learner_of: Callable[..., Learner]) -> None:
    policy = learner_of().policy
    picture = square(1)
    ours = normalised(torch.from_numpy(picture)[None], policy)[0].numpy()
    np.testing.assert_allclose(ours, normalise(picture.tobytes(), policy), rtol=0, atol=1e-6)


def step(learner: Learner, maker: SequenceMaker) -> dict[str, torch.Tensor]:
    """All parameters before one step of the optimiser."""
    before = {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}
    optimiser = Optimiser(learner, OptimiserConfig(weight_decay=0.1))
    losses = learner(collate([row_about(maker, 0, TALK)]))
    losses.answers.backward()
    optimiser.step(1e-2)
    return before


@pytest.mark.parametrize("learn", [(part,) for part in Learning] + [tuple(Learning)], ids="+".join)
def test_exactly_the_chosen_parts_change(
    learn: tuple[Learning, ...], learner_of: Callable[..., Learner], maker: SequenceMaker
) -> None:
    learner = learner_of(learn=learn)
    before = step(learner, maker)
    changed = {part_of(name) for name, now in learner.named_parameters() if not torch.equal(now, before[name])}
    assert changed == {*learn}


def test_position_tables_and_what_the_checkpoint_does_not_hold_stay(
    family: Family, learner_of: Callable[..., Learner], maker: SequenceMaker
) -> None:
    learner = learner_of()
    before = step(learner, maker)
    after = dict(learner.named_parameters())
    tables = [name for name in before if name.endswith("pos_embed")]
    assert len(tables) == 2
    assert all(torch.equal(before[name], after[name]) for name in tables)
    width = learner.config.vision.width
    key_bias = after["encoder.vision.blocks.0.attention.qkv.bias"][width : 2 * width]
    assert bool(key_bias.any()) == (family is Family.OMNILMM_3B)


def test_beside_lora_nothing_of_the_model_changes(learner_of: Callable[..., Learner], maker: SequenceMaker) -> None:
    learner = learner_of(learn=(), lora=LoraConfig(r=2))
    before = step(learner, maker)
    changed = {part_of(name) for name, now in learner.named_parameters() if not torch.equal(now, before[name])}
    assert changed == {"lora"}


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_lower_precision_is_close(weights: str, learner_of: Callable[..., Learner], maker: SequenceMaker) -> None:
    batch = collate([row_about(maker, 0, TALK), row_about(maker, 1, TALK)])
    exact = learner_of()(batch).answers.item()
    rounded = learner_of(learn=(), lora=LoraConfig(r=2), weights=weights, precision="bfloat16")(batch)
    assert rounded.answers.dtype == torch.float32
    assert rounded.answers.item() == pytest.approx(exact, rel=0.1)
    rounded.answers.backward()


def test_right_tokens_are_counted(learner_of: Callable[..., Learner], maker: SequenceMaker) -> None:
    learner = learner_of()
    batch = collate([row_about(maker, 0, TALK)])
    with torch.no_grad():
        hidden = learner.language(
            learner.embed(batch, learner.encode(batch.squares)), batch.positions, RowAttend(batch)
        )
        best = learner.language.logits(hidden[batch.target_tokens]).argmax(-1)
    assert int(learner(replace(batch, target_ids=best)).num_right) == batch.num_targets
    best[0] += 1
    assert int(learner(replace(batch, target_ids=best)).num_right) == batch.num_targets - 1
