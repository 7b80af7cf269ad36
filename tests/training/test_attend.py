"""The products that replace fused attention in training give its numbers and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from omnilmm.models.attention import attention_reference
from omnilmm.training.attend import PlainProducts, attention_products


def qkv(heads: int = 4, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(2, num, 5, 8, generator=generator).requires_grad_() for num in shapes)
    return q, k, v


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_they_give_the_numbers_and_the_gradients_of_the_formula(kv_heads: int) -> None:
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    hidden = torch.zeros(2, 1, 5, 5).masked_fill(~mask, float("-inf"))
    ours, theirs = qkv(kv_heads=kv_heads), qkv(kv_heads=kv_heads)
    out = attention_products(*ours, scale=0.3, hidden=hidden)
    expected = attention_reference(*theirs, scale=0.3, mask=mask)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_inside_the_context_fused_attention_is_replaced() -> None:
    q, k, v = qkv()
    fused = functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    with PlainProducts():
        plain = functional.scaled_dot_product_attention(q, k, v, attn_mask=None, scale=0.3)
    torch.testing.assert_close(plain, fused)
    assert "Attention" in fused.grad_fn.name()
    assert "Attention" not in plain.grad_fn.name()


def test_with_a_mask_it_is_left_alone() -> None:
    q, k, v = qkv()
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with PlainProducts():
        assert torch.equal(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), expected)
