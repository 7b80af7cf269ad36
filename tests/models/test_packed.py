"""Weights laid out for decoding: the same answers, or nearly, from other forms of the same numbers."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from omnilmm.errors import ConfigError
from omnilmm.models.attention import DenseAttend
from omnilmm.models.config import LanguageConfig
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.layers import RMSNorm
from omnilmm.models.packed import (
    FEW,
    WIDE,
    Int8Linear,
    PackedLinear,
    PackedNorm,
    load_for_decoding,
    prepare_for_decoding,
)

needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN does not compute in bfloat16 here"
)
CONFIG = LanguageConfig(
    hidden=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    vocab_size=61,
    max_context=64,
    norm_eps=1e-6,
    rope_theta=100.0,
    scale_depth=1.4,
    dim_model_base=16,
)


def make_model(dtype: torch.dtype = torch.bfloat16, *, is_tied: bool = False) -> LanguageModel:
    torch.manual_seed(4)
    return LanguageModel(replace(CONFIG, is_tied=is_tied)).to(dtype).requires_grad_(False).eval()


def logits(model: LanguageModel) -> Tensor:
    ids = torch.arange(20)
    return model.logits(model(model.embed(ids), ids, DenseAttend(2)))


def plain_linears(model: LanguageModel) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def linears(model: LanguageModel) -> list[object]:
    """Those of a prepared model."""
    inside = [child for layer in model.layers for part in (layer.attention, layer.mlp) for child in part.children()]
    return [*inside, model._unembed]


def test_float32_stays_as_it_is() -> None:
    model = make_model(torch.float32)
    before = logits(model)
    assert prepare_for_decoding(model) is model
    assert len(plain_linears(model)) == 9
    assert torch.equal(logits(model), before)


@needs_bfloat16
@pytest.mark.parametrize("is_tied", [False, True])
def test_packed_weights_give_the_same_answers(is_tied: bool) -> None:
    model = make_model(is_tied=is_tied)
    before = logits(model)
    prepare_for_decoding(model)
    assert len(linears(model)) == 9
    assert all(isinstance(linear, PackedLinear) for linear in linears(model))
    assert_close(logits(model), before, atol=0.02 * before.abs().max().item(), rtol=0)


@pytest.mark.parametrize("num_rows", [1, FEW, FEW + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_packed_norm_is_rounded_once(num_rows: int, dtype: torch.dtype) -> None:
    norm = RMSNorm(96, 1e-5).to(dtype).requires_grad_(False)
    norm.weight.normal_(1.0, 0.3)
    scales = torch.logspace(-3, 3, num_rows)[:, None]
    x = (torch.randn(num_rows, 96) * scales + 2 * scales).to(dtype)  # of a mean far from 0
    x[0] *= 0 if num_rows > FEW else 1
    exact = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    out = PackedNorm(norm)(x)
    assert out.dtype == dtype
    assert_close(out.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-9)


@pytest.mark.parametrize("scale_depth", [1.4, None])
@pytest.mark.parametrize("weight_dtype", [pytest.param(None, marks=needs_bfloat16), "int8"])
@pytest.mark.parametrize("num_rows", [1, 20, 40])
def test_branches_are_added_at_their_scale(scale_depth: float | None, weight_dtype: Any, num_rows: int) -> None:
    torch.manual_seed(5)
    config = replace(CONFIG, scale_depth=scale_depth)
    model = LanguageModel(config).to(torch.bfloat16).requires_grad_(False).eval()
    ids = torch.arange(num_rows)
    before = model(model.embed(ids), ids, DenseAttend(2))
    prepare_for_decoding(model, weight_dtype=weight_dtype)
    error = (model(model.embed(ids), ids, DenseAttend(2)) - before).norm() / before.norm()
    assert error < 0.03


@needs_bfloat16
@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_a_packed_product_is_rounded_once(num_rows: int) -> None:
    x, weight = torch.randn(num_rows, 96).bfloat16(), torch.randn(50, 96).bfloat16()
    exact = x.double() @ weight.double().T
    assert_close(PackedLinear(weight)(x).double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("weight_dtype", [pytest.param(None, marks=needs_bfloat16), "int8"])
def test_no_plain_matrix_is_left_behind(weight_dtype: Any) -> None:
    model = make_model()
    plain = [weakref.ref(linear) for linear in plain_linears(model)]
    prepare_for_decoding(model, weight_dtype=weight_dtype)
    gc.collect()
    assert not any(linear() for linear in plain)
    assert all("norm" in name or name == "embedding.weight" for name, _ in model.named_parameters())


@needs_bfloat16
def test_parts_keep_their_names_and_can_be_listened_to() -> None:
    model = prepare_for_decoding(make_model())
    heard: list[str] = []
    names = [
        f"layers.{i}.{part}" for i in (0, 1) for part in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    ]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: heard.append(name))
    logits(model)
    assert heard == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, WIDE - 1, WIDE])
def test_eight_bits_err_by_half_a_level_at_most(dtype: torch.dtype, num_rows: int) -> None:
    weight = (torch.randn(50, 96) * torch.logspace(-3, 3, 50)[:, None]).to(dtype)
    weight[7] = 0
    linear = Int8Linear(weight)
    assert linear.levels.dtype == torch.int8
    levels = linear.levels.float() * linear.scale.float()[:, None]
    assert ((levels - weight.float()).abs() <= 0.51 * linear.scale.float()[:, None]).all()
    x = torch.randn(num_rows, 96).to(dtype)
    exact = x.double() @ levels.double().T
    precision = 1e-5 if dtype == torch.float32 else 2**-7
    assert ((linear(x).double() - exact).abs() <= precision * (x.double().abs() @ levels.double().abs().T)).all()
    assert not linear(x)[:, 7].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_weights_stay_close_to_the_model(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    before = logits(model)
    prepare_for_decoding(model, weight_dtype="int8")
    assert all(isinstance(linear, Int8Linear) for linear in linears(model))
    error = (logits(model) - before).norm() / before.norm()
    assert 0 < error < 0.03


def test_eight_bits_are_refused_where_there_is_no_kernel() -> None:
    with torch.device("meta"):
        model = LanguageModel(CONFIG)
    with pytest.raises(ConfigError) as refusal:
        prepare_for_decoding(model, weight_dtype="int8")
    assert refusal.value.param == "weight_dtype"


@needs_bfloat16
def test_a_checkpoint_is_loaded_for_decoding(reference: Any) -> None:
    case = reference.full_case
    for weight_dtype, allowed in ((None, 1.25), ("int8", 3.0)):
        model = load_for_decoding(reference.folder, reference.config, dtype="bfloat16", weight_dtype=weight_dtype)
        embeds = reference.embeds(case).bfloat16()
        hidden = model(embeds, torch.arange(len(embeds)), DenseAttend(reference.config.language.num_layers))
        golden = reference.tensors[f"{reference.goldens['full_case']}.logits_last"]
        error = (model.logits(hidden[-1:])[0] - golden).abs().max().item()
        assert error < allowed * reference.goldens["precision"]["bf16_vs_fp32"]["logits_last"]
