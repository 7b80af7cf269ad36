"""Backends agree with the reference; a dense cache remembers what it was told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from omnilmm.models.attention import DenseAttend, attention_reference, attention_sdpa, causal_mask


def qkv(num_queries: int, num_keys: int, *, heads: int = 4, kv_heads: int = 2, width: int = 16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num_queries * 1000 + num_keys)
    q = torch.randn(2, heads, num_queries, width, generator=generator)
    k = torch.randn(2, kv_heads, num_keys, width, generator=generator)
    v = torch.randn(2, kv_heads, num_keys, width, generator=generator)
    return q, k, v


def test_the_reference_is_the_formula() -> None:
    q, k, v = qkv(3, 5)
    out = attention_reference(q, k, v, scale=0.3, mask=causal_mask(3, 5, q.device))
    for head in range(4):
        for query in range(3):
            seen = slice(0, 3 + query)  # the last query is the last key
            weights = (q[1, head, query] @ k[1, head // 2, seen].T * 0.3).softmax(dim=-1)
            assert_close(out[1, head, query], weights @ v[1, head // 2, seen])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("num_queries", [1, 7])
def test_backends_agree(kv_heads: int, num_queries: int) -> None:
    q, k, v = qkv(num_queries, 9, kv_heads=kv_heads)
    for mask in (None, causal_mask(num_queries, 9, q.device)):
        expected = attention_reference(q, k, v, scale=0.25, mask=mask)
        assert_close(attention_sdpa(q, k, v, scale=0.25, mask=mask), expected)


def flat(num_tokens: int) -> tuple[Tensor, ...]:
    """q, k, v of a step: (T, heads, head_dim)."""
    return tuple(tensor[0].transpose(0, 1) for tensor in qkv(num_tokens, num_tokens))


def test_steps_of_any_size_give_what_one_step_gives() -> None:
    q, k, v = flat(150)
    whole = DenseAttend(1)(0, q, k, v)
    attend = DenseAttend(1)
    sizes = (1, 70, 1, 1, 77)
    parts = [attend(0, *step) for step in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)]
    assert_close(torch.cat(parts), whole)
    assert len(attend) == 150


def test_layers_have_memories_of_their_own() -> None:
    q, k, v = flat(4)
    attend = DenseAttend(2)
    attend(0, q, k, v)
    assert_close(attend(1, q, 2 * k, 3 * v), DenseAttend(1)(0, q, 2 * k, 3 * v))


def test_a_visibility_mask_keeps_rivals_apart() -> None:
    q, k, v = flat(6)
    attend = DenseAttend(1)
    attend(0, q[:4], k[:4], v[:4])
    attend.visible = torch.tensor([[True, True, True, True, True, False], [True, True, True, True, False, True]])
    rivals = attend(0, q[4:], k[4:], v[4:])
    for row, rival in ((4, 0), (5, 1)):
        alone = [*range(4), row]
        assert_close(rivals[rival], DenseAttend(1)(0, q[alone], k[alone], v[alone])[-1])


def test_the_backend_is_a_choice() -> None:
    q, k, v = flat(5)
    assert_close(DenseAttend(1, attention=attention_reference)(0, q, k, v), DenseAttend(1)(0, q, k, v))
