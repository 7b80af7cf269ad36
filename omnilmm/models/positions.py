"""Where a token or a patch stands: rotary tables for the decoder, and position grids brought to another size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def resample_grid(table: Tensor, side: int, *, antialias: bool) -> Tensor:
    """Bring a square grid of position vectors to another size by bicubic interpolation, in float32.

    The vision towers were run with antialiasing (timm's resample_abs_pos_embed), the resamplers without.

    Args:
        table: (n * n, width), row-major, any floating dtype.
        side: n of the result.

    Returns:
        (side * side, width) in float32; the numbers themselves when the size does not change.
    """
    native = round(table.shape[0] ** 0.5)
    table = table.float()
    if native == side:
        return table.clone()
    grid = table.view(1, native, native, -1).permute(0, 3, 1, 2)  # (1, width, n, n)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=antialias)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).contiguous()  # (side * side, width)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021) in Llama's layout: element i is turned with element i + half.

    The tables are made once for `max_context` positions, in float32, and then follow the module's dtype, as
    transformers rounds them too. They are as wide as a head, and the sines of its first half are negative already, so
    that a turn is two products and a sum.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, *, theta: float, max_context: int) -> None:
        super().__init__()
        self.head_dim, self.theta, self.max_context = head_dim, theta, max_context
        self.register_buffer("cos", torch.empty(max_context, head_dim), persistent=False)
        self.register_buffer("sin", torch.empty(max_context, head_dim), persistent=False)
        self.derive_tables()

    def derive_tables(self) -> None:
        """Fill the tables in place. Called at construction, and again after a model built without memory got some."""
        device = self.cos.device
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=device).float() / self.head_dim
        frequencies = 1.0 / self.theta**exponents  # (half,)
        positions = torch.arange(self.max_context, dtype=torch.float32, device=device)
        angles = positions[:, None] * frequencies  # (max_context, half)
        cos, sin = angles.cos(), angles.sin()
        self.cos.copy_(torch.cat((cos, cos), dim=-1))
        self.sin.copy_(torch.cat((-sin, sin), dim=-1))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines at `positions` (T,), each (T, 1, head_dim): ready to meet (T, heads, head_dim)."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x (T, heads, head_dim) by what Rotary gave for its T positions."""
    cos, sin = angles
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
