"""From logits to a token: penalties, filters, one draw. No loop over the vocabulary, and no work at all for what a
batch does not ask for: if every row is plainly greedy, one argmax is all there is.

The order is that of omnilmm.messages.Sampling, and each filter gives what transformers' processor of that name gives
(generation/logits_process.py). What a grammar does not allow is gone before the temperature, so that the filters
share the probability out among the rest. A random draw takes the number that belongs to (seed, position) and inverts
the cumulative distribution, the most probable token first and equals by id: it depends on its own logits and on
nothing else in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omnilmm.engine.philox import uniform
from omnilmm.engine.plan import Draw, Drawn
from omnilmm.messages import Sampling, TokenLogprob

WIDTHS = (64, 1024)
"""How many of the most probable tokens are looked at before the whole vocabulary is sorted, which takes
milliseconds a row. Most draws are settled by the first few."""


class Bounds:
    """For two bytes of a mask the bounds of their sixteen tokens, lowest bit first: inf if they are allowed, else -inf.

    4 MB, made at the first mask. Who draws again and again keeps one.
    """

    def __init__(self) -> None:
        self._table: Tensor | None = None  # (65536, 16) float32

    def look_up(self, packed: Tensor) -> Tensor:
        """(M,) uint16 -> (M, 16) float32."""
        if self._table is None or self._table.device != packed.device:
            bits = torch.arange(1 << 16)[:, None] >> torch.arange(16) & 1
            self._table = torch.where(bits.bool(), torch.inf, -torch.inf).to(packed.device)
        return torch.nn.functional.embedding(packed.int(), self._table)


def draw_tokens(logits: Tensor, draws: Sequence[Draw], bounds: Bounds | None = None) -> list[Drawn]:
    """Draw one token per row of logits (N, vocab) float32, all finite and left as they are."""
    scores = _adjust(logits, draws, bounds)
    ids = _best(scores)
    if random_rows := [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]:
        rows = torch.tensor(random_rows, device=logits.device)
        ids[rows] = _draw_random(scores[rows], _Filters.of([draws[row] for row in random_rows], logits.device))
    logprobs = _logprobs(logits, ids, draws)
    return [Drawn(token_id, logprobs.get(row)) for row, token_id in enumerate(ids.tolist())]


def _best(scores: Tensor) -> Tensor:
    """The id (N,) of each row's highest score; of equals, the lowest."""
    if scores.device.type == "cpu":  # numpy compares many numbers at a time, torch one: a tenth of the time
        return torch.from_numpy(scores.numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


def distribution(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """What draws with a temperature are taken from: probabilities (N, vocab) float64 after every filter."""
    filters = _Filters.of(draws, logits.device)
    scaled = filters.scale(_adjust(logits, draws))
    top = _Top.of(scaled, scaled.shape[-1], filters)
    return torch.zeros_like(scaled, dtype=torch.float64).scatter_(-1, top.ids, top.mass / top.total)


# -- penalties, bias, forbidden tokens ----------------------------------------------------------------


def _adjust(logits: Tensor, draws: Sequence[Draw], bounds: Bounds | None = None) -> Tensor:
    """Everything that changes single scores before the temperature, on a copy where there is anything to change."""
    scores = logits
    if any(_is_adjusted(draw) for draw in draws):
        scores = logits.clone()
        _penalise_repetition(scores, draws)
        _penalise_counts(scores, draws)
        _add_bias(scores, draws)
        _forbid_stopping(scores, draws)
    if some := next((draw.allowed for draw in draws if draw.allowed is not None), None):
        scores = _keep_allowed(scores, draws, bounds or Bounds(), everything=b"\xff" * len(some))
    return scores


def _is_adjusted(draw: Draw) -> bool:
    is_kept_going = draw.position < draw.sampling.min_tokens
    return bool(draw.seen or draw.generated or draw.sampling.logit_bias or is_kept_going)


def _penalise_repetition(scores: Tensor, draws: Sequence[Draw]) -> None:
    """Make every seen id less likely: positive scores are divided, negative ones multiplied (Keskar et al. 2019)."""
    if not any(draw.seen for draw in draws):
        return
    places, _ = _places(scores, [draw.seen for draw in draws])
    penalties = _per_place(places, scores, [draw.sampling.repetition_penalty for draw in draws])
    flat = scores.view(-1)
    seen = flat[places]
    flat[places] = torch.where(seen < 0, seen * penalties, seen / penalties)


def _penalise_counts(scores: Tensor, draws: Sequence[Draw]) -> None:
    """Subtract OpenAI's two penalties: one for having been generated at all, one for each time."""
    if not any(draw.generated for draw in draws):
        return
    places, counts = _places(scores, [draw.generated for draw in draws])
    presence = _per_place(places, scores, [draw.sampling.presence_penalty for draw in draws])
    frequency = _per_place(places, scores, [draw.sampling.frequency_penalty for draw in draws])
    scores.view(-1)[places] -= presence + frequency * counts


def _add_bias(scores: Tensor, draws: Sequence[Draw]) -> None:
    biases = [(row, *bias) for row, draw in enumerate(draws) for bias in draw.sampling.logit_bias]
    if biases:
        rows, ids, values = zip(*biases, strict=True)
        where = (torch.tensor(rows, device=scores.device), torch.tensor(ids, device=scores.device))
        scores.index_put_(where, torch.tensor(values, dtype=scores.dtype, device=scores.device), accumulate=True)


def _forbid_stopping(scores: Tensor, draws: Sequence[Draw]) -> None:
    """Rows with `allowed` are left out: there min_tokens has had its say, and may have to yield."""
    is_kept = [draw.allowed is None and draw.position < draw.sampling.min_tokens for draw in draws]
    if any(is_kept):
        stops = [draw.sampling.stop_ids if kept else () for draw, kept in zip(draws, is_kept, strict=True)]
        places, _ = _places(scores, stops)
        scores.view(-1)[places] = -torch.inf


def _keep_allowed(scores: Tensor, draws: Sequence[Draw], bounds: Bounds, *, everything: bytes) -> Tensor:
    """A copy of the scores without what the masks of some rows do not allow; `everything` is that of the others.

    Two bytes of a mask are looked up at a time: what that takes hardly depends on the masks.
    """
    packed = torch.frombuffer(bytearray().join(draw.allowed or everything for draw in draws), dtype=torch.uint16)
    kept = bounds.look_up(packed.to(scores.device)).view(len(draws), -1)[:, : scores.shape[-1]]  # (N, vocab)
    return torch.minimum(scores, kept, out=kept)


def _places(scores: Tensor, ids_by_row: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Flat indices into `scores` of each row's distinct ids, and how often each id occurs in its row."""
    width = scores.shape[-1]
    flat = [np.asarray(ids, dtype=np.int64) + row * width for row, ids in enumerate(ids_by_row)]
    places = torch.from_numpy(np.concatenate(flat)).to(scores.device)
    return torch.unique(places, return_counts=True)


def _per_place(places: Tensor, scores: Tensor, values: Sequence[float]) -> Tensor:
    """The value that belongs to the row of each place."""
    return torch.tensor(values, dtype=scores.dtype, device=scores.device)[places // scores.shape[-1]]


# -- temperature, top_k, top_p, min_p, draw -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Filters:
    """Settings of the rows that draw at random, each a column (R, 1)."""

    temperature: Tensor  # float32
    top_k: Tensor  # int64, 0 is off
    top_p: Tensor  # float64, 1 is off
    min_p: Tensor  # float64, 0 is off
    uniform: Tensor  # float64 in [0, 1)

    @classmethod
    def of(cls, draws: Sequence[Draw], device: torch.device) -> _Filters:
        def column(value: Callable[[Sampling], float], dtype: torch.dtype) -> Tensor:
            return torch.tensor([[value(draw.sampling)] for draw in draws], dtype=dtype, device=device)

        numbers = [[uniform(draw.sampling.seed, draw.position)] for draw in draws]
        return cls(
            temperature=column(lambda s: s.temperature, torch.float32),
            top_k=column(lambda s: s.top_k, torch.int64),
            top_p=column(lambda s: s.top_p, torch.float64),
            min_p=column(lambda s: s.min_p, torch.float64),
            uniform=torch.tensor(numbers, dtype=torch.float64, device=device),
        )

    def select(self, rows: Tensor) -> _Filters:
        return _Filters(
            self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.uniform[rows]
        )

    def scale(self, scores: Tensor) -> Tensor:
        """Scores (R, vocab) over temperature, shifted so that the best is 0 and nothing overflows."""
        tiny = torch.finfo(torch.float32).tiny
        return (scores - scores.amax(dim=-1, keepdim=True)) / self.temperature.clamp(min=tiny)


@dataclass(frozen=True, slots=True)
class _Top:
    """The most probable tokens of each row, best first and equals by id, and what the filters leave of them."""

    ids: Tensor  # (R, width) int64
    mass: Tensor  # (R, width) float64, unnormalised; 0 from the first token on that is filtered out
    total: Tensor  # (R, 1) float64, mass of all survivors
    is_sure: Tensor  # (R, width) bool: drawing the token of this rank would be right, whatever else there is

    @classmethod
    def of(cls, scaled: Tensor, width: int, filters: _Filters) -> _Top:
        """Look at `width` tokens of each row of scaled scores (R, vocab), whose maximum is 0."""
        values, ids = _most_probable(scaled, width)
        mass = values.double().exp()  # (R, width)
        everything = scaled.logsumexp(dim=-1, keepdim=True).double().exp()  # (R, 1)
        # topk picks any of the equals it cuts through: only what is above the last one is sure to belong here.
        # Of forbidden tokens, there may be any number outside: nothing depends on them.
        is_inside = (values > values[:, -1:]) | values.isneginf() | (width == scaled.shape[-1])

        has_top_k, has_top_p, has_min_p = filters.top_k > 0, filters.top_p < 1.0, filters.min_p > 0.0
        kth = filters.top_k.clamp(1, width) - 1
        survives = (values >= values.gather(-1, kth)) | ~has_top_k  # equals of the k-th survive with it
        after_top_k = torch.where(has_top_k, (mass * survives).sum(dim=-1, keepdim=True), everything)
        better = mass.cumsum(dim=-1) - mass  # mass of all better tokens
        survives &= (better < filters.top_p * after_top_k) | ~has_top_p
        survives &= mass >= filters.min_p * mass[:, :1]

        mass = mass * survives
        is_filtered = has_top_k | has_top_p | has_min_p
        total = torch.where(is_filtered, mass.sum(dim=-1, keepdim=True), everything)
        # Where filters work, totals are right only if every survivor, and the k-th token, is inside.
        is_complete = (is_inside | ~survives).all(dim=-1, keepdim=True) & (is_inside.gather(-1, kth) | ~has_top_k)
        return cls(ids, mass, total, is_sure=torch.where(is_filtered, is_complete, is_inside))

    def draw(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The ids (R,) that numbers (R, 1) in [0, 1) fall on, and whether that is settled, (R,) bool."""
        rank = (self.mass.cumsum(dim=-1) <= numbers * self.total).sum(dim=-1, keepdim=True)  # (R, 1)
        # A number beyond the last survivor belongs outside, which is never sure, or got there by rounding.
        rank = rank.minimum((self.mass > 0.0).sum(dim=-1, keepdim=True) - 1)
        return self.ids.gather(-1, rank).squeeze(-1), self.is_sure.gather(-1, rank).squeeze(-1)


def _draw_random(scores: Tensor, filters: _Filters) -> Tensor:
    """One id (R,) for each row of scores (R, vocab), looking at no more tokens than it takes."""
    scaled = filters.scale(scores)
    vocab_size = scaled.shape[-1]
    ids = torch.empty(len(scaled), dtype=torch.int64, device=scaled.device)
    pending = torch.arange(len(scaled), device=scaled.device)
    for width in (*(width for width in WIDTHS if width < vocab_size), vocab_size):
        drawn, is_settled = _Top.of(scaled, width, filters).draw(filters.uniform)
        ids[pending[is_settled]] = drawn[is_settled]
        if is_settled.all():
            break
        pending, scaled, filters = pending[~is_settled], scaled[~is_settled], filters.select(~is_settled)
    return ids


def _most_probable(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` highest of each row of scores (R, vocab) and their ids, falling, equals by id."""
    if width == scores.shape[-1]:
        found = scores.sort(dim=-1, descending=True, stable=True)
        return found.values, found.indices
    ids = scores.topk(width, dim=-1).indices.sort(dim=-1).values
    values, order = scores.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


# -- log-probabilities --------------------------------------------------------------------------------


def _logprobs(logits: Tensor, ids: Tensor, draws: Sequence[Draw]) -> dict[int, TokenLogprob]:
    """Of the rows that asked: the drawn token's log-probability under the model itself, and the best few, by row."""
    asked = {row: n for row, draw in enumerate(draws) if (n := draw.sampling.logprobs) is not None}
    if not asked:
        return {}
    rows = torch.tensor(list(asked), device=logits.device)
    logprobs = logits[rows].log_softmax(dim=-1)
    drawn = logprobs.gather(-1, ids[rows, None]).squeeze(-1)  # (A,)
    values, top_ids = _most_probable(logprobs, max(asked.values()))  # (A, n)
    lines = zip(asked.items(), drawn.tolist(), top_ids.tolist(), values.tolist(), strict=True)
    return {
        row: TokenLogprob(logprob, tuple(zip(best[:n], best_logprobs[:n], strict=True)))
        for (row, n), logprob, best, best_logprobs in lines
    }
