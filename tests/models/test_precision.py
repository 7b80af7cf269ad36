"""Half precision runs, and errs no more than the originals do in bfloat16.

The checkpoints state how far bfloat16 is from float32 in the original (`precision` of the goldens). float16 has three
more bits and stays within a quarter of that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omnilmm.models.attention import DenseAttend
from omnilmm.models.weights import load_encoder, load_language_model, torch_dtype

ALLOWED = {"bfloat16": 1.25, "float16": 0.25}


@pytest.mark.parametrize("dtype", sorted(ALLOWED))
def test_half_precision_errs_as_the_original_does(reference: Any, dtype: str) -> None:
    case, stated = reference.full_case, reference.goldens["precision"]["bf16_vs_fp32"]
    encoder = load_encoder(reference.folder, reference.config, dtype=dtype)
    model = load_language_model(reference.folder, reference.config, dtype=dtype)
    pixels = reference.pixels(case["image"]).to(torch_dtype(dtype))

    features, vectors = encoder.vision_features(pixels), encoder(pixels)[0]
    embeds = model.embed(torch.tensor(case["input_ids"]))
    embeds[reference.picture_rows(case)] = vectors
    hidden = model(embeds, torch.arange(len(embeds)), DenseAttend(reference.config.language.num_layers))
    logits = model.logits(hidden[-1:])[0]
    assert features.dtype == vectors.dtype == hidden.dtype == torch_dtype(dtype)
    assert logits.dtype == torch.float32

    golden_logits = reference.tensors[f"{reference.goldens['full_case']}.logits_last"]
    errors = {
        "vision_features": features - reference.encoder.vision_features(reference.pixels(case["image"])),
        "resampler": vectors - reference.tensors[f"image.{case['image']}.resampler"],
        "logits_last": logits - golden_logits,
    }
    for kind, error in errors.items():
        assert 0 < error.abs().max().item() < ALLOWED[dtype] * stated[kind], kind
    assert logits.argmax() == golden_logits.argmax()
