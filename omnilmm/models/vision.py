"""The image encoder: a vision tower and the resampler behind it. One ViT is EVA02-E/14+ or SigLIP so400m/14, by its
config.

Checked against timm 0.9.10 (models/eva.py with use_post_norm, models/vision_transformer.py). Both families leave
out the tower's last block and any pooling head, and apply the final norm to what the block before it gave.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omnilmm.models.attention import attention_sdpa
from omnilmm.models.config import ResamplerConfig, VisionConfig
from omnilmm.models.layers import MLP
from omnilmm.models.positions import resample_grid
from omnilmm.models.resampler import Resampler


class VisionAttention(nn.Module):
    """Self-attention over all patches. EVA has no bias on the keys: those rows of `qkv.bias` are zero. A bias there
    would add the same number to all scores of a query, so training them would change nothing either.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, N, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim)
        out = attention_sdpa(q, k, v, scale=self.head_dim**-0.5)
        return self.out(out.transpose(1, 2).flatten(2))  # (B, N, width)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.is_post_norm = config.is_post_norm
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_post_norm:
            x = x + self.norm1(self.attention(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """Pixels to one vector per patch. `pos_embed` is the table as stored, for the native side; the forward pass uses
    `positions`, the same table at the side pictures have, made once by `derive_tables`.
    """

    positions: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        prefix = int(config.has_class_token)
        self.patch_embed = nn.Conv2d(3, config.width, kernel_size=config.patch, stride=config.patch)
        if config.has_class_token:
            self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, prefix + config.native_grid**2, config.width), requires_grad=False)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        shape = (1, prefix + config.num_patches, config.width)
        self.register_buffer("positions", torch.empty(shape), persistent=False)
        self.derive_tables()

    @torch.no_grad()
    def derive_tables(self) -> None:
        """Make `positions` from `pos_embed`: patches by antialiased bicubic in float32, the class token's row as it is.

        To be called again whenever `pos_embed` has changed.
        """
        prefix = int(self.config.has_class_token)
        self.positions[:, :prefix] = self.pos_embed[:, :prefix]
        self.positions[0, prefix:] = resample_grid(self.pos_embed[0, prefix:], self.config.grid, antialias=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, side, side) normalised pixels, in the tower's dtype -> (B, num_patches, width)."""
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # (B, num_patches, width)
        if self.config.has_class_token:
            x = torch.cat((self.class_token.expand(len(x), -1, -1), x), dim=1)  # (B, 1 + num_patches, width)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 1:] if self.config.has_class_token else x


class ImageEncoder(nn.Module):
    """Pixels in, the vectors that stand for a picture in the prompt out."""

    def __init__(self, vision: VisionConfig, resampler: ResamplerConfig) -> None:
        super().__init__()
        self.vision = VisionTower(vision)
        self.resampler = Resampler(resampler, grid=vision.grid)

    def derive_tables(self) -> None:
        """Make the position tables at run-time size. To be called when a stored one has changed."""
        self.vision.derive_tables()
        self.resampler.derive_tables()

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, side, side) normalised pixels in the model's dtype -> (B, num_query, hidden)."""
        return self.resampler(self.vision(pixels))

    def vision_features(self, pixels: Tensor) -> Tensor:
        """The tower alone: (B, 3, side, side) -> (B, num_patches, width), after its final norm."""
        return self.vision(pixels)
