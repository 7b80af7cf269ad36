"""Attention behind one signature: the reference that can be read, the backend that is used, and `DenseAttend`,
which keeps the keys and values of one sequence in one piece.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Attention(Protocol):
    """Scaled dot-product attention with grouped keys and values."""

    def __call__(
        self,
        q: Tensor,  # (batch, heads, num_queries, head_dim)
        k: Tensor,  # (batch, kv_heads, num_keys, head_dim); kv_heads divides heads
        v: Tensor,  # (batch, kv_heads, num_keys, head_dim)
        *,
        scale: float,
        mask: Tensor | None = None,  # bool, broadcast to (batch, heads, num_queries, num_keys); True may be seen
    ) -> Tensor:
        """Returns (batch, heads, num_queries, head_dim) in q's dtype. Every query must see at least one key."""
        ...


def attention_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """The formula itself, softmax in float32: the oracle of every other backend."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * scale  # (batch, heads, num_queries, num_keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(q.dtype) @ v


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """torch's fused kernels; grouped keys are not repeated in memory."""
    grouped = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def attention_products(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention as two batched matrix products with a softmax between them, as the reference has it.

    On CPU one product over all heads is several times faster than torch's fused kernel, which multiplies head by head:
    for a few queries a head as well as for a hundred. The scores exist as a whole, so the caller cuts long runs of
    queries into pieces.

    Args:
        q: (kv_heads, groups, num_queries, head_dim): the heads that share keys and values side by side.
        k, v: (kv_heads, num_keys, head_dim).
        mask: of q's dtype, broadcast to (kv_heads, groups, num_queries, width), added to the scores of the last
            `width` keys: 0 or -inf.

    Returns:
        As q.
    """
    scores = torch.baddbmm(q.new_empty(1), q.flatten(1, 2), k.transpose(1, 2), beta=0, alpha=scale)
    if mask is not None:
        scores.view(*q.shape[:3], -1)[..., -mask.shape[-1] :].add_(mask)  # in place: += would write it twice
    return torch.bmm(scores.softmax(dim=-1), v).view(q.shape)  # scores: (kv_heads, groups * num_queries, num_keys)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(num_queries, num_keys) bool: the queries are the last of the keys, and each sees itself and all before it."""
    full = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return full.tril(num_keys - num_queries)


class Attend(Protocol):
    """How a decoder layer reaches the past. The model hands over this step's queries, keys and values with rotary
    already applied; where keys live and who may see what is known behind this line only.
    """

    def __call__(
        self,
        layer: int,
        q: Tensor,  # (T, heads, head_dim)
        k: Tensor,  # (T, kv_heads, head_dim)
        v: Tensor,  # (T, kv_heads, head_dim)
    ) -> Tensor:
        """Remember k and v, and return what the T queries read: (T, heads, head_dim)."""
        ...


class DenseAttend:
    """Keys and values of one sequence, contiguous and growing: the plain counterpart of a paged cache.

    `visible` is None for an ordinary sequence, in which every token sees itself and all before it. A bool mask
    (T, num_keys after the step) set before a step replaces that rule for the step: beam search keeps rival
    continuations side by side in this way, and neither copies nor reorders anything.
    """

    def __init__(self, num_layers: int, *, attention: Attention = attention_sdpa) -> None:
        self.visible: Tensor | None = None
        self._attention = attention
        self._lengths = [0] * num_layers
        self._keys: list[Tensor | None] = [None] * num_layers  # (kv_heads, capacity, head_dim)
        self._values: list[Tensor | None] = [None] * num_layers

    def __len__(self) -> int:
        """Tokens remembered so far; between steps every layer holds the same number."""
        return self._lengths[-1]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        old, new = self._lengths[layer], self._lengths[layer] + k.shape[0]
        keys = _append(self._keys[layer], k, old)
        values = _append(self._values[layer], v, old)
        self._keys[layer], self._values[layer], self._lengths[layer] = keys, values, new
        mask = self.visible
        if mask is None and q.shape[0] > 1:
            mask = causal_mask(q.shape[0], new, q.device)
        out = self._attention(
            q.transpose(0, 1).unsqueeze(0),  # (1, heads, T, head_dim)
            keys[:, :new].unsqueeze(0),  # (1, kv_heads, num_keys, head_dim)
            values[:, :new].unsqueeze(0),
            scale=q.shape[-1] ** -0.5,
            mask=mask,
        )
        return out.squeeze(0).transpose(0, 1)  # (T, heads, head_dim)


def _append(store: Tensor | None, rows: Tensor, length: int) -> Tensor:
    """Write rows (T, kv_heads, head_dim) behind the first `length` of the store, in a larger one if they do not fit."""
    needed = length + rows.shape[0]
    if store is None or needed > store.shape[1]:
        larger = rows.new_empty(rows.shape[1], max(64, 2 * needed), rows.shape[2])
        if store is not None:
            larger[:, :length] = store[:, :length]
        store = larger
    store[:, length:needed] = rows.transpose(0, 1)
    return store
