"""From gradients to a step: parameter groups, the rate's course, clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from omnilmm.training.config import Learning, OptimiserConfig
from omnilmm.training.learner import Learner


class Optimiser:
    """Makes the steps of everything that learns.

    One group per part and kind. Only matrices decay: neither gains and biases nor the tables whose rows are vectors of
    their own (embeddings, queries).
    """

    def __init__(self, learner: Learner, config: OptimiserConfig) -> None:
        groups: dict[tuple[bool, str, bool], list[Tensor]] = {}
        for part, name, parameter in learner.learning():
            decays = parameter.ndim > 1 and not name.endswith(_TABLES)
            for_muon = config.muon and parameter.ndim == 2 and decays and part in _INNER
            groups.setdefault((for_muon, part, decays), []).append(parameter)
        described: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for (for_muon, part, decays), parameters in groups.items():
            decay, factor = config.weight_decay if decays else 0.0, config.part_rates.get(part, 1.0)
            described[for_muon].append({"params": parameters, "weight_decay": decay, "factor": factor, "part": part})
        self._learner = learner
        self._members: list[torch.optim.Optimizer] = []
        if described[False]:
            betas = (config.beta1, config.beta2)
            adamw = torch.optim.AdamW(described[False], lr=0.0, betas=betas, eps=config.eps, fused=True)
            self._members.append(adamw)
        if described[True]:
            self._members.append(torch.optim.Muon(described[True], lr=0.0, adjust_lr_fn="match_rms_adamw"))

    @property
    def groups(self) -> list[dict[str, Any]]:
        return [group for member in self._members for group in member.param_groups]

    def zero_grad(self) -> None:
        for member in self._members:
            member.zero_grad(set_to_none=True)

    def step(self, rate: float, *, encoder_rate: float = 1.0) -> None:
        """One step at this learning rate, times the factor of each part."""
        for group in self.groups:
            group["lr"] = rate * group["factor"] * (encoder_rate if group["part"] in _ENCODER else 1.0)
        for member in self._members:
            member.step()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything remembered between steps, such as "exp_avg.language.norm.weight"."""
        for _, name, parameter in self._learner.learning():
            for member in self._members:
                for kind, value in member.state.get(parameter, {}).items():
                    yield f"{kind}.{name}", value

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember what `tensors` gave."""
        own = {id(parameter): member for member in self._members for group in member.param_groups
               for parameter in group["params"]}  # fmt: skip
        by_name = {name: parameter for _, name, parameter in self._learner.learning()}
        for entry, tensor in tensors.items():
            kind, _, name = entry.partition(".")
            parameter = by_name[name]
            own[id(parameter)].state.setdefault(parameter, {})[kind] = tensor.to(parameter.device)


_TABLES = ("embedding.weight", "query", "class_token")
_ENCODER = (Learning.VISION, Learning.RESAMPLER)
_INNER = (Learning.VISION, Learning.RESAMPLER, Learning.LLM)


def rate_at(step: int, steps: int, config: OptimiserConfig) -> float:
    """The learning rate of step `step` (from 0) of `steps`: up in a straight line, down along a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    low = config.final_ratio
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def clip_gradients(gradients: list[Tensor], limit: float) -> float:
    """Scale all gradients so that their common norm is at most `limit`; the norm before that."""
    norm = torch.nn.utils.get_total_norm(gradients)
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)
    return float(norm)
