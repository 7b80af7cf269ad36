"""The perceiver resampler: learned queries read the patches once, and a picture becomes that many vectors.

The same in both families (omnilmm/model/resampler.py of the original). Three details are easily got wrong: the
position table is resampled without antialiasing, it is added to queries and keys but not to values, and the last
product is x @ proj, not the x @ proj^T of a linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from omnilmm.models.attention import attention_sdpa
from omnilmm.models.config import ResamplerConfig
from omnilmm.models.positions import resample_grid


class Resampler(nn.Module):
    """(B, grid * grid, vision_width) -> (B, num_query, hidden). `grid` is the side of the patch grid."""

    positions: Tensor

    def __init__(self, config: ResamplerConfig, *, grid: int) -> None:
        super().__init__()
        hidden, eps = config.hidden, config.norm_eps
        self.num_heads, self.head_dim, self.grid = config.num_heads, hidden // config.num_heads, grid
        self.query = nn.Parameter(torch.zeros(config.num_query, hidden))
        self.pos_embed = nn.Parameter(torch.zeros(config.num_query, hidden), requires_grad=False)
        self.kv_proj = nn.Linear(config.vision_width, hidden, bias=False)
        self.norm_q = nn.LayerNorm(hidden, eps=eps)
        self.norm_kv = nn.LayerNorm(hidden, eps=eps)
        self.in_proj = nn.Linear(hidden, 3 * hidden)  # rows: query, key, value
        self.out = nn.Linear(hidden, hidden)
        self.norm_post = nn.LayerNorm(hidden, eps=eps)
        self.proj = nn.Parameter(torch.empty(hidden, hidden).normal_(std=hidden**-0.5))
        self.register_buffer("positions", torch.empty(grid * grid, hidden), persistent=False)
        self.derive_tables()

    @torch.no_grad()
    def derive_tables(self) -> None:
        """Make the keys' table from `pos_embed`, by bicubic without antialiasing. To be called when it changed."""
        self.positions.copy_(resample_grid(self.pos_embed, self.grid, antialias=False))

    def forward(self, features: Tensor) -> Tensor:
        x = self.norm_kv(self.kv_proj(features))  # (B, N, hidden)
        q_weight, k_weight, v_weight = self.in_proj.weight.chunk(3)
        q_bias, k_bias, v_bias = self.in_proj.bias.chunk(3)
        q = functional.linear(self.norm_q(self.query) + self.pos_embed, q_weight, q_bias)  # (num_query, hidden)
        q = self._split(q.expand(len(x), -1, -1))  # the same for every picture: (B, heads, num_query, head_dim)
        k = self._split(functional.linear(x + self.positions, k_weight, k_bias))  # (B, heads, N, head_dim)
        v = self._split(functional.linear(x, v_weight, v_bias))
        out = attention_sdpa(q, k, v, scale=self.head_dim**-0.5).transpose(1, 2).flatten(2)  # (B, num_query, hidden)
        return self.norm_post(self.out(out)) @ self.proj

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
