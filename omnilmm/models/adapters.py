"""Low-rank adapters at work: several side by side in one step, over a model that stays as it is.

Our projections are fused (q, k, v in one matrix), the ones an adapter is made of are not. So for every official
projection the pool keeps the pairs of all loaded adapters as rank rows of one matrix, and adds what they make of a
step's tokens to that projection's columns of what the fused layer gives.

Tokens of different adapters go through one product: over the rank rows of all of them, after which every token keeps
those of its own. At decoding the weights are what takes time to read, and this reads each once, in few large products.
A token without an adapter is in none of them or keeps nothing, and one adapter's rows are never read as another's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from omnilmm.models.adapter_files import AdapterWeights, projection_slots
from omnilmm.models.config import ModelConfig
from omnilmm.models.decoder import LanguageModel

FEW = 32
"""Tokens in a row of one adapter up to which they share a product with their neighbours."""

GAP = 64
"""Rank rows of nobody's that a product may read for nothing, before two are made of it."""


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Neighbouring tokens [first, end) of a step, and the rank rows of their adapter; None is the model itself."""

    first: int
    end: int
    ranks: range | None


@dataclass(frozen=True, slots=True)
class _Product:
    """Tokens and the rank rows they all go through. `others` (tokens, 1, rank rows) bool is True where a row is not of
    a token's own adapter; None where all are."""

    tokens: slice
    ranks: slice
    others: Tensor | None


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The official projections that one fused layer holds."""

    down: Tensor  # (rank rows, projections, in)
    ups: tuple[Tensor, ...]  # each (rank rows, out of that projection)
    columns: tuple[slice, ...]  # of the fused layer's output
    names: tuple[str, ...]  # the projections' official ones


class AdapterPool:
    """Memory for the pairs of several adapters, `num_ranks` rank rows in all, taken once.

    Which rows are whose is decided elsewhere (`engine.shelf`). Rows that no step uses may be written by another thread
    while steps run.

    Args:
        model: from now on it adds what `acting` says. Its weights may be in any layout.
        config: names its projections.
    """

    def __init__(self, model: LanguageModel, config: ModelConfig, *, num_ranks: int) -> None:
        example = model.embedding.weight
        self.num_ranks = num_ranks
        self.dtype = example.dtype
        self._products: tuple[_Product, ...] = ()
        self._layers: list[_Pairs] = []
        self._hooks: list[RemovableHandle] = []
        fused: dict[str, list[str]] = defaultdict(list)
        slots = projection_slots(config)
        for name, slot in slots.items():
            fused[slot.parameter.removesuffix(".weight")].append(name)
        for layer, names in fused.items():
            owned = [slots[name] for name in names]
            pairs = _Pairs(
                down=example.new_zeros(num_ranks, len(owned), owned[0].shape[1]),
                ups=tuple(example.new_zeros(num_ranks, slot.shape[0]) for slot in owned),
                columns=tuple(slot.rows for slot in owned),
                names=tuple(names),
            )
            self._layers.append(pairs)
            self._hooks.append(model.get_submodule(layer).register_forward_hook(partial(self._add, pairs)))

    @property
    def num_bytes(self) -> int:
        """What the pool takes, used or not."""
        return sum(pairs.down.nbytes + sum(up.nbytes for up in pairs.ups) for pairs in self._layers)

    @torch.inference_mode()
    def write(self, ranks: range, weights: AdapterWeights) -> None:
        """Put an adapter into these rows, as many as its rank. No step may use them meanwhile."""
        assert len(ranks) == weights.rank, "an adapter takes as many rows as its rank"
        assert ranks.stop <= self.num_ranks, "rows outside the pool"
        rows = slice(ranks.start, ranks.stop)
        for pairs in self._layers:
            for index, (name, up) in enumerate(zip(pairs.names, pairs.ups, strict=True)):
                if name in weights.pairs:
                    stored_down, stored_up = weights.pairs[name]
                    pairs.down[rows, index].copy_(stored_down)
                    up[rows].copy_(stored_up)
                else:
                    pairs.down[rows, index].zero_()
                    up[rows].zero_()

    @contextmanager
    def acting(self, runs: Sequence[TokenRun]) -> Iterator[None]:
        """Within, the model's next call has these runs of tokens, which cover it in their order."""
        self._products = tuple(_products(runs, self._layers[0].down.device))
        try:
            yield
        finally:
            self._products = ()

    def close(self) -> None:
        """Let the model be."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _add(self, pairs: _Pairs, layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        """Add to `out` (T, columns) in place what the adapters make of the layer's input (T, in)."""
        for product in self._products:
            x, rows = inputs[0][product.tokens], out[product.tokens]  # (t, in), (t, columns)
            down = pairs.down[product.ranks].flatten(0, 1)  # (rows * projections, in)
            low = (x @ down.t()).view(len(x), -1, len(pairs.ups))  # (t, rows, projections)
            if product.others is not None:
                low.masked_fill_(product.others, 0.0)
            if len(pairs.ups) == 1:
                rows.addmm_(low.squeeze(2), pairs.ups[0][product.ranks])
                continue
            for up, columns, part in zip(pairs.ups, pairs.columns, low.unbind(2), strict=True):
                rows[:, columns].add_(part @ up[product.ranks])


def _products(runs: Sequence[TokenRun], device: torch.device) -> Iterator[_Product]:
    """Few products for many short runs, and one for each long run."""
    short: list[TokenRun] = []
    for run in runs:
        if run.end - run.first <= FEW:
            short.append(run)
            continue
        yield from _shared_products(short, device)
        short = []
        if run.ranks is not None:
            yield _Product(slice(run.first, run.end), slice(run.ranks.start, run.ranks.stop), None)
    yield from _shared_products(short, device)


def _shared_products(runs: Sequence[TokenRun], device: torch.device) -> Iterator[_Product]:
    """Products over neighbouring runs together: one for each stretch of rank rows that they use."""
    used = sorted({(run.ranks.start, run.ranks.stop) for run in runs if run.ranks is not None})
    if not used:
        return
    cuts = [index for index, (a, b) in enumerate(pairwise(used), 1) if b[0] - a[1] > GAP]
    for begin, end in pairwise([0, *cuts, len(used)]):
        stretch = slice(used[begin][0], used[end - 1][1])
        others = _others(runs, stretch)
        yield _Product(slice(runs[0].first, runs[-1].end), stretch, others.to(device) if others.any() else None)


def _others(runs: Sequence[TokenRun], stretch: slice) -> Tensor:
    """(tokens, rank rows of the stretch, 1) bool: True where a row is not of the token's adapter."""
    first = runs[0].first
    others = torch.ones(runs[-1].end - first, stretch.stop - stretch.start, 1, dtype=torch.bool)
    for run in runs:
        if run.ranks is not None:
            low, high = run.ranks.start - stretch.start, run.ranks.stop - stretch.start
            others[run.first - first : run.end - first, max(low, 0) : max(high, 0)] = False
    return others
