"""Rotary tables against transformers' Llama; position grids against the stored statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from omnilmm.models.positions import Rotary, resample_grid, rotate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_that_of_llama(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    positions = torch.tensor([0, 1, 2, 63, 500, 4095])
    q = torch.randn(6, 4, 32, generator=generator).to(dtype)
    rotary = Rotary(32, theta=5e5, max_context=4096).to(dtype)
    ours = rotate(q, rotary(positions))

    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    theirs, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin)
    assert torch.equal(ours, theirs[0].transpose(0, 1))


def test_positions_past_the_context_are_refused() -> None:
    rotary = Rotary(8, theta=1e4, max_context=16)
    with pytest.raises(IndexError):
        rotary(torch.tensor([16]))


def test_tables_come_back_after_losing_their_memory() -> None:
    with torch.device("meta"):
        rotary = Rotary(8, theta=1e4, max_context=16)
    rotary = rotary.to_empty(device="cpu")
    rotary.derive_tables()
    assert torch.equal(rotary.cos, Rotary(8, theta=1e4, max_context=16).cos)


def test_a_grid_of_the_right_size_is_left_alone() -> None:
    table = torch.randn(49, 6)
    assert torch.equal(resample_grid(table, 7, antialias=True), table)


@pytest.mark.parametrize("antialias", [True, False])
def test_rows_and_columns_of_a_grid_keep_their_places(antialias: bool) -> None:
    down, across = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    table = torch.stack((down, across), dim=-1).flatten(0, 1)  # (64, 2)
    larger = resample_grid(table, 16, antialias=antialias).view(16, 16, 2)
    ramp = torch.arange(16) / 2 - 0.25  # pixel centres, away from the clamped borders
    assert_close(larger[4:12, 4:12, 0], ramp[4:12, None].expand(8, 8), atol=0.05, rtol=0)
    assert_close(larger[4:12, 4:12, 1], ramp[None, 4:12].expand(8, 8), atol=0.05, rtol=0)


def test_vision_table_at_run_time_size(reference: Any) -> None:
    golden = reference.goldens["vision_pos_embed_resampled"]
    table = reference.encoder.vision.positions
    first = int(reference.config.vision.has_class_token)
    assert list(table.shape) == golden["shape"]
    assert_statistics(table, golden)
    assert_close(table[0, first, :8], torch.tensor(golden["first_patch_first8"]), atol=1e-6, rtol=0)
    assert_close(table[0, -1, :8], torch.tensor(golden["last_patch_first8"]), atol=1e-6, rtol=0)
    if first:
        assert torch.equal(table[:, :1], reference.encoder.vision.pos_embed[:, :1])


def test_resampler_table_at_run_time_size(reference: Any) -> None:
    golden = reference.goldens["resampler_pos_embed_resampled"]
    table = reference.encoder.resampler.positions
    assert list(table.shape) == golden["shape"]
    assert_statistics(table, golden)
    assert_close(table[0, :8], torch.tensor(golden["first8"]), atol=1e-6, rtol=0)
    assert_close(table[1, :8], torch.tensor(golden["row1_first8"]), atol=1e-6, rtol=0)
    assert_close(table[-1, -8:], torch.tensor(golden["last8"]), atol=1e-6, rtol=0)


def assert_statistics(table: torch.Tensor, golden: dict[str, Any]) -> None:
    assert table.mean().item() == pytest.approx(golden["mean"], abs=1e-6)
    assert table.std(correction=0).item() == pytest.approx(golden["std"], abs=1e-6)
    assert table.min().item() == pytest.approx(golden["min"], abs=1e-6)
    assert table.max().item() == pytest.approx(golden["max"], abs=1e-6)
    assert table.double().norm().item() == pytest.approx(golden["l2"], rel=1e-6)
