"""The pool of keys and values: one block of memory, made once, addressed by block and by slot.

A block of a layer is `2 * kv_heads` pages: per head the keys of its positions in one piece, then per head the values.
So a head's past is gathered page by page, and lies ready for one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnilmm.config import EngineConfig
from omnilmm.models.config import LanguageConfig


@dataclass(frozen=True, slots=True)
class Places:
    """Where the keys and the values of T positions go, in any layer: rows of the pool, each (T * kv_heads,) int64."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """Room for the keys and values that some sequences read, the same for every layer."""

    pages: Tensor  # (num_pages,) int64
    gathered: Tensor  # (num_pages, block_size * head_dim)
    keys: Tensor  # (sequences * kv_heads, num_keys, head_dim), a view of `gathered` as `values` is
    values: Tensor


class PagedKV:
    """Keys and values of `num_blocks * block_size` token positions per layer.

    Slot `block_id * block_size + offset` is a position's address in every layer. What a block holds that changed
    hands is unspecified, and not even finite, up to `begin`; from then on a position is zero until it is written. So
    whole blocks may be read, and what lies behind their last position be masked.
    """

    def __init__(
        self, config: EngineConfig, model: LanguageConfig, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = config.block_size
        self.num_layers, self.num_heads, self.head_dim = model.num_layers, model.num_kv_heads, model.head_dim
        shape = (model.num_layers, config.num_blocks, 2, model.num_kv_heads, config.block_size, model.head_dim)
        self._pool = torch.zeros(shape, dtype=dtype, device=device)
        self._pages = tuple(layer.view(-1, config.block_size * model.head_dim) for layer in self._pool)
        self._rows = tuple(layer.view(-1, model.head_dim) for layer in self._pool)
        self._scratch = self._pages[0].new_empty(0, config.block_size * model.head_dim)

    @property
    def dtype(self) -> torch.dtype:
        return self._pool.dtype

    @property
    def pool(self) -> Tensor:
        """All of it: (layers, num_blocks, 2, kv_heads, block_size, head_dim), keys before values."""
        return self._pool

    def blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of a layer, each (num_blocks, block_size, kv_heads, head_dim): for kernels that read block tables."""
        keys, values = self._pool[layer].unbind(1)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def begin(self, block_ids: Tensor) -> None:
        """Make these blocks (B,) int64 zero in all layers: what they held belonged to somebody else."""
        self._pool.index_fill_(1, block_ids, 0.0)

    def places(self, slots: Tensor) -> Places:
        """Where positions at `slots` (T,) int64 are kept."""
        block_ids, offsets = slots // self.block_size, slots % self.block_size
        heads = torch.arange(self.num_heads, device=slots.device)
        pages = block_ids[:, None] * (2 * self.num_heads) + heads  # (T, kv_heads)
        keys = (pages * self.block_size + offsets[:, None]).flatten()
        return Places(keys, keys + self.num_heads * self.block_size)

    def write(self, layer: int, places: Places, k: Tensor, v: Tensor) -> None:
        """Store k and v (T, kv_heads, head_dim) at `places`, all different."""
        rows = self._rows[layer]
        rows.index_copy_(0, places.keys, k.reshape(-1, self.head_dim))
        rows.index_copy_(0, places.values, v.reshape(-1, self.head_dim))

    def write_all(self, places: Places, ks: Sequence[Tensor], vs: Sequence[Tensor]) -> None:
        """`write` for every layer, in one piece: ks and vs have each layer's (T, kv_heads, head_dim)."""
        rows = self._pool.view(-1, self.head_dim)
        firsts = torch.arange(0, len(rows), len(self._rows[0]), device=rows.device)  # of each layer
        own = torch.stack((places.keys, places.values))  # (2, T * kv_heads)
        written = torch.cat((*ks, *vs)).view(-1, self.head_dim)  # by side and layer
        rows.index_copy_(0, (own[:, None] + firsts[:, None]).flatten(), written)

    @property
    def num_pages(self) -> int:
        """Pages of all layers."""
        return sum(map(len, self._pages))

    def new_pages(self, count: int) -> Tensor:
        """Memory for `count` pages, uninitialised: (count, block_size * head_dim)."""
        return self._scratch.new_empty(count, self._scratch.shape[1])

    def pages(self, block_ids: Tensor) -> Tensor:
        """The pages of R sequences of B blocks each, block_ids (R, B) int64: all keys, then all values, each by row,
        head and block, (2 * R * kv_heads * B,) int64."""
        heads = torch.arange(2 * self.num_heads, device=block_ids.device).view(2, 1, -1, 1)
        return (block_ids[:, None] * (2 * self.num_heads) + heads).flatten()

    def gather(self, layer: int, pages: Tensor, out: Tensor) -> None:
        """Copy a layer's `pages` (N,) into `out` (N, block_size * head_dim)."""
        torch.index_select(self._pages[layer], 0, pages, out=out)

    def window(self, block_ids: Tensor) -> Window:
        """What R sequences of as many blocks each read in a step: block_ids (R, B) int64, repeats allowed."""
        pages = self.pages(block_ids)
        if len(self._scratch) < len(pages):
            self._scratch = self.new_pages(2 * len(pages))
        gathered = self._scratch[: len(pages)]
        k, v = gathered.view(2, len(block_ids) * self.num_heads, -1, self.head_dim).unbind(0)
        return Window(pages, gathered, k, v)

    def read(self, layer: int, window: Window) -> None:
        """Gather a layer into `window.keys` and `window.values`. All windows share memory: one is good at a time."""
        self.gather(layer, window.pages, window.gathered)
