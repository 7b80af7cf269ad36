"""The two official models at full size with random weights, made on the device itself; or a toy of each family."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omnilmm.models.config import ModelConfig, read_model_config
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.vision import ImageEncoder
from omnilmm.models.weights import empty_encoder, empty_language_model

SHAPES = Path(__file__).parents[1] / "data" / "official_shapes"
COMMON: Mapping[str, Any] = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 448,
}
OFFICIAL: Mapping[str, Mapping[str, Any]] = {
    "omnilmm-12b": {"model_type": "omnilmm", "num_query": 64, "max_position_embeddings": 32768, "sliding_window": 4096},
    "minicpm-v": {
        "model_type": "minicpmv",
        "query_num": 64,
        "max_position_embeddings": 4096,
        "vision_encoder": "vit_so400m_patch14_siglip_384",
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    },
}
NAMES: Mapping[str, str] = {"3b": "minicpm-v", "12b": "omnilmm-12b"}
TINY: Mapping[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "vocab_size": 512,
    "image_size": 56,
    "vision_config_override": {"depth": 3, "embed_dim": 32, "num_heads": 2, "mlp_hidden_dim": 48, "img_size": 56},
}


def read_config(size: str, *, is_tiny: bool) -> ModelConfig:
    """The config of "3b" or "12b": its official config.json with the sizes that its tensors have."""
    name = NAMES[size]
    facts = json.loads((SHAPES / f"{name}.json").read_text(encoding="utf-8"))
    sizes = {key: value for key, value in facts["assumed"].items() if isinstance(value, int)}
    sizes["vocab_size"] = int(str(facts["assumed"]["vocab_size"]).split()[0])
    with tempfile.TemporaryDirectory() as folder:
        settings = {**COMMON, **sizes, **OFFICIAL[name], **(TINY if is_tiny else {})}
        (Path(folder) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        config = read_model_config(Path(folder))
    if not is_tiny:
        parts = facts["parameters_by_part"]
        assert num_parameters(empty_language_model(config)) == parts["language_model"], "not the official model"
    return config


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def make_language(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    return _filled(lambda: empty_language_model(config), dtype, device)


def make_encoder(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ImageEncoder:
    return _filled(lambda: empty_encoder(config), dtype, device)


@torch.no_grad()
def _filled(make: Callable[[], Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Weights small enough that what is computed stays finite; norms as they are when nothing was learnt."""
    model = make().to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.normal_(std=0.02)
    model.derive_tables()
    return model
