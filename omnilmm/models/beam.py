"""Beam search of the library path, equal to generate() of transformers 4.36 with early_stopping=False.

What the originals run when sampling is off: 3 beams and a repetition penalty on log-probabilities. The rules, with
num_beams = B:

- each step ranks all B * vocab_size continuations by summed (penalised) log-probability and looks at the best
  B * (1 + number of end tokens), at least 2 B;
- one that ends within the first B of that ranking becomes a finished hypothesis, scored by its sum divided by its
  length (end token included) to the power of length_penalty; the first B that do not end are the next beams;
- B finished hypotheses are kept; the search ends when the worst of them beats what the best continuation of this
  step would score at this length, or when max_tokens is reached, and then the running beams count as finished too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from omnilmm.errors import ContextLengthExceeded, InvalidRequest
from omnilmm.models.attention import DenseAttend
from omnilmm.models.decoder import LanguageModel

_NEVER = -1e9  # score of the copies of the only beam at the first step


@dataclass(frozen=True, slots=True)
class _Hypothesis:
    score: float
    ids: tuple[int, ...]


class _Continuation(NamedTuple):
    """Beam `parent` followed by `token`, and the summed log-probability of the whole."""

    parent: int
    token: int
    total: float


class _Finished:
    """The best `size` finished hypotheses so far."""

    def __init__(self, size: int, length_penalty: float) -> None:
        self._size, self._length_penalty = size, length_penalty
        self._kept: list[_Hypothesis] = []

    def score(self, total: float, length: int) -> float:
        return total / length**self._length_penalty

    def add(self, ids: tuple[int, ...], total: float) -> None:
        candidate = _Hypothesis(self.score(total, len(ids)), ids)
        if len(self._kept) < self._size:
            self._kept.append(candidate)
        elif candidate.score > self._worst().score:
            self._kept.remove(self._worst())
            self._kept.append(candidate)

    def can_stop(self, best_total: float, length: int) -> bool:
        """Whether nothing still running, its best sum being `best_total`, is expected to beat what is kept."""
        return len(self._kept) == self._size and self._worst().score >= self.score(best_total, length)

    def best(self) -> _Hypothesis:
        return max(reversed(self._kept), key=lambda hypothesis: hypothesis.score)  # of equals, the latest

    def _worst(self) -> _Hypothesis:
        return min(self._kept, key=lambda hypothesis: hypothesis.score)


class _Beams:
    """The running continuations, and who among the remembered tokens each of them descends from.

    All beams live in one DenseAttend: every step appends one row per beam, and `visible` (num_beams, rows) says which
    rows are a beam's own past. Choosing beams anew reorders this small mask only.
    """

    def __init__(self, model: LanguageModel, embeds: Tensor, num_beams: int) -> None:
        self._model, self._num_prompt = model, len(embeds)
        self._attend = DenseAttend(model.config.num_layers)
        hidden = model(embeds, torch.arange(len(embeds), device=embeds.device), self._attend)
        self.logprobs = self._score(hidden[-1:]).expand(num_beams, -1)  # (num_beams, vocab_size)
        self.totals = torch.full((num_beams,), _NEVER, device=embeds.device)
        self.totals[0] = 0.0
        self.ids: list[tuple[int, ...]] = [()] * num_beams
        self._visible = torch.ones(num_beams, len(embeds), dtype=torch.bool, device=embeds.device)

    def extend(self, chosen: list[_Continuation]) -> None:
        """Make chosen[i] the new beam i, and score what may follow it."""
        device = self.totals.device
        parents, tokens = [each.parent for each in chosen], [each.token for each in chosen]
        self.ids = [(*self.ids[parent], token) for parent, token, _ in chosen]
        self.totals = torch.tensor([each.total for each in chosen], device=device)
        itself = torch.eye(len(tokens), dtype=torch.bool, device=device)
        self._visible = torch.cat((self._visible[parents], itself), dim=1)  # (num_beams, rows)
        self._attend.visible = self._visible
        position = self._num_prompt + len(self.ids[0]) - 1
        positions = torch.full((len(tokens),), position, device=device)
        embeds = self._model.embed(torch.tensor(tokens, device=device))
        self.logprobs = self._score(self._model(embeds, positions, self._attend))

    def _score(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden).log_softmax(dim=-1)


def beam_search(
    model: LanguageModel,
    embeds: Tensor,
    *,
    num_beams: int,
    max_tokens: int,
    eos_ids: tuple[int, ...],
    repetition_penalty: float,
    length_penalty: float = 1.0,
    bos_id: int,
) -> tuple[tuple[int, ...], float]:
    """The best continuation of a prompt and its score (mean log-probability for length_penalty 1).

    Args:
        embeds: (T, hidden), the prompt's vectors with pictures in place.
        max_tokens: at most so many new tokens, end token included.
        bos_id: counts as already seen for the penalty, as the prompt does not: the originals generate from vectors,
            behind a lone BOS.

    Returns:
        The new ids, the end token last if one was drawn; and the score.

    Raises:
        InvalidRequest: num_beams or max_tokens is below 1, or repetition_penalty is not above 0.
        ContextLengthExceeded: prompt and max_tokens do not fit the model.
    """
    _check(model, len(embeds), num_beams, max_tokens, repetition_penalty)
    finished = _Finished(num_beams, length_penalty)
    beams = _Beams(model, embeds, num_beams)
    for length in range(1, max_tokens + 1):
        scores = _penalise(beams.logprobs, beams.ids, bos_id, repetition_penalty) + beams.totals[:, None]
        ended, running = _choose(scores, num_beams, eos_ids)
        for parent, token, total in ended:
            finished.add((*beams.ids[parent], token), total)
        if finished.can_stop(scores.max().item(), length):
            break
        if length == max_tokens:
            for parent, token, total in running:
                finished.add((*beams.ids[parent], token), total)
            break
        beams.extend(running)
    best = finished.best()
    return best.ids, best.score


def _choose(
    scores: Tensor, num_beams: int, eos_ids: tuple[int, ...]
) -> tuple[list[_Continuation], list[_Continuation]]:
    """Rank all continuations (num_beams, vocab_size): those that end here and count, and the next beams, best first."""
    num_ranked = min(max(2, 1 + len(eos_ids)) * num_beams, scores.numel())
    ranked = scores.flatten().topk(num_ranked)
    ended: list[_Continuation] = []
    running: list[_Continuation] = []
    for rank, (index, total) in enumerate(zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True)):
        parent, token = divmod(index, scores.shape[1])
        if token not in eos_ids:
            running.append(_Continuation(parent, token, total))
        elif rank < num_beams:
            ended.append(_Continuation(parent, token, total))
        if len(running) == num_beams:
            break
    return ended, running


def _check(model: LanguageModel, num_prompt: int, num_beams: int, max_tokens: int, repetition_penalty: float) -> None:
    for name, value in (("num_beams", num_beams), ("max_tokens", max_tokens)):
        if value < 1:
            raise InvalidRequest(f"{name} must be at least 1.", param=name)
    if not repetition_penalty > 0:
        raise InvalidRequest("repetition_penalty must be above 0.", param="repetition_penalty")
    if num_prompt + max_tokens > model.config.max_context:
        raise ContextLengthExceeded(
            f"The prompt has {num_prompt} tokens and max_tokens is {max_tokens}; "
            f"the model takes {model.config.max_context} in all."
        )


def _penalise(logprobs: Tensor, ids: list[tuple[int, ...]], bos_id: int, penalty: float) -> Tensor:
    """Repetition penalty (Keskar et al. 2019) on log-probabilities: what a beam has used, and BOS, sinks."""
    used = torch.tensor([(bos_id, *beam) for beam in ids], device=logprobs.device)  # (num_beams, 1 + length)
    picked = logprobs.gather(1, used)
    return logprobs.scatter(1, used, torch.where(picked < 0, picked * penalty, picked / penalty))
