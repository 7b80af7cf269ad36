"""Attention over a batch of rows: `models.attention.Attend` for training.

The tokens of all rows lie side by side for the linear layers, which are most of the work and so waste nothing on
padding. For attention alone they are laid out as a rectangle of rows, because one (T, T) mask over the whole batch
would cost far more than the padding does.
"""

from __future__ import annotations

from torch import Tensor

from omnilmm.models.attention import Attention, attention_sdpa
from omnilmm.training.rows import Batch


class RowAttend:
    """Every token sees its ancestors in its own row and itself. Nothing is remembered."""

    def __init__(self, batch: Batch, *, attention: Attention = attention_sdpa) -> None:
        self._slots, self._visible, self._attention = batch.slots, batch.visible, attention

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Under autocast q and k come in float32 from the rotary tables, and v in the lower precision.
        out = self._attention(
            self._laid_out(q.to(v.dtype)),
            self._laid_out(k.to(v.dtype)),
            self._laid_out(v),
            scale=q.shape[-1] ** -0.5,
            mask=self._visible,
        )  # (B, heads, longest, head_dim)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self._slots)  # (T, heads, head_dim)

    def _laid_out(self, x: Tensor) -> Tensor:
        """(T, heads, head_dim) -> (B, heads, longest, head_dim), zero where there is no token."""
        rows, _, longest, _ = self._visible.shape
        flat = x.new_zeros(rows * longest, *x.shape[1:]).index_copy(0, self._slots, x)
        return flat.unflatten(0, (rows, longest)).transpose(1, 2)
