"""Keys and values of sequences that decode side by side, kept in one piece from step to step.

To attend to many sequences in one product their pages have to be gathered, every page in every layer in every step.
While the same sequences go on, what was gathered last time is still right, and only the newest position is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omnilmm.engine.kv import PagedKV
from omnilmm.engine.plan import Row

HEADROOM = 1
"""Blocks of room beyond the longest row: products read it in every step, and without it all is soon gathered anew."""

Layers = tuple[Tensor, ...]
"""A view of something for each layer."""


@dataclass(slots=True)
class HeldGroup:
    """Rows of one token each that are attended to in one call, and what they read, in every layer.

    Between the end of a row and the group's width lie numbers of no meaning, but finite: to be masked.
    """

    sequence_ids: tuple[int, ...]
    ends: tuple[int, ...]  # positions of each row that are there, this step's included
    pages: Tensor  # (num_pages,) int64: what the first step gathers, in every layer
    gathered: Tensor  # (layers, num_pages, block_size * head_dim)
    keys: Tensor  # (layers, rows * kv_heads, width, head_dim), a view of `gathered` as `values` is
    values: Tensor
    newest: Newest | None = None  # where this step's keys and values go; None: all is to be gathered

    @property
    def width(self) -> int:
        return self.keys.shape[2]

    def can_go_on(self, rows: Sequence[Row]) -> bool:
        """Whether `rows` are the same sequences, each one position further, with room for it."""
        return (
            self.sequence_ids == tuple(row.sequence_id for row in rows)
            and self.ends == tuple(row.start for row in rows)
            and max(row.end for row in rows) <= self.width
        )

    def go_on(self, rows: Sequence[Row]) -> None:
        self.ends = tuple(row.end for row in rows)
        self.newest = Newest.of(self, [row.start for row in rows])

    def update(self, kv: PagedKV, layer: int, k: Tensor, v: Tensor) -> None:
        """Bring a layer up to date: k and v (rows, kv_heads, head_dim) are this step's. A group that does not go on
        reads them in the pool, where they must be already."""
        if self.newest is None:
            kv.gather(layer, self.pages, self.gathered[layer])
        else:
            self.newest.write(layer, k, v)


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest position of each row, where keys and values are held."""

    keys: Layers  # a single row: (1, kv_heads, head_dim), that position itself; several: (all positions, head_dim)
    values: Layers
    places: Tensor | None  # of several rows, (rows * kv_heads,) int64, which of all positions

    @staticmethod
    def of(held: HeldGroup, positions: Sequence[int]) -> Newest:
        if len(positions) == 1:  # a plain copy takes half as long as one by index
            (position,) = positions
            keys, values = (side[:, None, :, position].unbind() for side in (held.keys, held.values))
            return Newest(keys, values, None)
        num_heads = held.keys.shape[1] // len(positions)
        heads = np.arange(held.keys.shape[1]).reshape(len(positions), num_heads)
        places = heads * held.width + np.array(positions)[:, None]
        keys, values = (side.flatten(1, 2).unbind() for side in (held.keys, held.values))
        return Newest(keys, values, torch.from_numpy(places.reshape(-1)).to(held.keys.device))

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put k and v (rows, kv_heads, head_dim) there."""
        if self.places is None:
            self.keys[layer].copy_(k)
            self.values[layer].copy_(v)
        else:
            self.keys[layer].index_copy_(0, self.places, k.reshape(-1, k.shape[-1]))
            self.values[layer].index_copy_(0, self.places, v.reshape(-1, v.shape[-1]))


class HeldDecodes:
    """The groups of the latest step, in a piece of memory of bounded size.

    Args:
        kv: where the truth is. The memory is a quarter of its pool, and taken when first used.
    """

    def __init__(self, kv: PagedKV) -> None:
        self.kv = kv
        self._room = kv.num_pages // 4
        self._arena: Tensor | None = None
        self._groups: list[HeldGroup] = []

    def hold(self, groups: Sequence[Sequence[Row]]) -> list[HeldGroup | None]:
        """What the rows of each group read in this step; None for groups that are too large to be held."""
        if len(groups) == len(self._groups) and all(
            held.can_go_on(rows) for held, rows in zip(self._groups, groups, strict=True)
        ):
            for held, rows in zip(self._groups, groups, strict=True):
                held.go_on(rows)
            return [*self._groups]
        held_now: list[HeldGroup | None] = []
        used = 0
        for rows in groups:
            group = self._try_make(rows, used)
            used += 0 if group is None else self.kv.num_layers * len(group.pages)
            held_now.append(group)
        # Unless every group is held, none can go on as a whole, and the next step begins anew.
        self._groups = [group for group in held_now if group is not None] if None not in held_now else []
        return held_now

    def _try_make(self, rows: Sequence[Row], used: int) -> HeldGroup | None:
        """A group in the memory behind the first `used` pages; None if there is not enough left."""
        kv = self.kv
        num_blocks = rounded(len(rows[0].block_ids) + HEADROOM)
        num_pages = 2 * kv.num_heads * len(rows) * num_blocks
        if used + kv.num_layers * num_pages > self._room:
            return None
        if self._arena is None:
            self._arena = kv.new_pages(self._room)
        gathered = self._arena[used : used + kv.num_layers * num_pages].unflatten(0, (kv.num_layers, num_pages))
        keys, values = gathered.view(kv.num_layers, 2, len(rows) * kv.num_heads, -1, kv.head_dim).unbind(1)
        return HeldGroup(
            sequence_ids=tuple(row.sequence_id for row in rows),
            ends=tuple(row.end for row in rows),
            pages=kv.pages(block_table(rows, num_blocks, keys.device)),
            gathered=gathered,
            keys=keys,
            values=values,
        )


def rounded(num_blocks: int) -> int:
    """Up to an eighth more blocks, but few different numbers: for every new width CPU kernels are made anew."""
    step = 1 << max(0, num_blocks.bit_length() - 4)
    return -(-num_blocks // step) * step


def block_table(rows: Sequence[Row], num_blocks: int, device: torch.device) -> Tensor:
    """(rows, num_blocks) int64: the blocks of each row, and behind them its first one again."""
    table = [row.block_ids + row.block_ids[:1] * (num_blocks - len(row.block_ids)) for row in rows]
    return torch.as_tensor(np.array(table), dtype=torch.int64).to(device)
