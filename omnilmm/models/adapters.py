"""Low-rank adapters at work: several side by side in one step, over a model that stays as it is.

Our projections are fused (q, k, v in one matrix), the ones an adapter is made of are not. So for every official
projection the pool keeps the pairs of all loaded adapters as rank rows of one matrix, and adds what they make of a
step's tokens to that projection's columns of what the fused layer gives. How, is
in `adapter_products`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from omnilmm.models.adapter_files import AdapterWeights, projection_slots
from omnilmm.models.adapter_products import (
    BITS,
    FEW,
    GAP,
    PackedRows,
    Pairs,
    Product,
    Rows,
    TokenRun,
    products_of,
)
from omnilmm.models.config import ModelConfig
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.native import NativeLinear
from omnilmm.models.packed import PackedLinear

__all__ = ["FEW", "GAP", "AdapterPool", "TokenRun"]

MAX_STRETCHES = 16
"""Stretches of rank rows whose views are kept. A view costs little, but there are hundreds of them in a step."""

PACKED_RANKS = 128
"""The widest stretch of rank rows that is copied into oneDNN's order. There is one such copy at a time."""

PACK_AFTER = 8
"""Different steps in a row that could have used another copy than there is, before it is made: it takes about two."""


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
        self._products: tuple[Product, ...] = ()
        self._last: tuple[tuple[TokenRun, ...], int, tuple[Product, ...]] = ((), 0, ())
        self._stretches: dict[tuple[int, int], tuple[Rows, ...]] = {}
        self._packed: tuple[slice, int, tuple[PackedRows, ...]] | None = None
        self._num_unpacked = 0  # products since one that used the packed copy, or could not have
        self._num_writes = 0  # begun and ended: odd while one is under way. A copy is good while this stands still.
        self._layers: list[Pairs] = []
        self._hooks: list[RemovableHandle] = []
        fused: dict[str, list[str]] = defaultdict(list)
        slots = projection_slots(config)
        for name, slot in slots.items():
            fused[slot.parameter.removesuffix(".weight")].append(name)
        for layer, names in fused.items():
            hook = partial(self._add, len(self._layers))
            self._layers.append(Pairs.zero(example, names, [slots[name] for name in names], num_ranks))
            self._hooks.append(model.get_submodule(layer).register_forward_hook(hook))
        self._names = {layer: index for index, layer in enumerate(fused)}
        self._packs = all(isinstance(model.get_submodule(layer), PackedLinear | NativeLinear) for layer in fused)

    @property
    def num_bytes(self) -> int:
        """What the pool takes, used or not; a packed copy of some of it may come on top."""
        return sum(pairs.down.nbytes + sum(up.nbytes for up in pairs.ups) for pairs in self._layers)

    @torch.inference_mode()
    def write(self, ranks: range, weights: AdapterWeights) -> None:
        """Put an adapter into these rows, as many as its rank. No step may use them meanwhile."""
        assert len(ranks) == weights.rank, "an adapter takes as many rows as its rank"
        assert ranks.stop <= self.num_ranks, "rows outside the pool"
        rows = slice(ranks.start, ranks.stop)
        self._num_writes += 1
        try:
            for pairs in self._layers:
                for index, (name, up) in enumerate(zip(pairs.names, pairs.ups, strict=True)):
                    if name in weights.pairs:
                        stored_down, stored_up = weights.pairs[name]
                        pairs.down[rows, index].copy_(stored_down)
                        up[rows].copy_(stored_up)
                    else:
                        pairs.down[rows, index].zero_()
                        up[rows].zero_()
        finally:
            self._num_writes += 1

    def pairs_of(self, layer: str) -> Pairs:
        """The rank rows of a fused layer ("layers.0.attention.qkv"), for a code that makes the products itself."""
        return self._layers[self._names[layer]]

    @contextmanager
    def acting(self, runs: Sequence[TokenRun]) -> Iterator[None]:
        """Within, the model's next call has these runs of tokens, which cover it in their order."""
        self._products = self._products_of(tuple(runs))
        try:
            yield
        finally:
            self._products = ()

    def close(self) -> None:
        """Let the model be."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _products_of(self, runs: tuple[TokenRun, ...]) -> tuple[Product, ...]:
        """Those of the step before, where its runs were the same: as long as the same sequences decode, they are."""
        num_writes = self._num_writes
        if (runs, num_writes) != self._last[:2]:
            self._last = (runs, num_writes, tuple(self._make_product(*wanted) for wanted in products_of(runs)))
        return self._last[2]

    def _make_product(self, tokens: slice, ranks: slice, own: Tensor | None) -> Product:
        if own is None:
            return Product(tokens, self._rows(ranks), None)
        layers: tuple[Rows | PackedRows, ...]
        packed = self._packed_over(ranks)
        if packed is not None:
            whole, layers = packed
            own = functional.pad(own, (ranks.start - whole.start, whole.stop - ranks.stop))
        else:
            layers = self._rows(ranks)
        bits = own.to(self._layers[0].down.device, BITS[self.dtype.itemsize]).neg_()
        return Product(tokens, layers, bits)

    def _rows(self, ranks: slice) -> tuple[Rows, ...]:
        key = (ranks.start, ranks.stop)
        rows = self._stretches.get(key)
        if rows is None:
            if len(self._stretches) >= MAX_STRETCHES:
                self._stretches.clear()
            rows = self._stretches[key] = tuple(pairs.rows(ranks) for pairs in self._layers)
        return rows

    def _packed_over(self, ranks: slice) -> tuple[slice, tuple[PackedRows, ...]] | None:
        """A copy in oneDNN's order that holds these rows and not twice as many, if there is one, or it is time."""
        num_ranks, num_writes = ranks.stop - ranks.start, self._num_writes
        if not self._packs or num_ranks > PACKED_RANKS:
            return None
        if self._packed is not None:
            whole, made_at, layers = self._packed
            is_near = whole.start <= ranks.start and ranks.stop <= whole.stop <= whole.start + 2 * num_ranks
            if is_near and made_at == num_writes:
                self._num_unpacked = 0
                return whole, layers
        self._num_unpacked += 1
        if self._num_unpacked < PACK_AFTER or num_writes % 2:
            return None
        self._packed = None  # before the next takes as much
        layers = tuple(pairs.packed_rows(ranks) for pairs in self._layers)
        if num_writes != self._num_writes:
            return None
        self._packed, self._num_unpacked = (ranks, num_writes, layers), 0
        return ranks, layers

    def _add(self, index: int, layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        """Add to `out` (T, columns) in place what the adapters make of the layer's input (T, in)."""
        for product in self._products:
            product.add(index, inputs[0], out)
