"""The language model: a Llama-type decoder over a flat run of tokens.

There is no batch dimension. Tokens of many sequences may stand side by side in one call; `positions` says where
each one stands in its own sequence, and `attend` alone knows which belong together and where their keys live.
MiniCPM differs by three scales (embedding, residual branches, logits), which are 1 in the other families.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from omnilmm.models.attention import Attend
from omnilmm.models.config import LanguageConfig
from omnilmm.models.layers import GatedMLP, RMSNorm
from omnilmm.models.native import Kernels
from omnilmm.models.positions import Rotary, rotate


class DecoderAttention(nn.Module):
    """Projections around `attend`. Rows of `qkv`: all query heads, all key heads, all value heads."""

    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden, rows, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (T, heads + 2 kv_heads, head_dim)
        qk, v = qkv.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = rotate(qk, angles).split((self.num_heads, self.num_kv_heads), dim=1)
        return self.out(attend(self.layer, q, k, v).flatten(1))  # (T, hidden)


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        self.attention = DecoderAttention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = GatedMLP(config.hidden, config.mlp_width)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = torch.add(x, self.attention(self.attention_norm(x), angles, attend), alpha=self.residual_scale)
        return torch.add(x, self.mlp(self.mlp_norm(x)), alpha=self.residual_scale)


class LanguageModel(nn.Module):
    """Token or picture vectors in, hidden states out; `logits` only for the rows that are asked for."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.rotary = Rotary(config.head_dim, theta=config.rope_theta, max_context=config.max_context)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        if not config.is_tied:
            self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self._unembed: Callable[[Tensor], Tensor] | None = None
        self.kernels: Kernels | None = None  # what its matrices are laid out for, if for these

    @property
    def output_matrix(self) -> Tensor:
        """(vocab_size, hidden): the input embedding itself where the two are tied."""
        return self.embedding.weight if self.config.is_tied else self.head.weight

    def replace_head(self, unembed: Callable[[Tensor], Tensor]) -> None:
        """From now on this makes scores of hidden states, (N, hidden) -> (N, vocab_size). An output matrix of the
        model's own is given up."""
        self._unembed = unembed
        if not self.config.is_tied:
            del self.head

    def derive_tables(self) -> None:
        """Make the rotary tables: needed once after a model built without memory was given some."""
        self.rotary.derive_tables()

    def embed(self, ids: Tensor) -> Tensor:
        """Vectors of text tokens: (T,) int64 -> (T, hidden), scaled. Picture vectors go to `forward` as they are."""
        vectors = self.embedding(ids)
        return vectors if self.config.scale_emb == 1.0 else vectors * self.config.scale_emb

    def forward(self, embeds: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run every layer over T tokens.

        Args:
            embeds: (T, hidden) in the model's dtype.
            positions: (T,) int64, each below `config.max_context`.
            attend: reaches the past; it is called once per layer, in order.

        Returns:
            (T, hidden), after the final norm.
        """
        angles = self.rotary(positions)
        x = embeds
        for layer in self.layers:
            x = layer(x, angles, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: (N, hidden) from `forward` -> (N, vocab_size) float32."""
        if self.config.logit_divisor != 1.0:
            hidden = hidden / self.config.logit_divisor
        if self._unembed is not None:
            return self._unembed(hidden).float()
        return functional.linear(hidden, self.output_matrix).float()
