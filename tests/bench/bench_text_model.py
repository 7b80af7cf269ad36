"""A text checkpoint of random weights with the sizes of OmniLMM-3B's decoder, MiniCPM-2.4B: 40 layers of 2304.

What it says means nothing; a step of it costs what a step of the real one does. Tokenizer and vocabulary are those of
another checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from omnilmm.models.config import read_model_config
from omnilmm.models.weights import empty_language_model, to_checkpoint
from omnilmm.training.export import num_parameters, write_shards

SIZES = {
    "hidden_size": 2304,
    "intermediate_size": 5760,
    "num_attention_heads": 36,
    "num_hidden_layers": 40,
    "num_key_value_heads": 36,
    "tie_word_embeddings": True,
}
OTHERS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_text_checkpoint(folder: Path, *, like: Path) -> str:
    """Write it in bfloat16, with the tokenizer of `like`, and say what it is in a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in OTHERS:
        shutil.copy(like / name, folder / name)
    settings = json.loads((like / "config.json").read_text(encoding="utf-8")) | SIZES
    settings.pop("head_dim", None)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = read_model_config(folder)
    language = empty_language_model(config).to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    write_shards(folder, to_checkpoint(config, language_model=language))
    return f"random weights, {num_parameters(language) / 1e9:.2f} G parameters, as OmniLMM-3B's decoder"
