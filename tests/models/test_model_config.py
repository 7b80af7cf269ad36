"""config.json of either family, of text models, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omnilmm.config import Family, InputHandling
from omnilmm.errors import CheckpointError, ConfigError
from omnilmm.models.config import VisionStyle, read_model_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

OMNILMM_12B = LLAMA | {"model_type": "omnilmm", "hidden_size": 256, "num_query": 64, "image_size": 448}
MINICPM_V = LLAMA | {
    "model_type": "minicpmv",
    "hidden_size": 256,
    "query_num": 64,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 64,
    "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
}


def write(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_tiny_checkpoints_are_read(reference: Any) -> None:
    config = reference.config
    override = json.loads((reference.folder / "config.json").read_text())["vision_config_override"]
    assert config.family.value == {"omnilmm-12b-tiny": "omnilmm", "minicpm-v-tiny": "minicpmv"}[reference.name]
    assert config.vision.width == override["embed_dim"]
    assert config.vision.num_blocks == override["depth"] - 1
    assert config.vision.mlp_width == override["mlp_hidden_dim"]
    assert config.vision.native_side == override["img_size"]
    assert (config.bos_id, config.eos_ids) == (1, (2,))
    assert config.num_image_tokens == 64
    assert config.max_context == 4096  # the 12B's sliding window, the 3B's table


def test_the_full_towers_are_meant_where_sizes_are_left_out(tmp_path: Path) -> None:
    eva = read_model_config(write(tmp_path, OMNILMM_12B)).vision
    assert eva is not None
    assert (eva.style, eva.width, eva.num_blocks, eva.num_heads) == (VisionStyle.EVA, 1792, 63, 16)
    assert (eva.mlp_width, eva.native_grid, eva.grid, eva.num_patches) == (15360, 16, 32, 1024)
    siglip = read_model_config(write(tmp_path, MINICPM_V)).vision
    assert siglip is not None
    assert (siglip.style, siglip.width, siglip.num_blocks, siglip.num_heads) == (VisionStyle.SIGLIP, 1152, 26, 16)
    assert (siglip.mlp_width, siglip.native_grid, siglip.grid, siglip.side) == (4304, 27, 32, 448)


def test_the_last_block_of_the_3b_stays_if_the_config_says_so(tmp_path: Path) -> None:
    vision = read_model_config(write(tmp_path, MINICPM_V | {"drop_vision_last_layer": False})).vision
    assert vision is not None
    assert vision.num_blocks == 27


def test_pixels_are_normalised_by_family(tmp_path: Path) -> None:
    clip = read_model_config(write(tmp_path, OMNILMM_12B)).image_policy(InputHandling.ORIGINAL)
    assert (clip.side, clip.handling) == (448, InputHandling.ORIGINAL)
    assert clip.mean == (0.48145466, 0.4578275, 0.40821073)
    assert clip.std == (0.26862954, 0.26130258, 0.27577711)
    half = read_model_config(write(tmp_path, MINICPM_V)).image_policy(InputHandling.SAFE)
    assert half.mean == half.std == (0.5, 0.5, 0.5)


def test_a_text_model_has_no_eyes(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path, LLAMA))
    assert (config.family, config.vision, config.resampler) == (Family.TEXT, None, None)
    assert config.num_image_tokens == 0
    with pytest.raises(ConfigError):
        config.image_policy(InputHandling.SAFE)


def test_scales_are_one_outside_minicpm(tmp_path: Path) -> None:
    plain = read_model_config(write(tmp_path, LLAMA)).language
    assert (plain.scale_emb, plain.residual_scale, plain.logit_divisor) == (1.0, 1.0, 1.0)
    scaled = read_model_config(write(tmp_path, MINICPM_V)).language
    assert scaled.scale_emb == 12.0
    assert scaled.residual_scale == pytest.approx(1.4 / 2**0.5)
    assert scaled.logit_divisor == 4.0


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"num_key_value_heads": None}, "num_kv_heads", 4),
        ({"head_dim": 32}, "head_dim", 32),
        ({"head_dim": None}, "head_dim", 16),
        ({"rope_theta": 5e5}, "rope_theta", 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, "rope_theta", 7e4),
        ({"rope_scaling": None}, "rope_theta", 10000.0),
        ({"sliding_window": 128}, "max_context", 128),
        ({"sliding_window": None}, "max_context", 512),
        ({"tie_word_embeddings": True}, "is_tied", True),
        ({"model_type": "mistral"}, "is_tied", False),
        ({"model_type": "minicpm", "scale_emb": 2, "scale_depth": 1, "dim_model_base": 8}, "is_tied", True),
    ],
)
def test_language_settings(tmp_path: Path, changes: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(read_model_config(write(tmp_path, LLAMA | changes)).language, field) == value


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    assert read_model_config(write(tmp_path, LLAMA, {"eos_token_id": [5, 7]})).eos_ids == (5, 7)
    assert read_model_config(write(tmp_path, LLAMA, {"temperature": 1.0})).eos_ids == (2,)


@pytest.mark.parametrize(
    ("base", "changes", "key"),
    [
        (LLAMA, {"model_type": "qwen2"}, "model_type"),
        (LLAMA, {"model_type": None}, "model_type"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA, {"attention_bias": True}, "attention_bias"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        (LLAMA, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters"),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"hidden_size": 0}, "hidden_size"),
        (LLAMA, {"hidden_size": "64"}, "hidden_size"),
        (LLAMA, {"hidden_size": True}, "hidden_size"),
        (LLAMA, {"hidden_size": 66}, "num_attention_heads"),
        (LLAMA, {"head_dim": 15}, "head_dim"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (LLAMA, {"vocab_size": None}, "vocab_size"),
        (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps"),
        (LLAMA, {"rope_theta": float("nan")}, "rope_theta"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (LLAMA, {"bos_token_id": None}, "bos_token_id"),
        (LLAMA, {"eos_token_id": []}, "eos_token_id"),
        (LLAMA, {"eos_token_id": 100}, "eos_token_id"),
        (LLAMA | {"model_type": "minicpm"}, {"scale_depth": 1, "dim_model_base": 8}, "scale_emb"),
        (OMNILMM_12B, {"num_query": 60}, "num_query"),
        (OMNILMM_12B, {"num_query": None}, "num_query"),
        (OMNILMM_12B, {"hidden_size": 192}, "hidden_size"),
        (OMNILMM_12B, {"image_size": 450}, "image_size"),
        (OMNILMM_12B, {"mm_use_im_start_end": False}, "mm_use_im_start_end"),
        (OMNILMM_12B, {"vision_config_override": {"embed_dim": 57}}, "num_heads"),
        (OMNILMM_12B, {"vision_config_override": [1]}, "vision_config_override"),
        (MINICPM_V, {"vision_encoder": "vit_large"}, "vision_encoder"),
        (MINICPM_V, {"vision_encoder": None}, "vision_encoder"),
        (MINICPM_V, {"dim_model_base": None}, "dim_model_base"),
        (MINICPM_V, {"slice_mode": True}, "slice_mode"),
    ],
)
def test_what_we_do_not_implement_is_refused_by_name(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json.*: {key} "):
        read_model_config(write(tmp_path, base | changes))


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\udcff"])
def test_a_broken_file_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_model_config(tmp_path)
