"""A plan as tensors, and attention over it.

All tokens of a step stand in one flat run. Rows of one token (decodes) come first, longest context first, so that
those of similar length lie side by side and are attended to in one padded call; longer rows (chunks of prompts)
follow, one call each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omnilmm.engine.kv import PagedKV
from omnilmm.engine.plan import Row
from omnilmm.models.attention import Attend, Attention, attention_sdpa, causal_mask

MAX_PADDING = 1024
"""Padded positions a group of decodes may hold: about as many as one more attention call costs."""

Slots = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a step in the order of their tokens."""

    rows: tuple[Row, ...]
    firsts: tuple[int, ...]  # where each row's tokens begin
    ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, each in its own sequence
    slots: Tensor  # (T,) int64, where the keys and values of these tokens go
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
        slots=_tensor(np.concatenate([_slots(row, row.start, block_size) for row in ordered]), device),
        lasts=_tensor([end - 1 for end in ends], device),
        drawing=_tensor([index for index, row in enumerate(ordered) if row.draw is not None], device),
    )


def _slots(row: Row, start: int, block_size: int) -> Slots:
    """Slots of the positions [start, row.end)."""
    first_block = start // block_size
    table = np.array(row.block_ids[first_block:], dtype=np.int64)
    slots = (table[:, None] * block_size + np.arange(block_size)).reshape(-1)
    return slots[start - first_block * block_size : row.end - first_block * block_size]


def _tensor(numbers: Sequence[int] | Slots, device: torch.device) -> Tensor:
    return torch.as_tensor(numbers, dtype=torch.int64).to(device)


AttendFactory = Callable[[Batch, PagedKV], Attend]
"""How a backend enters: once per step it gets the batch and the pool, and returns what the layers call."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that share one attention call: several decodes, or one chunk."""

    first: int  # token
    num_rows: int
    num_queries: int  # tokens per row
    slots: Tensor | None  # (num_rows * num_keys,) int64; None where a chunk's keys are all its own
    mask: Tensor | None  # bool, broadcast to (num_rows, heads, num_queries, num_keys)

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.first + self.num_rows * self.num_queries)


class GatheredAttend:
    """Attention for backends without paged kernels: gathers each group's context and attends to it densely.

    A padded position reads the first slot of its own row and is masked. It never reads a slot of somebody else:
    what is there need not be finite, and a mask does not stop NaN.
    """

    def __init__(self, batch: Batch, kv: PagedKV, *, attention: Attention = attention_sdpa) -> None:
        self._kv = kv
        self._slots = batch.slots
        self._attention = attention
        self._groups = tuple(_groups(batch, kv.block_size))
        self._scratch = kv.new_scratch(max(0 if g.slots is None else len(g.slots) for g in self._groups))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._kv.write(layer, self._slots, k, v)
        pieces = []
        for group in self._groups:
            if group.slots is None:
                keys, values = k[group.tokens], v[group.tokens]
            else:
                keys, values = self._kv.read(layer, group.slots, self._scratch)
            pieces.append(self._attend(group, q[group.tokens], keys, values))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _attend(self, group: _Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (rows * queries, heads, head_dim), k and v (rows * keys, kv_heads, head_dim) -> as q."""
        size = (group.num_rows, -1)
        k = k.unflatten(0, size).transpose(1, 2)  # (rows, kv_heads, keys, head_dim)
        v = v.unflatten(0, size).transpose(1, 2)
        scale = q.shape[-1] ** -0.5
        if group.num_queries == 1:
            # The query heads that share a key head take the place of queries: each key is then read once, which on
            # CPU is several times faster than a grouped call with one query.
            grouped = q.unflatten(1, (k.shape[1], -1))  # (rows, kv_heads, heads / kv_heads, head_dim)
            return self._attention(grouped, k, v, scale=scale, mask=group.mask).flatten(1, 2)
        out = self._attention(q.transpose(0, 1).unsqueeze(0), k, v, scale=scale, mask=group.mask)
        return out.squeeze(0).transpose(0, 1)  # (queries, heads, head_dim)


def _groups(batch: Batch, block_size: int) -> Iterator[_Group]:
    num_decodes = sum(row.num_tokens == 1 for row in batch.rows)
    for begin, end in _similar([row.end for row in batch.rows[:num_decodes]]):
        yield _decode_group(batch, begin, end, block_size)
    for row, first in zip(batch.rows[num_decodes:], batch.firsts[num_decodes:], strict=True):
        slots = None if row.start == 0 else _tensor(_slots(row, 0, block_size), batch.device)
        yield _Group(first, 1, row.num_tokens, slots, causal_mask(row.num_tokens, row.end, batch.device))


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


def _decode_group(batch: Batch, begin: int, end: int, block_size: int) -> _Group:
    rows = batch.rows[begin:end]
    lengths = np.array([row.end for row in rows])
    slots = np.empty((len(rows), lengths[0]), dtype=np.int64)
    for line, row in zip(slots, rows, strict=True):
        own = _slots(row, 0, block_size)
        line[: row.end], line[row.end :] = own, own[0]
    mask = None
    if lengths[-1] < lengths[0]:
        visible = torch.from_numpy(np.arange(lengths[0]) < lengths[:, None])  # (rows, keys)
        mask = visible[:, None, None].to(batch.device)
    return _Group(begin, len(rows), 1, _tensor(slots.reshape(-1), batch.device), mask)
