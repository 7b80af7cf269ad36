"""The pool of keys and values: one block of memory, made once, addressed by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from omnilmm.config import EngineConfig
from omnilmm.models.config import LanguageConfig


class PagedKV:
    """Keys and values of `num_blocks * block_size` token positions per layer.

    Slot `block_id * block_size + offset` is a position's address in every layer. What a slot holds that nobody has
    written since it changed hands is unspecified, and not even finite: read only slots that were written.
    """

    def __init__(
        self, config: EngineConfig, model: LanguageConfig, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        num_slots = config.num_blocks * config.block_size
        shape = (model.num_layers, num_slots, model.num_kv_heads, model.head_dim)
        self.block_size = config.block_size
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    def blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of a layer, each (num_blocks, block_size, kv_heads, head_dim): for kernels that read block tables."""
        size = (-1, self.block_size)
        return self._keys[layer].unflatten(0, size), self._values[layer].unflatten(0, size)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v (T, kv_heads, head_dim) at `slots` (T,) int64, all different."""
        self._keys[layer].index_copy_(0, slots, k)
        self._values[layer].index_copy_(0, slots, v)

    def new_scratch(self, num_slots: int) -> tuple[Tensor, Tensor]:
        """Memory for `read`, each (num_slots, kv_heads, head_dim); one pair serves all layers of a step."""
        shape = (num_slots, *self._keys.shape[2:])
        return self._keys.new_empty(shape), self._values.new_empty(shape)

    def read(self, layer: int, slots: Tensor, scratch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Gather `slots` (N,) int64, repeats allowed, into the beginning of `scratch`.

        Returns k and v, each (N, kv_heads, head_dim); they are views of the scratch, good until its next use.
        """
        k, v = scratch[0][: len(slots)], scratch[1][: len(slots)]
        torch.index_select(self._keys[layer], 0, slots, out=k)
        torch.index_select(self._values[layer], 0, slots, out=v)
        return k, v
