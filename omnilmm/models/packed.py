"""The language model's weights laid out for decoding on CPU: in oneDNN's own order, or as 8-bit integers.

A decode step reads every weight once, so its time is that of the reading. oneDNN's order makes the same products in two
thirds of the time, and 8 bits are half as much to read. Neither form can be trained or written back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
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
from omnilmm.models.layers import RMSNorm
from omnilmm.models.native import PANEL, Kernels, NativeLinear, can_compute, try_kernels
from omnilmm.models.positions import rotate
from omnilmm.models.weights import Progress, load_language_model

WeightDtype = Literal["int8"]

FEW = 4
"""Tokens up to which a norm of twice the width is faster than several operations of the width itself."""

WIDE = 24
"""Rows from which 8-bit weights are widened before the product: torch's kernel for them is made for few."""


class PackedLinear(nn.Module):
    """x W^T by oneDNN, W (out, in) being kept in the order oneDNN likes best; nothing else can read it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._sum = torch.ops.mkldnn._linear_pointwise.binary

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (T, in) W^T, to which `residual` (T, out) is added before it is rounded."""
        product: Tensor
        if residual is None:
            product = self._product(x, self._weight, None, "none", [], "")
        else:
            product = self._sum(x, residual, self._weight, None, "add")
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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (T, in) W^T plus `residual` (T, out)."""
        if x.shape[0] < WIDE:
            product = torch._weight_int8pack_mm(x.contiguous(), self.levels, self.scale)
        else:
            product = functional.linear(x, self.levels.to(x.dtype)) * self.scale
        return product if residual is None else product.add_(residual)


class PackedNorm:
    """RMSNorm as few operations: for a token or four, each of them takes longer to call than to compute.

    It is rounded once, behind the weight, where Llama's own is rounded before it too.
    """

    def __init__(self, norm: RMSNorm) -> None:
        weight = norm.weight.detach()
        self._width, self._eps = weight.shape[0], norm.eps
        self._twice = torch.cat((weight, weight))
        self._scaled = weight.float() * math.sqrt(self._width)
        self._least = torch.tensor(math.sqrt(self._width * norm.eps))

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) <= FEW:  # beside its own negative it has mean 0, and the variance is the mean square
            both = torch.cat((x, -x), dim=-1)
            return functional.layer_norm(both, (2 * self._width,), self._twice, None, self._eps)[:, : self._width]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (T, 1)
        return (x / torch.hypot(norm, self._least)).mul_(self._scaled).to(x.dtype)


class PackedLayer(nn.Module):
    """A DecoderLayer whose matrices have another form. Its parts keep their names.

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
        self.linears = (self.attention.qkv, self.attention.out, self.mlp.gate_up, self.mlp.down)
        self._norms = (PackedNorm(self.attention_norm), PackedNorm(self.mlp_norm))
        self._residual_scale = layer.residual_scale
        self._layer, self._head_dim = layer.attention.layer, layer.attention.head_dim
        self._num_heads, self._num_kv_heads = layer.attention.num_heads, layer.attention.num_kv_heads

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        qkv_of, out_of, gate_up_of, down_of = self.linears
        attention_norm, mlp_norm = self._norms
        num_heads, num_qk = self._num_heads, self._num_heads + self._num_kv_heads
        qkv = qkv_of(attention_norm(x)).view(len(x), -1, self._head_dim)
        qk = rotate(qkv[:, :num_qk], angles)
        seen = attend(self._layer, qk[:, :num_heads], qk[:, num_heads:], qkv[:, num_qk:]).flatten(1)
        x = self._added(x, out_of, seen)
        gate, up = gate_up_of(mlp_norm(x)).chunk(2, dim=-1)
        return self._added(x, down_of, functional.silu(gate) * up)

    def _added(self, x: Tensor, branch: nn.Module, inner: Tensor) -> Tensor:
        if self._residual_scale == 1.0:
            total: Tensor = branch(inner, x)
            return total
        return torch.add(x, branch(inner), alpha=self._residual_scale)


def load_for_decoding(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: str,
    weight_dtype: WeightDtype | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> LanguageModel:
    """The language model as the engine wants it: `load_language_model`, then `prepare_for_decoding`, with our own
    kernels where they can be had.

    Raises:
        CheckpointError: the weights are not those of `config`.
        ConfigError: `dtype` is unknown, or the device does not have the `weight_dtype`.
    """

    def load() -> LanguageModel:
        model = load_language_model(folder, config, dtype=dtype, device=device, progress=progress)
        kernels = try_kernels() if can_use_kernels(model) else None
        return prepare_for_decoding(model, weight_dtype=weight_dtype, kernels=kernels)

    return apart(load)


@torch.no_grad()
def prepare_for_decoding(
    model: LanguageModel, *, weight_dtype: WeightDtype | None = None, kernels: Kernels | None = None
) -> LanguageModel:
    """Lay the weights of a loaded, frozen model out for decoding, in place and one after another. Returns it.

    With `kernels`, which a model must be fit for (`can_use_kernels`), weights lie as these want them, and the engine
    decodes by them. Without, and with no `weight_dtype`, half-precision weights on CPU are packed where oneDNN computes
    in their dtype; all others stay as they are. Where the output matrix is tied to the input embedding, it is kept in
    both forms, because embedding reads single rows.

    Raises:
        ConfigError: 8-bit weights were asked for on another device than CPU.
    """
    assert kernels is None or can_use_kernels(model), "kernels for another kind of model"
    make = _linear_of(model.embedding.weight, weight_dtype, kernels)
    if make is not None:
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, DecoderLayer), "prepared twice"
            model.layers[index] = PackedLayer(layer, make)  # the plain weights go before the next layer is made
        model.replace_head(make(model.output_matrix))
        model.kernels = kernels
    return model


def can_use_kernels(model: LanguageModel) -> bool:
    """Whether our own kernels can compute this model here: in bfloat16, on such a CPU, and with fit widths."""
    weight, config = model.embedding.weight, model.config
    widths = (config.hidden, config.mlp_width, config.head_dim)
    is_fit = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return is_fit and all(width % PANEL == 0 for width in widths) and can_compute()


def _linear_of(
    example: Tensor, weight_dtype: WeightDtype | None, kernels: Kernels | None
) -> Callable[[Tensor], nn.Module] | None:
    if weight_dtype is not None:
        if example.device.type != "cpu":
            raise ConfigError("weight_dtype int8 is made for CPU only", param="weight_dtype")
        return Int8Linear if kernels is None else partial(_native_int8, kernels)
    if kernels is not None:
        return partial(NativeLinear, kernels)
    return PackedLinear if _can_pack(example) else None


def _native_int8(kernels: Kernels, weight: Tensor) -> NativeLinear:
    plain = Int8Linear(weight)
    return NativeLinear(kernels, plain.levels, plain.scale)


def _can_pack(example: Tensor) -> bool:
    """In float32 the plain product is kept: it is as fast, and gives the same numbers whatever else is in a batch."""
    if example.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if example.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return example.dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
