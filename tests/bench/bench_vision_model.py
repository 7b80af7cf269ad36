"""A checkpoint of random weights whose costs are in proportion: a picture takes far longer to encode than to prefill.

OmniLMM-3B's architecture and the tiny reference checkpoint's tokenizer. What it says means nothing; what it costs on a
CPU is what counts: about a second for a picture of 448 x 448, as the original does on a small GPU.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from omnilmm.models.config import read_model_config
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.vision import ImageEncoder
from omnilmm.models.weights import to_checkpoint
from omnilmm.training.export import num_parameters, write_shards

TOKENIZER = Path(__file__).parents[1] / "data" / "minicpm-v-tiny"
VISION = {"depth": 13, "embed_dim": 768, "img_size": 448, "mlp_hidden_dim": 3072, "mlp_ratio": 4.0, "num_heads": 12}
LANGUAGE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 4096,
}


def write_checkpoint(folder: Path) -> str:
    """Write it, and say what it is in a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    settings = json.loads((TOKENIZER / "config.json").read_text(encoding="utf-8"))
    settings |= LANGUAGE | {"vision_config_override": {**VISION, "patch_size": 14}}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = read_model_config(folder)
    assert config.vision is not None
    assert config.resampler is not None
    torch.manual_seed(0)
    encoder, language = ImageEncoder(config.vision, config.resampler), LanguageModel(config.language)
    with torch.no_grad():
        for name, parameter in (*encoder.named_parameters(), *language.named_parameters()):
            if "norm" not in name and "ln_" not in name:
                parameter.normal_(std=0.02)
    write_shards(
        folder,
        (
            (name, tensor.to(torch.bfloat16))
            for name, tensor in to_checkpoint(config, encoder=encoder, language_model=language)
        ),
    )
    sizes = num_parameters(encoder) / 1e6, num_parameters(language) / 1e6
    return f"random weights, {sizes[0]:.0f} M parameters to see and {sizes[1]:.0f} M to speak, bfloat16"
