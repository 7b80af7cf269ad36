"""The additional loss: what it counts, what it leaves out, what smoothing changes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from omnilmm.training.grounding import UNTOLD, Grounding


def told(smoothing: float = 0.0) -> tuple[Grounding, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = Grounding(6, 5, smoothing=smoothing)
    torch.nn.init.normal_(layer.read.weight)
    return layer, torch.randn(3, 4, 6), torch.randint(0, 2, (3, 4, 5), dtype=torch.uint8)


def test_the_loss_is_cross_entropy_by_picture_and_cell() -> None:
    layer, vectors, facts = told()
    logits = layer.read(layer.norm(vectors))
    wanted = functional.binary_cross_entropy_with_logits(logits, facts.float(), reduction="sum") / 4
    assert layer.loss(vectors, facts).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_nothing_is_learned_where_nothing_is_told() -> None:
    layer, vectors, facts = told(0.02)
    facts[1] = UNTOLD
    vectors.requires_grad_()
    layer.loss(vectors, facts).backward()
    assert vectors.grad is not None
    assert not vectors.grad[1].any()
    assert vectors.grad[0].any()
    rest = layer.loss(vectors[[0, 2]], facts[[0, 2]])
    assert layer.loss(vectors, facts).item() == pytest.approx(rest.item(), rel=1e-5)


def test_with_smoothing_the_best_is_not_certainty() -> None:
    layer = Grounding(2, 1, smoothing=0.1)
    torch.nn.init.zeros_(layer.read.weight)
    losses = {}
    for probability in (0.7, 0.9, 0.99):
        torch.nn.init.constant_(layer.read.bias, torch.logit(torch.tensor(probability)).item())
        losses[probability] = layer.loss(torch.zeros(1, 1, 2), torch.ones(1, 1, 1, dtype=torch.uint8)).item()
    assert losses[0.9] == pytest.approx(0, abs=1e-6)
    assert losses[0.9] < min(losses[0.7], losses[0.99])
