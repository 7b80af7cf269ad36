"""Attention in training: over a batch of rows, and as three plain products.

The tokens of all rows lie side by side for the linear layers, which are most of the work and so waste nothing on
padding. For attention alone they are laid out as a rectangle of rows, because one (T, T) mask over the whole batch
would cost far more than the padding does.

torch's fused kernel saves memory that a few hundred tokens never need. On a CPU its backward pass in bfloat16 takes
three to six times as long as that of the products it stands for (64 to 220 tokens, measured on one core with AVX-512),
and it was half of a whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from omnilmm.training.rows import Batch


def attention_products(q: Tensor, k: Tensor, v: Tensor, *, scale: float, hidden: Tensor | None = None) -> Tensor:
    """Softmax attention as products. `hidden` is added to the scores, (batch, 1, num_queries, num_keys): minus infinity
    where a key may not be seen. Shapes as in `models.attention.Attention`."""
    batch, heads = q.shape[:2]
    if k.shape[1] != heads:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.bmm((q * scale).flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    if hidden is not None:
        scores = (scores.unflatten(0, (batch, heads)) + hidden).flatten(0, 1)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).unflatten(0, (batch, heads))


class PlainProducts(TorchFunctionMode):
    """While this context is open, fused attention without a mask runs as `attention_products`: what the encoder's
    attention, which knows nothing of training, becomes in it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            return attention_products(*args[:3], scale=kwargs["scale"])
        return func(*args, **kwargs)


class RowAttend:
    """Every token sees its ancestors in its own row and itself. Nothing is remembered."""

    def __init__(self, batch: Batch) -> None:
        self._slots, self._shape = batch.slots, batch.visible.shape
        self._visible, self._hidden = batch.visible, torch.empty(0)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._hidden.dtype is not v.dtype or not len(self._hidden):
            self._hidden = torch.zeros(self._shape, dtype=v.dtype, device=v.device)
            self._hidden.masked_fill_(~self._visible, float("-inf"))
        # Under autocast q and k come in float32 from the rotary tables, and v in the lower precision.
        out = attention_products(
            self._laid_out(q.to(v.dtype)),
            self._laid_out(k.to(v.dtype)),
            self._laid_out(v),
            scale=q.shape[-1] ** -0.5,
            hidden=self._hidden,
        )  # (B, heads, longest, head_dim)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self._slots)  # (T, heads, head_dim)

    def _laid_out(self, x: Tensor) -> Tensor:
        """(T, heads, head_dim) -> (B, heads, longest, head_dim), zero where there is no token."""
        rows, _, longest, _ = self._shape
        flat = x.new_zeros(rows * longest, *x.shape[1:]).index_copy(0, self._slots, x)
        return flat.unflatten(0, (rows, longest)).transpose(1, 2)
