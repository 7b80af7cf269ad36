"""Steps by the code in `avx512/`: a layer is one call, and attention reads the pool's pages where they lie."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omnilmm.models.adapter_products import Pairs
from omnilmm.models.adapters import AdapterPool
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.native import CWeight, Kernels, NativeLinear
from omnilmm.models.packed import PackedLayer

MOST_FUSED = 3
"""Projections that one matrix holds: query, key and value."""

FUSED = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
"""A layer's matrices, as adapters know them."""

PAGE_STEP = 16
"""Positions that are looked at together: a block is a multiple of it."""


class CShape(ctypes.Structure):
    """`Shape` in avx512/decode.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "mlp_width", "block_size")),
        *((name, ctypes.c_float) for name in ("eps", "residual_scale")),
    )


class CPair(ctypes.Structure):
    """`Pair` in avx512/adapters.h."""

    _fields_ = (("up", ctypes.c_void_p), ("first", ctypes.c_int64), ("outputs", ctypes.c_int64))


class CPairs(ctypes.Structure):
    """`Pairs` in avx512/adapters.h."""

    _fields_ = (
        ("down", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("projections", "inputs")),
        ("pairs", CPair * MOST_FUSED),
    )


class CLayer(ctypes.Structure):
    """`Layer` in avx512/decode.cpp."""

    _fields_ = (
        *((name, CWeight) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "pool")),
        ("adapters", CPairs * 4),
    )


class CStep(ctypes.Structure):
    """`Step` in avx512/decode.cpp."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "blocks")),
        ("max_blocks", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("sequences", "ends", "normed", "qkv", "seen", "inner", "ranks", "adapted")
        ),
        ("num_adapted", ctypes.c_int64),
        ("raised", ctypes.c_void_p),
    )


class NativeDecoder:
    """The layers of a model over the tokens of a step. What becomes of a token does not depend on which others come
    with it: a sequence may be computed in any pieces, beside any others.

    Args:
        model: as `prepare_for_decoding` made it with `kernels`.
        pool: (layers, num_blocks, 2, kv_heads, block_size, head_dim) bfloat16, which it reads and writes.
        adapters: of this model, if rows may have one.
    """

    def __init__(
        self, model: LanguageModel, kernels: Kernels, pool: Tensor, adapters: AdapterPool | None = None
    ) -> None:
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
        self._adapters = adapters  # whose memory is read
        if adapters is not None:
            for index, layer in enumerate(self._layers):
                layer.adapters[:] = [_c_pairs(adapters.pairs_of(f"layers.{index}.{name}")) for name in FUSED]
        num_heads = config.num_heads + 2 * config.num_kv_heads
        self._widths = (
            config.hidden,
            num_heads * config.head_dim,
            config.num_heads * config.head_dim,
            config.mlp_width,
            2 * config.mlp_width if adapters is not None else 0,
        )
        self._room = pool.new_empty(0)

    def decode(
        self,
        embeds: Tensor,
        positions: Tensor,
        block_ids: NDArray[np.int32],
        ends: NDArray[np.int32],
        *,
        sequences: NDArray[np.int32] | None = None,
        before_layer: Callable[[], None] | None = None,
        ranks: NDArray[np.int32] | None = None,
    ) -> Tensor:
        """Write keys and values of these tokens to the pool, and return what comes of them.

        Args:
            embeds: (rows, hidden), a row being a token; overwritten.
            positions: (rows,) int64, each in its own sequence.
            block_ids: (sequences, max_blocks), the blocks of each; what lies behind its last token is not read.
            ends: (rows,), positions of its sequence that a token reads, its own included: the one of `positions` + 1.
            sequences: (rows,), whose line of `block_ids` is each token's; not given where all have one of their own.
            before_layer: is called before every layer, and may raise.
            ranks: (rows, 2), where each row's adapter begins among the rank rows of the pool and how many it has, 0
                where it has none; not given where no row has one.

        Returns:
            (rows, hidden), after the final norm.
        """
        cos, sin = (table.contiguous() for table in self._model.rotary(positions))  # (rows, 1, head_dim)
        x = embeds.contiguous()
        num_rows = len(x)
        if sequences is None:
            sequences = np.arange(num_rows, dtype=np.int32)
        block_ids, sequences, ends = map(np.ascontiguousarray, (block_ids, sequences, ends))
        needed = num_rows * sum(self._widths)
        if len(self._room) < needed:
            self._room = self._pool.new_empty(needed)
        adapted = np.empty(0, dtype=np.int32)
        if ranks is not None:
            assert self._adapters is not None, "rows with an adapter, and no pool to find it in"
            ranks = np.ascontiguousarray(ranks)
            order = np.argsort(ranks[:, 0], kind="stable")
            adapted = order[ranks[order, 1] > 0].astype(np.int32)
        starts = [0, *np.cumsum(self._widths[:-1])]
        *room, raised = (self._room.data_ptr() + int(num_rows * start * self._room.itemsize) for start in starts)
        step = CStep(
            num_rows,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            block_ids.ctypes.data,
            block_ids.shape[1],
            sequences.ctypes.data,
            ends.ctypes.data,
            *room,
            None if ranks is None else ranks.ctypes.data,
            adapted.ctypes.data,
            len(adapted),
            raised,
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


def _c_pairs(pairs: Pairs) -> CPairs:
    assert pairs.down.is_contiguous(), "rank rows that do not lie one behind the other"
    assert all(up.is_contiguous() for up in pairs.ups), "rank rows that do not lie one behind the other"
    _, num_projections, num_inputs = pairs.down.shape
    columns = zip(pairs.ups, pairs.columns, strict=True)
    each = [CPair(up.data_ptr(), own.start, own.stop - own.start) for up, own in columns]
    return CPairs(pairs.down.data_ptr(), num_projections, num_inputs, (CPair * MOST_FUSED)(*each))


def _c_layer(layer: nn.Module, pool: Tensor) -> CLayer:
    assert isinstance(layer, PackedLayer)
    weights = _weights(layer)
    assert weights is not None
    return CLayer(*weights, layer.attention_norm.weight.data_ptr(), layer.mlp_norm.weight.data_ptr(), pool.data_ptr())
