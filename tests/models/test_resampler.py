"""The resampler against the goldens of both families, through our own tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from omnilmm.models.config import ResamplerConfig
from omnilmm.models.resampler import Resampler


def test_vectors_of_every_picture(reference: Any, picture: str) -> None:
    vectors = reference.vectors(picture)
    assert_close(vectors, reference.tensors[f"image.{picture}.resampler"], atol=1e-4, rtol=0)
    golden = reference.goldens["images"][picture]["resampler"]
    assert vectors.double().norm().item() == pytest.approx(golden["l2"], rel=1e-5)


def test_it_is_torchs_attention_between_norms() -> None:
    torch.manual_seed(3)
    ours = Resampler(ResamplerConfig(num_query=4, hidden=256, vision_width=24), grid=4)
    for parameter in ours.parameters():
        parameter.normal_(std=0.2)
    ours.derive_tables()
    theirs = nn.MultiheadAttention(256, 2, batch_first=True)
    theirs.in_proj_weight.copy_(ours.in_proj.weight)
    theirs.in_proj_bias.copy_(ours.in_proj.bias)
    theirs.out_proj.weight.copy_(ours.out.weight)
    theirs.out_proj.bias.copy_(ours.out.bias)

    features = torch.randn(3, 16, 24)
    x = ours.norm_kv(features @ ours.kv_proj.weight.T)
    q = (ours.norm_q(ours.query) + ours.pos_embed).expand(3, -1, -1)
    read, _ = theirs(q, x + ours.positions, x, need_weights=False)
    assert_close(ours(features), ours.norm_post(read) @ ours.proj, atol=1e-4, rtol=1e-4)
