"""The language model's weights laid out for decoding on CPU: in oneDNN's own order, or as 8-bit integers.

A decode step reads every weight once, so its time is that of the reading. oneDNN's order makes the same products in two
thirds of the time, and 8 bits are half as much to read. Neither form can be trained or written back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from omnilmm.errors import ConfigError
from omnilmm.models.attention import Attend
from omnilmm.models.config import ModelConfig
from omnilmm.models.decoder import DecoderLayer, LanguageModel
from omnilmm.models.device import apart
from omnilmm.models.layers import rms_norm
from omnilmm.models.positions import rotate
from omnilmm.models.weights import Progress, load_language_model

WeightDtype = Literal["int8"]

WIDE = 24
"""Rows from which 8-bit weights are widened before the product: torch's kernel for them is made for few."""


class PackedLinear(nn.Module):
    """x W^T by oneDNN, W (out, in) being kept in the order oneDNN likes best; nothing else can read it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self._product(x, self._weight, None, "none", [], "")
        return product


class Int8Linear(nn.Module):
    """x W^T with W (out, in) as 8-bit integers, one scale a row: W is about `levels * scale[:, None]`.

    The integers are exact in x's dtype, so that the error is that of rounding W, about half a scale an element.
    """

    levels: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = (weight.float().abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        scale = scale.to(weight.dtype)  # first, so that the integers make up for its rounding
        levels = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("levels", levels.to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] < WIDE:
            return torch._weight_int8pack_mm(x.contiguous(), self.levels, self.scale)
        return functional.linear(x, self.levels.to(x.dtype)) * self.scale


class PackedLayer(nn.Module):
    """A DecoderLayer whose matrices have another form. Its parts keep their names, and their sums their order.

    They are called in one piece: a step of few tokens is so short that looking for a module within a module, and
    calling it, a dozen times a layer is a tenth of it.
    """

    def __init__(self, layer: DecoderLayer, make: Callable[[Tensor], nn.Module]) -> None:
        super().__init__()
        self.attention_norm, self.attention = layer.attention_norm, layer.attention
        self.mlp_norm, self.mlp = layer.mlp_norm, layer.mlp
        for part in (self.attention, self.mlp):
            for name, linear in list(part.named_children()):
                setattr(part, name, make(linear.get_parameter("weight")))
        self._linears = (self.attention.qkv, self.attention.out, self.mlp.gate_up, self.mlp.down)
        self._norms = (self.attention_norm.weight.detach(), self.mlp_norm.weight.detach())
        self._norm_eps, self._residual_scale = layer.mlp_norm.eps, layer.residual_scale
        self._layer, self._head_dim = layer.attention.layer, layer.attention.head_dim
        self._num_heads, self._num_kv_heads = layer.attention.num_heads, layer.attention.num_kv_heads

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        qkv_of, out_of, gate_up_of, down_of = self._linears
        num_heads, num_qk = self._num_heads, self._num_heads + self._num_kv_heads
        qkv = qkv_of(rms_norm(x, self._norms[0], self._norm_eps)).view(len(x), -1, self._head_dim)
        qk = rotate(qkv[:, :num_qk], angles)
        seen = attend(self._layer, qk[:, :num_heads], qk[:, num_heads:], qkv[:, num_qk:])
        x = torch.add(x, out_of(seen.flatten(1)), alpha=self._residual_scale)
        gate, up = gate_up_of(rms_norm(x, self._norms[1], self._norm_eps)).chunk(2, dim=-1)
        return torch.add(x, down_of(functional.silu(gate) * up), alpha=self._residual_scale)


def load_for_decoding(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: str,
    weight_dtype: WeightDtype | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> LanguageModel:
    """The language model as the engine wants it: `load_language_model`, then `prepare_for_decoding`.

    Raises:
        CheckpointError: the weights are not those of `config`.
        ConfigError: `dtype` is unknown, or the device does not have the `weight_dtype`.
    """

    def load() -> LanguageModel:
        model = load_language_model(folder, config, dtype=dtype, device=device, progress=progress)
        return prepare_for_decoding(model, weight_dtype=weight_dtype)

    return apart(load)


@torch.no_grad()
def prepare_for_decoding(model: LanguageModel, *, weight_dtype: WeightDtype | None = None) -> LanguageModel:
    """Lay the weights of a loaded, frozen model out for decoding, in place and one after another. Returns it.

    With no `weight_dtype`, half-precision weights on CPU are packed where oneDNN computes in their dtype; all others
    stay as they are. Where the output matrix is tied to the input embedding, it is kept in both forms, because
    embedding reads single rows.

    Raises:
        ConfigError: 8-bit weights were asked for on another device than CPU.
    """
    make = _linear_of(model.embedding.weight, weight_dtype)
    if make is not None:
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, DecoderLayer), "prepared twice"
            model.layers[index] = PackedLayer(layer, make)  # the plain weights go before the next layer is made
        model.replace_head(make(model.output_matrix))
    return model


def _linear_of(example: Tensor, weight_dtype: WeightDtype | None) -> Callable[[Tensor], nn.Module] | None:
    if weight_dtype is not None:
        if example.device.type != "cpu":
            raise ConfigError("weight_dtype int8 is made for CPU only", param="weight_dtype")
        return Int8Linear
    return PackedLinear if _can_pack(example) else None


def _can_pack(example: Tensor) -> bool:
    """In float32 the plain product is kept: it is as fast, and gives the same numbers whatever else is in a batch."""
    if example.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if example.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return example.dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
