"""The small layers against transformers and against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from omnilmm.models.layers import MLP, GatedMLP, RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rounds_as_llama_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(5, 64, generator=generator) * 30).to(dtype)
    weight = torch.rand(64, generator=generator).to(dtype)
    ours, theirs = RMSNorm(64, 1e-5).to(dtype), LlamaRMSNorm(64, eps=1e-5).to(dtype)
    ours.weight.copy_(weight)
    theirs.weight.copy_(weight)
    assert torch.equal(ours(x), theirs(x))


def test_gated_mlp_keeps_gate_above_up() -> None:
    mlp = GatedMLP(8, 12)
    x = torch.randn(3, 8)
    gate, up = mlp.gate_up.weight[:12], mlp.gate_up.weight[12:]
    assert_close(mlp(x), (functional.silu(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.T)


def test_vision_mlp_uses_exact_gelu() -> None:
    mlp = MLP(8, 12)
    x = torch.randn(3, 8) * 3
    inner = mlp.fc1(x)
    assert_close(mlp(x), mlp.fc2(inner * 0.5 * (1 + torch.erf(inner / 2**0.5))))
