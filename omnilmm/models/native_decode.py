"""Decode steps by the code in `avx512/`: a layer is one call, and attention reads the pool's pages where they lie."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omnilmm.models.decoder import LanguageModel
from omnilmm.models.native import CWeight, Kernels, NativeLinear
from omnilmm.models.packed import PackedLayer

PAGE_STEP = 16
"""Positions that are looked at together: a block is a multiple of it."""


class CShape(ctypes.Structure):
    """`Shape` in avx512/decode.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "mlp_width", "block_size")),
        *((name, ctypes.c_float) for name in ("eps", "residual_scale")),
    )


class CLayer(ctypes.Structure):
    """`Layer` in avx512/decode.cpp."""

    _fields_ = (
        *((name, CWeight) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "pool")),
    )


class CStep(ctypes.Structure):
    """`Step` in avx512/decode.cpp."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "blocks", "ends")),
        ("max_blocks", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("normed", "qkv", "seen", "inner")),
    )


class NativeDecoder:
    """The layers of a model over rows of one token each.

    Args:
        model: as `prepare_for_decoding` made it with `kernels`.
        pool: (layers, num_blocks, 2, kv_heads, block_size, head_dim) bfloat16, which it reads and writes.
    """

    def __init__(self, model: LanguageModel, kernels: Kernels, pool: Tensor) -> None:
        assert can_decode(model, pool), "a model or a pool of another kind"
        config = model.config
        self._model, self._pool, self._call = model, pool, kernels.layer
        self._shape = CShape(
            config.hidden,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.mlp_width,
            pool.shape[-2],
            config.norm_eps,
            config.residual_scale,
        )
        self._layers = [_c_layer(layer, part) for layer, part in zip(model.layers, pool, strict=True)]
        num_heads = config.num_heads + 2 * config.num_kv_heads
        self._widths = (
            config.hidden,
            num_heads * config.head_dim,
            config.num_heads * config.head_dim,
            config.mlp_width,
        )
        self._room = pool.new_empty(0)

    def decode(
        self,
        embeds: Tensor,
        positions: Tensor,
        block_ids: NDArray[np.int32],
        ends: NDArray[np.int32],
        before_layer: Callable[[], None] | None = None,
    ) -> Tensor:
        """Write keys and values of these tokens to the pool, and return what comes of them.

        Args:
            embeds: (rows, hidden); overwritten.
            positions: (rows,) int64, each in its own sequence.
            block_ids: (rows, max_blocks), the blocks of each sequence; what lies behind them is not read.
            ends: (rows,), positions of each sequence, this one included.
            before_layer: is called before every layer, and may raise.

        Returns:
            (rows, hidden), after the final norm.
        """
        cos, sin = (table.contiguous() for table in self._model.rotary(positions))  # (rows, 1, head_dim)
        x = embeds.contiguous()
        num_rows = len(x)
        block_ids, ends = np.ascontiguousarray(block_ids), np.ascontiguousarray(ends)
        needed = num_rows * sum(self._widths)
        if len(self._room) < needed:
            self._room = self._pool.new_empty(needed)
        starts = [0, *np.cumsum(self._widths[:-1])]
        step = CStep(
            num_rows,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            block_ids.ctypes.data,
            ends.ctypes.data,
            block_ids.shape[1],
            *(self._room.data_ptr() + int(num_rows * start * self._room.itemsize) for start in starts),
        )
        shape_at, step_at = ctypes.addressof(self._shape), ctypes.addressof(step)
        num_threads = torch.get_num_threads()
        for layer in self._layers:
            if before_layer is not None:
                before_layer()
            self._call(shape_at, ctypes.addressof(layer), step_at, num_threads)
        return self._model.norm(x)


def can_decode(model: LanguageModel, pool: Tensor) -> bool:
    """Whether model and pool are of the kind that a NativeDecoder takes."""
    is_fit = pool.dtype == torch.bfloat16 and pool.is_contiguous() and pool.shape[-2] % PAGE_STEP == 0
    return is_fit and all(isinstance(layer, PackedLayer) and _weights(layer) is not None for layer in model.layers)


def _weights(layer: PackedLayer) -> list[CWeight] | None:
    """Those of its qkv, out, gate_up and down; None if another code computes them."""
    weights = [linear.c_weight for linear in layer.linears if isinstance(linear, NativeLinear)]
    return weights if len(weights) == len(layer.linears) else None


def _c_layer(layer: nn.Module, pool: Tensor) -> CLayer:
    assert isinstance(layer, PackedLayer)
    weights = _weights(layer)
    assert weights is not None
    return CLayer(*weights, layer.attention_norm.weight.data_ptr(), layer.mlp_norm.weight.data_ptr(), pool.data_ptr())
