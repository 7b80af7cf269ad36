"""A plan as tensors, and attention over it.

All tokens of a step stand in one flat run. Rows of one token (decodes) come first, longest context first, so that
those of similar length lie side by side and are attended to in one padded call; longer rows (chunks of prompts)
follow, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omnilmm.engine.held import HeldDecodes, HeldGroup, Layers, block_table, rounded
from omnilmm.engine.kv import PagedKV, Window
from omnilmm.engine.plan import Row
from omnilmm.models.attention import Attend, attention_products, attention_sdpa

MAX_PADDING = 1024
"""Padded positions a group of decodes may hold: about as many as one more attention call costs."""

SMALL = 1280
"""Keys, over all heads, up to which a group of decodes is faster in torch's fused kernel than as matrix products."""

QUERY_TILE = 128
"""Queries of a chunk that are attended to at a time. Each piece reads the keys up to its own end only."""

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a step in the order of their tokens."""

    rows: tuple[Row, ...]
    firsts: tuple[int, ...]  # where each row's tokens begin
    ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, each in its own sequence
    slots: Tensor  # (T,) int64, where the keys and values of these tokens go
    begun: Tensor  # (num_begun,) int64, blocks whose first position is written in this step, and the last is not
    lasts: Tensor  # (num_rows,) int64, the last token of each row
    drawing: Tensor  # (num_drawing,) int64, the rows that end their sequence

    @property
    def device(self) -> torch.device:
        return self.ids.device


def build_batch(rows: Sequence[Row], *, block_size: int, device: torch.device) -> Batch:
    """Lay the rows of a plan out for the model."""
    ordered = tuple(sorted(rows, key=lambda row: (row.num_tokens > 1, -row.end)))
    ends = list(accumulate(row.num_tokens for row in ordered))
    return Batch(
        rows=ordered,
        firsts=tuple(end - row.num_tokens for end, row in zip(ends, ordered, strict=True)),
        ids=_tensor([token_id for row in ordered for token_id in row.ids], device),
        positions=_tensor([position for row in ordered for position in range(row.start, row.end)], device),
        slots=_tensor(np.concatenate([_slots(row, block_size) for row in ordered]), device),
        begun=_tensor([row.block_ids[-1] for row in ordered if _begins_a_block(row, block_size)], device),
        lasts=_tensor([end - 1 for end in ends], device),
        drawing=_tensor([index for index, row in enumerate(ordered) if row.draw is not None], device),
    )


def _slots(row: Row, block_size: int) -> Integers:
    """Slots of the row's own positions."""
    positions = np.arange(row.start, row.end)
    first_block = row.start // block_size
    table = np.array(row.block_ids[first_block:], dtype=np.int64)
    return table[positions // block_size - first_block] * block_size + positions % block_size


def _begins_a_block(row: Row, block_size: int) -> bool:
    """Whether the row leaves behind a block that it began and did not fill."""
    return row.end % block_size > 0 and row.start <= row.end // block_size * block_size


def _tensor(numbers: Sequence[int] | Integers, device: torch.device) -> Tensor:
    return torch.as_tensor(numbers, dtype=torch.int64).to(device)


AttendFactory = Callable[[Batch, PagedKV], Attend]
"""How a backend enters: once per step it gets the batch and the pool, and returns what the layers call."""


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Rows of one token that share attention calls, each with its blocks, padded with its first one."""

    first: int  # token
    num_rows: int
    past: HeldGroup | Window
    keys: Layers  # of the past, each (num_rows * kv_heads, num_keys, head_dim)
    values: Layers
    mask: Tensor | None  # (num_rows * kv_heads, 1, 1, width) for the last keys, in the pool's dtype, 0 or -inf
    is_small: bool  # for the fused kernel: the mask is as wide as the keys

    @property
    def goes_on(self) -> bool:
        """Whether what it reads is known but for this step's keys and values: it asks the pool for nothing."""
        return isinstance(self.past, HeldGroup) and self.past.newest is not None

    def attend(self, kv: PagedKV, layer: int, q: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
        """Of the step's q (T, heads, head_dim), what these rows read: (num_rows, heads, head_dim)."""
        if isinstance(self.past, Window):
            kv.read(layer, self.past)
        else:
            self.past.update(kv, layer, self._own(new_k), self._own(new_v))
        k, v = self.keys[layer], self.values[layer]
        rows = self._own(q)
        scale = q.shape[-1] ** -0.5
        if not self.is_small:
            queries = rows.reshape(len(k), -1, 1, q.shape[-1])
            return attention_products(queries, k, v, scale=scale, mask=self.mask).view(rows.shape)
        # The heads that share a key head take the place of queries, and the key heads of all rows that of heads.
        queries = rows.reshape(1, len(k), -1, q.shape[-1])
        mask = None if self.mask is None else self.mask.movedim(0, 1)
        return attention_sdpa(queries, k[None], v[None], scale=scale, mask=mask).view(rows.shape)

    def _own(self, x: Tensor) -> Tensor:
        return x if len(x) == self.num_rows else x[self.first : self.first + self.num_rows]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A row of several tokens, attended to in pieces."""

    first: int  # token
    start: int  # position of that token
    num_tokens: int
    window: Window
    mask: Tensor  # (QUERY_TILE, QUERY_TILE) in the pool's dtype, 0 or -inf

    def attend(self, kv: PagedKV, layer: int, q: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
        """Of the step's q (T, heads, head_dim), what this row reads: (num_tokens, heads, head_dim)."""
        kv.read(layer, self.window)
        k, v = self.window.keys, self.window.values  # each (kv_heads, num_keys, head_dim)
        queries = q[self.first : self.first + self.num_tokens].unflatten(1, (len(k), -1)).movedim(0, 2)
        pieces = []
        for begin in range(0, self.num_tokens, QUERY_TILE):
            tile = queries[:, :, begin : begin + QUERY_TILE]  # (kv_heads, groups, tile, head_dim)
            size = tile.shape[2]
            end = self.start + begin + size
            mask = self.mask[:size, :size]
            pieces.append(attention_products(tile, k[:, :end], v[:, :end], scale=q.shape[-1] ** -0.5, mask=mask))
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return out.movedim(2, 0).flatten(1, 2)


class GatheredAttention:
    """The backend for devices without paged kernels. Good for one pool: it remembers what its latest step gathered."""

    def __init__(self) -> None:
        self._held: HeldDecodes | None = None

    def __call__(self, batch: Batch, kv: PagedKV) -> GatheredAttend:
        if self._held is None:
            self._held = HeldDecodes(kv)
        assert self._held.kv is kv, "one backend, two pools"
        return GatheredAttend(batch, kv, self._held)


class GatheredAttend:
    """A step's attention: gathers the blocks of each group of rows, and attends to them densely.

    A position behind a row's last one is masked, and of somebody else's blocks none is read: a mask does not stop NaN.
    """

    def __init__(self, batch: Batch, kv: PagedKV, held: HeldDecodes | None = None) -> None:
        self._kv = kv
        self._places = kv.places(batch.slots)
        num_decodes = sum(row.num_tokens == 1 for row in batch.rows)
        self._parts: tuple[_Decodes | _Chunk, ...] = (
            *_decodes(batch, kv, held or HeldDecodes(kv), num_decodes),
            *_chunks(batch, kv, num_decodes),
        )
        # What nobody asks the pool for in this step goes there in one piece at its end.
        self._unwritten: list[tuple[Tensor, Tensor]] = []
        self._can_wait = all(isinstance(part, _Decodes) and part.goes_on for part in self._parts)
        if len(batch.begun):
            kv.begin(batch.begun)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._write(layer, k, v)
        pieces = [part.attend(self._kv, layer, q, k, v) for part in self._parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        if not self._can_wait:
            self._kv.write(layer, self._places, k, v)
            return
        self._unwritten.append((k, v))
        if len(self._unwritten) == self._kv.num_layers:  # they come in order
            self._kv.write_all(self._places, *zip(*self._unwritten, strict=True))


def _chunks(batch: Batch, kv: PagedKV, num_decodes: int) -> Iterator[_Chunk]:
    if num_decodes == len(batch.rows):
        return
    mask = torch.full((QUERY_TILE, QUERY_TILE), -torch.inf, dtype=kv.dtype, device=batch.device).triu(1)
    for row, first in zip(batch.rows[num_decodes:], batch.firsts[num_decodes:], strict=True):
        window = kv.window(_tensor(row.block_ids, batch.device)[None])
        yield _Chunk(first, row.start, row.num_tokens, window, mask)


def _decodes(batch: Batch, kv: PagedKV, held: HeldDecodes, num_decodes: int) -> Iterator[_Decodes]:
    ranges = list(_similar([row.end for row in batch.rows[:num_decodes]]))
    groups = [batch.rows[begin:end] for begin, end in ranges]
    for (begin, _), rows, group in zip(ranges, groups, held.hold(groups), strict=True):
        num_blocks = rounded(len(rows[0].block_ids))
        num_keys = num_blocks * kv.block_size
        is_small = len(rows) * kv.num_heads * num_keys <= SMALL
        if is_small and rows[0].end == rows[-1].end:
            num_keys = rows[0].end  # the fused kernel reads a slice where it lies, and nothing is to be masked
        elif not is_small and group is not None:
            num_keys = group.width  # products would copy a slice, which takes far longer than to read it all
        past = group or kv.window(block_table(rows, num_blocks, batch.device))
        if isinstance(past, HeldGroup):
            keys, values = (side[:, :, :num_keys].unbind() for side in (past.keys, past.values))
        else:
            keys, values = ((side[:, :num_keys],) * kv.num_layers for side in (past.keys, past.values))
        seen_by_all = 0 if is_small else rows[-1].end
        mask = _mask(rows, kv, range(seen_by_all, num_keys)).to(batch.device) if rows[-1].end < num_keys else None
        yield _Decodes(begin, len(rows), past, keys, values, mask, is_small)


def _mask(rows: Sequence[Row], kv: PagedKV, keys: range) -> Tensor:
    """Which of these keys each row sees: (num_rows * kv_heads, 1, 1, number of keys) in the pool's dtype, 0 or -inf."""
    ends = np.repeat([row.end for row in rows], kv.num_heads)
    hidden = torch.from_numpy(np.array(keys) >= ends[:, None])  # (rows * kv_heads, keys)
    return torch.zeros(hidden.shape, dtype=kv.dtype).masked_fill(hidden, -torch.inf)[:, None, None]


def _similar(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut falling lengths into ranges [begin, end) whose padding stays within MAX_PADDING."""
    begin = padding = 0
    for index, length in enumerate(lengths):
        padding += lengths[begin] - length
        if padding > MAX_PADDING:
            yield begin, index
            begin, padding = index, 0
    if lengths:
        yield begin, len(lengths)
