"""The products of a decode step's adapters: which tokens go through which rank rows, and what that adds to a layer.

Tokens of different adapters go through one product: over the rank rows of all of them, after which every token keeps
those of its own. At decoding the weights are what takes time to read, and this reads each once, in few large products.
A token without an adapter is in none of them or keeps nothing, and one adapter's rows are never read as another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from omnilmm.models.layout import TensorSlot
from omnilmm.models.packed import PackedLinear

FEW = 32
"""Tokens in a row of one adapter up to which they share a product with their neighbours."""

GAP = 64
"""Rank rows of nobody's that a product may read for nothing, before two are made of it."""

BITS: Final[Mapping[int, torch.dtype]] = {2: torch.int16, 4: torch.int32}  # by bytes a number


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Neighbouring tokens [first, end) of a step, and the rank rows of their adapter; None is the model itself."""

    first: int
    end: int
    ranks: range | None


@dataclass(frozen=True, slots=True)
class Pairs:
    """The official projections that one fused layer holds, for all rank rows."""

    down: Tensor  # (rank rows, projections, in)
    ups: tuple[Tensor, ...]  # each (rank rows, out of that projection)
    stacked: Tensor | None  # the same as (projections, rank rows, out), where all are of one width
    columns: tuple[slice, ...]  # of the fused layer's output
    names: tuple[str, ...]  # the projections' official ones

    @staticmethod
    def zero(example: Tensor, names: Sequence[str], slots: Sequence[TensorSlot], num_ranks: int) -> Pairs:
        """Memory for them, in the dtype and on the device of `example`."""
        down = example.new_zeros(num_ranks, len(names), slots[0].shape[1])
        widths = [slot.shape[0] for slot in slots]
        stacked = None
        if len({*widths}) == 1 < len(widths):
            stacked = example.new_zeros(len(widths), num_ranks, widths[0])
            ups = tuple(stacked.unbind())
        else:
            ups = tuple(example.new_zeros(num_ranks, width) for width in widths)
        return Pairs(down, ups, stacked, tuple(slot.rows for slot in slots), tuple(names))

    def rows(self, ranks: slice) -> Rows:
        """Some rank rows: views."""
        ups = tuple(up[ranks] for up in self.ups)
        stacked = None if self.stacked is None else self.stacked[:, ranks]
        return Rows(self.down[ranks].flatten(0, 1), ups, stacked, self.columns)

    def packed_rows(self, ranks: slice) -> PackedRows:
        """Some rank rows: copies."""
        down = PackedLinear(self.down[ranks].flatten(0, 1)).forward
        return PackedRows(down, tuple(PackedLinear(up[ranks].t()).forward for up in self.ups), self.columns)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rank rows of one fused layer's pairs."""

    down: Tensor  # (rank rows * projections, in)
    ups: tuple[Tensor, ...]  # each (rank rows, out)
    stacked: Tensor | None  # (projections, rank rows, out)
    columns: tuple[slice, ...]

    def lower(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.down)

    def raise_into(self, out: Tensor, parts: Tensor) -> None:
        """Add to `out` (t, columns) what `parts` (projections, t, rank rows) become."""
        if self.stacked is not None:
            out.unflatten(1, (len(parts), -1)).add_(torch.bmm(parts, self.stacked).transpose(0, 1))
            return
        for up, columns, part in zip(self.ups, self.columns, parts, strict=True):
            out[:, columns].add_(part @ up)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The same, in the order that oneDNN likes best: it makes these products in about two thirds of the time."""

    down: Callable[[Tensor], Tensor]
    ups: tuple[Callable[[Tensor], Tensor], ...]
    columns: tuple[slice, ...]

    def lower(self, x: Tensor) -> Tensor:
        return self.down(x)

    def raise_into(self, out: Tensor, parts: Tensor) -> None:
        for up, columns, part in zip(self.ups, self.columns, parts, strict=True):
            out[:, columns].add_(up(part))


@dataclass(frozen=True, slots=True)
class Product:
    """Tokens, and the rank rows they all go through.

    `own` (tokens, rank rows) has all bits set where a row is of a token's own adapter and none elsewhere, in integers
    as wide as the model's numbers; None where all rows are everybody's own. With these bits the results of foreign rows
    are taken out: it is several times faster than other ways, and makes 0 of infinity and NaN too.
    """

    tokens: slice
    layers: tuple[Rows | PackedRows, ...]  # by fused layer
    own: Tensor | None

    def add(self, index: int, x: Tensor, out: Tensor) -> None:
        """Add to `out` (T, columns) what the rank rows of a fused layer make of `x` (T, in), its input."""
        rows = self.layers[index]
        x, out = x[self.tokens], out[self.tokens]
        num_projections = len(rows.ups)
        low = rows.lower(x).view(len(x), -1, num_projections).permute(2, 0, 1)  # (projections, t, rank rows)
        rows.raise_into(out, self._take_own(low))

    def _take_own(self, low: Tensor) -> Tensor:
        """What is of every token's own adapter, one projection behind the other in memory."""
        if self.own is None:
            return low.contiguous()
        kept = torch.empty(low.shape, dtype=self.own.dtype, device=low.device)
        return torch.bitwise_and(low.view(self.own.dtype), self.own, out=kept).view(low.dtype)


Wanted = tuple[slice, slice, Tensor | None]
"""Tokens, their rank rows, and (tokens, rank rows) bool, which of these are their own; None where all are."""


def products_of(runs: Sequence[TokenRun]) -> Iterator[Wanted]:
    """Few products for many short runs, and one for each long run."""
    short: list[TokenRun] = []
    for run in runs:
        if run.end - run.first <= FEW:
            short.append(run)
            continue
        yield from _shared_products(short)
        short = []
        if run.ranks is not None:
            yield slice(run.first, run.end), slice(run.ranks.start, run.ranks.stop), None
    yield from _shared_products(short)


def _shared_products(runs: Sequence[TokenRun]) -> Iterator[Wanted]:
    """Products over neighbouring runs together: one for each stretch of rank rows that they use."""
    used = sorted({(run.ranks.start, run.ranks.stop) for run in runs if run.ranks is not None})
    if not used:
        return
    cuts = [index for index, (a, b) in enumerate(pairwise(used), 1) if b[0] - a[1] > GAP]
    for begin, end in pairwise([0, *cuts, len(used)]):
        stretch = slice(used[begin][0], used[end - 1][1])
        own = _own(runs, stretch)
        yield slice(runs[0].first, runs[-1].end), stretch, None if own.all() else own


def _own(runs: Sequence[TokenRun], stretch: slice) -> Tensor:
    """(tokens, rank rows of the stretch) bool: True where a row is of the token's adapter."""
    first = runs[0].first
    own = torch.zeros(runs[-1].end - first, stretch.stop - stretch.start, dtype=torch.bool)
    for run in runs:
        if run.ranks is not None:
            low, high = run.ranks.start - stretch.start, run.ranks.stop - stretch.start
            own[run.first - first : run.end - first, max(low, 0) : max(high, 0)] = True
    return own
