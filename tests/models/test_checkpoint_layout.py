"""Every official name has a place in our parameters and every parameter an owner, at full size and in the tiny sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from omnilmm.models.checkpoint import Checkpoint
from omnilmm.models.config import ModelConfig, read_model_config
from omnilmm.models.layout import Part, checkpoint_layout, is_ignored
from omnilmm.models.weights import empty_encoder, empty_language_model, to_checkpoint

SHAPES = Path(__file__).parents[1] / "data" / "official_shapes"
COMMON = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "image_size": 448}
OWN_KEYS: dict[str, dict[str, Any]] = {
    "omnilmm-12b": {"model_type": "omnilmm", "num_query": 64, "max_position_embeddings": 32768, "sliding_window": 4096},
    "minicpm-v": {
        "model_type": "minicpmv",
        "query_num": 64,
        "max_position_embeddings": 4096,
        "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
        "drop_vision_last_layer": True,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    },
}


@pytest.fixture(params=sorted(OWN_KEYS))
def official(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], ModelConfig]:
    """A full-size model: what is known of its tensors, and the config its official config.json gives."""
    facts = json.loads((SHAPES / f"{request.param}.json").read_text())
    sizes = {key: value for key, value in facts["assumed"].items() if isinstance(value, int)}
    sizes["vocab_size"] = int(str(facts["assumed"]["vocab_size"]).split()[0])
    (tmp_path / "config.json").write_text(json.dumps(COMMON | sizes | OWN_KEYS[request.param]))
    return facts, read_model_config(tmp_path)


def models(config: ModelConfig) -> dict[Part, nn.Module]:
    encoder = empty_encoder(config)
    return {Part.VISION: encoder, Part.RESAMPLER: encoder, Part.LANGUAGE: empty_language_model(config)}


def test_full_size_names_and_shapes(official: tuple[dict[str, Any], ModelConfig]) -> None:
    facts, config = official
    layout = checkpoint_layout(config)
    assert {name: list(slot.shape) for name, slot in layout.items()} == facts["shapes"]
    assert len(layout) == facts["tensor_count"]


def test_full_size_parts(official: tuple[dict[str, Any], ModelConfig]) -> None:
    facts, config = official
    totals = dict.fromkeys(Part, 0)
    for slot in checkpoint_layout(config).values():
        size = 1
        for side in slot.shape:
            size *= side
        totals[slot.part] += size
    expected = facts["parameters_by_part"]
    assert totals[Part.VISION] == expected["vision_tower"]
    assert totals[Part.RESAMPLER] == expected["resampler"]
    assert totals[Part.LANGUAGE] == expected["language_model"]


def test_full_size_slots_tile_our_parameters(official: tuple[dict[str, Any], ModelConfig]) -> None:
    _, config = official
    assert_tiled(config)


def test_tiny_slots_tile_our_parameters(reference: Any) -> None:
    assert_tiled(reference.config)
    assert set(checkpoint_layout(reference.config)) == set(Checkpoint(reference.folder).names)


def assert_tiled(config: ModelConfig) -> None:
    """Slots fit, do not overlap, and leave no row of any parameter over, but for the keys' bias in EVA."""
    assert config.vision is not None
    by_part = models(config)
    runs: dict[tuple[int, str], list[slice]] = {}
    for slot in checkpoint_layout(config).values():
        parameter = by_part[slot.part].get_parameter(slot.parameter)
        assert tuple(parameter[slot.rows].shape) == slot.shape, slot.name
        runs.setdefault((id(by_part[slot.part]), slot.parameter), []).append(slot.rows)
    for model in (by_part[Part.VISION], by_part[Part.LANGUAGE]):
        for name, parameter in model.named_parameters():
            rows = sorted(runs.pop((id(model), name)), key=lambda run: run.start)
            if name.endswith("attention.qkv.bias") and not config.vision.has_key_bias:
                width = config.vision.width
                assert rows == [slice(0, width), slice(2 * width, 3 * width)]
            else:
                assert [0, *(run.stop for run in rows)] == [*(run.start for run in rows), parameter.shape[0]], name
    assert not runs


def test_full_size_models_give_back_the_official_names(official: tuple[dict[str, Any], ModelConfig]) -> None:
    facts, config = official
    written = to_checkpoint(config, encoder=empty_encoder(config), language_model=empty_language_model(config))
    assert {name: list(tensor.shape) for name, tensor in written} == facts["shapes"]


def test_only_rotary_frequencies_may_be_passed_over() -> None:
    assert is_ignored("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert is_ignored("llm.model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not is_ignored("model.layers.3.self_attn.q_proj.bias")
