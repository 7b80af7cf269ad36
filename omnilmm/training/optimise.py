"""From gradients to a step: parameter groups, the rate's course, clipping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omnilmm.training.config import OptimiserConfig
from omnilmm.training.learner import Learner


def make_optimiser(learner: Learner, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW over everything that learns, one group per part and kind. Only matrices decay: neither gains and biases
    nor the tables whose rows are vectors of their own (embeddings, queries)."""
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for part, name, parameter in learner.learning():
        decays = parameter.ndim > 1 and not name.endswith(("embedding.weight", "query", "class_token"))
        groups.setdefault((part, decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                "factor": config.part_rates.get(part, 1.0),
            }
            for (part, decays), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def rate_at(step: int, steps: int, config: OptimiserConfig) -> float:
    """The learning rate of step `step` (from 0) of `steps`: up in a straight line, down along a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    low = config.final_ratio
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate * group["factor"]


def clip_gradients(gradients: list[Tensor], limit: float) -> float:
    """Scale all gradients so that their common norm is at most `limit`; the norm before that."""
    norm = torch.nn.utils.get_total_norm(gradients)
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)
    return float(norm)
